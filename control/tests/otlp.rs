//! The export over OTLP, against a small HTTP collector stand-in that decodes what arrives.
//! Built only with the feature `otel`.
#![cfg(feature = "otel")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The longest that anything here may take.
const DEADLINE: Duration = Duration::from_secs(60);
const TRACE: &str = "89ace864b2b31368359610792b23f650";
const PARENT: &str = "60261288d0622a38";

/// One export as it arrived.
struct Export {
    path: String,
    head: String,
    body: Vec<u8>,
}

/// The collector stand-in: answers every POST with an empty success, and keeps what it got.
struct Collector {
    address: String,
    exports: Receiver<Export>,
}

impl Collector {
    fn start() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (sender, exports) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, sender) = (stream.unwrap(), sender.clone());
                std::thread::spawn(move || serve(stream, &sender));
            }
        });
        Collector { address, exports }
    }
}

fn serve(stream: TcpStream, sender: &Sender<Export>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let head = head.to_ascii_lowercase();
        let value = |name: &str| Some(head.split_once(name)?.1.lines().next()?.trim().to_owned());
        let mut body = vec![0; value("\r\ncontent-length:")?.parse().ok()?];
        reader.read_exact(&mut body).ok()?;
        let path = head.split(' ').nth(1)?.to_owned();
        let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\n\
                      content-length: 0\r\n\r\n";
        reader.get_mut().write_all(answer.as_bytes()).ok()?;
        sender.send(Export { path, head, body }).ok()?;
    }
}

/// One field of a protobuf message: its number, and its bytes or its number.
struct Field<'a> {
    number: u64,
    bytes: &'a [u8],
    value: u64,
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let (byte, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return value;
        }
    }
}

fn fields(mut bytes: &[u8]) -> Vec<Field<'_>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let mut field = Field {
            number: tag >> 3,
            bytes: &[],
            value: 0,
        };
        let fixed = match tag & 7 {
            0 => {
                field.value = varint(&mut bytes);
                0
            }
            1 => 8,
            2 => varint(&mut bytes) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        (field.bytes, bytes) = bytes.split_at(fixed);
        all.push(field);
    }
    all
}

/// The messages below this way of field numbers.
fn below<'a>(bytes: &'a [u8], way: &[u64]) -> Vec<&'a [u8]> {
    let Some((first, rest)) = way.split_first() else {
        return vec![bytes];
    };
    let next = fields(bytes)
        .into_iter()
        .filter(|field| field.number == *first);
    next.flat_map(|field| below(field.bytes, rest)).collect()
}

fn text(bytes: &[u8], way: &[u64]) -> String {
    let found = below(bytes, way);
    let first = found.first().copied().unwrap_or_default();
    String::from_utf8_lossy(first).into_owned()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Key and value of attributes with a text.
fn attributes(bytes: &[u8], number: u64) -> Vec<(String, String)> {
    let all = below(bytes, &[number]);
    all.iter()
        .map(|pair| (text(pair, &[1]), text(pair, &[2, 1])))
        .collect()
}

struct Program {
    child: Child,
    /// Where it takes requests.
    address: String,
}

impl Program {
    fn worker(folder: &Path, collector: &str) -> Program {
        let args = ["worker", "echo", "--endpoint", "demo/backend/generate"];
        let args = [&args[..], &["--discovery", "file"]].concat();
        Program::start(&args, folder, collector, |line| {
            let ready: Value = serde_json::from_str(line).expect(line);
            Some(ready["address"].as_str().unwrap().to_owned())
        })
    }

    /// A router and its workers.
    fn up(folder: &Path, collector: &str) -> Program {
        Program::start(&["up"], folder, collector, |line| {
            Some(line.strip_prefix("router ")?.trim().to_owned())
        })
    }

    /// With the address that `find` finds in what it says.
    fn start(
        args: &[&str],
        folder: &Path,
        collector: &str,
        find: impl Fn(&str) -> Option<String>,
    ) -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
        command.args(args).env_clear();
        let kept = ["PATH", "CORELANE_IO"].map(|name| (name, std::env::var_os(name)));
        command.envs(
            kept.into_iter()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        command.env("DYN_FILE_KV", folder);
        command.env("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0");
        command.env("OTEL_EXPORT_ENABLED", "1");
        command.env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{collector}"));
        command.env("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=abc");
        command.env("OTEL_SERVICE_NAME", "w-svc");
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = out.find_map(|line| find(&line.unwrap()));
        // It may say more, which somebody has to take.
        std::thread::spawn(move || out.for_each(drop));
        Program {
            child,
            address: address.expect("its address"),
        }
    }

    fn call(&self, flags: &str) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
        command
            .args(["call", "--address", &self.address])
            .env_clear();
        command.args([
            "--header",
            &format!("traceparent=00-{TRACE}-{PARENT}-{flags}"),
        ]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    fn end(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let deadline = Instant::now() + DEADLINE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All spans: resource_spans, scope_spans, spans.
fn spans(exports: &[Export]) -> Vec<&[u8]> {
    let of_spans = exports.iter().filter(|export| export.path == "/v1/traces");
    let all = of_spans.flat_map(|export| below(&export.body, &[1, 2, 2]));
    all.collect()
}

/// Begin and end of a span, in ns since 1970.
fn times(span: &[u8]) -> (u64, u64) {
    let time = |number| u64::from_le_bytes(below(span, &[number])[0].try_into().unwrap());
    (time(7), time(8))
}

#[test]
fn kept_spans_and_log_lines_arrive() {
    let folder = tempfile::tempdir().unwrap();
    let collector = Collector::start();
    let mut worker = Program::worker(folder.path(), &collector.address);
    worker.call("01");
    worker.call("00");
    worker.end();

    let exports: Vec<Export> = collector.exports.try_iter().collect();
    for export in &exports {
        assert!(
            export.head.contains("\r\nx-api-key: abc\r\n"),
            "{}",
            export.head
        );
        assert!(
            export
                .head
                .contains("\r\ncontent-type: application/x-protobuf\r\n")
        );
        // resource_*, resource: the service is all that it says.
        for resource in below(&export.body, &[1, 1]) {
            let said = attributes(resource, 1);
            assert_eq!(said, [("service.name".to_owned(), "w-svc".to_owned())]);
        }
    }
    let of = |path: &'static str| exports.iter().filter(move |export| export.path == path);
    let spans = spans(&exports);
    assert_eq!(
        spans.len(),
        1,
        "the caller of the other one does not keep its trace"
    );
    let span = spans[0];
    assert_eq!(hex(below(span, &[1])[0]), TRACE);
    assert_eq!(below(span, &[2])[0].len(), 8);
    assert_eq!(hex(below(span, &[4])[0]), PARENT);
    assert_eq!(text(span, &[5]), "handle_payload");
    let kind = fields(span).into_iter().find(|field| field.number == 6);
    assert_eq!(kind.unwrap().value, 2, "server");
    let (began, ended) = times(span);
    assert!(began > 1_700_000_000_000_000_000 && began <= ended);
    let said = attributes(span, 9);
    for (name, value) in [
        ("component", "backend"),
        ("endpoint", "generate"),
        ("namespace", "demo"),
        ("request.outcome", "finished"),
    ] {
        assert!(
            said.contains(&(name.to_owned(), value.to_owned())),
            "{said:?}"
        );
    }
    // resource_logs, scope_logs, log_records: severity text and body.
    let lines: Vec<(String, String)> = of("/v1/logs")
        .flat_map(|export| below(&export.body, &[1, 2, 2]))
        .map(|line| (text(line, &[3]), text(line, &[5, 1])))
        .collect();
    let ready = ("INFO".to_owned(), "echo worker ready".to_owned());
    let stopped = ("INFO".to_owned(), "stopped".to_owned());
    assert!(
        lines.contains(&ready) && lines.contains(&stopped),
        "{lines:?}"
    );
}

#[test]
fn the_routers_span_stands_beside_the_workers() {
    let folder = tempfile::tempdir().unwrap();
    let collector = Collector::start();
    let mut up = Program::up(folder.path(), &collector.address);
    up.call("01");
    up.call("00");
    up.end();
    let exports: Vec<Export> = collector.exports.try_iter().collect();
    let spans = spans(&exports);
    let named = |name: &str| -> &[u8] {
        let found: Vec<&[u8]> = spans
            .iter()
            .copied()
            .filter(|span| text(span, &[5]) == name)
            .collect();
        assert_eq!(found.len(), 1, "{name}");
        found[0]
    };
    let (routed, served) = (named("corelane.route"), named("handle_payload"));
    for span in [routed, served] {
        assert_eq!(hex(below(span, &[1])[0]), TRACE);
        assert_eq!(hex(below(span, &[4])[0]), PARENT);
    }
    assert_ne!(below(routed, &[2]), below(served, &[2]));
    let said = attributes(routed, 9);
    let about = |name: &str| {
        let found = said.iter().find(|(other, _)| other == name);
        found
            .unwrap_or_else(|| panic!("no {name}: {said:?}"))
            .1
            .as_str()
    };
    assert_eq!(about("route"), "dynamo/router/generate");
    assert_eq!(
        (about("component"), about("request.outcome")),
        ("backend", "accepted")
    );
    assert!(about("worker_address").starts_with("127.0.0.1:"));
    let theirs = attributes(served, 9);
    let worker = theirs.iter().find(|(name, _)| name == "instance_id");
    assert_eq!(about("instance_id"), worker.unwrap().1);
    // Its moments are events of the span.
    let events = below(routed, &[11]);
    let moments: Vec<String> = events.iter().map(|event| text(event, &[2])).collect();
    assert_eq!(moments, ["chosen", "forwarded", "acknowledged"]);
    let (began, ended) = times(routed);
    for event in events {
        let at = u64::from_le_bytes(below(event, &[1])[0].try_into().unwrap());
        assert!((began..=ended).contains(&at), "{began} {at} {ended}");
    }
}
