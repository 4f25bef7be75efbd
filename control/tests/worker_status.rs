//! What a worker shows to those who operate it: health, metrics under Dynamo's names, and the log
//! line of a request's span.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The longest that anything here may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// What a stock worker shows, without the label `model` that it added itself; those that are not
/// claimed are left out here.
const THEIRS: &str = include_str!("data/worker-metrics.json");
const CALLERS: &str = "00-89ace864b2b31368359610792b23f650-60261288d0622a38-01";

fn corelane(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    let kept = ["PATH", "CORELANE_IO"];
    let kept = kept.map(|name| (name, std::env::var_os(name)));
    let kept = kept
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)));
    command.args(args).env_clear().envs(kept);
    command.env("DYN_FILE_KV", folder);
    command.env("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0");
    command
}

/// An echo worker with a status server, ended with the test.
struct Worker {
    child: Child,
    log: BufReader<ChildStderr>,
    address: String,
    instance: String,
    status: SocketAddr,
}

impl Worker {
    fn start(folder: &Path, env: &[(&str, &str)]) -> Worker {
        let endpoint = ["--endpoint", "demo/back-end/generate"];
        let mut command = corelane(folder, &["worker", "echo", "--discovery", "file"]);
        command.args(endpoint).envs(env.iter().copied());
        command.env("DYN_SYSTEM_PORT", "0");
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        let ready: Value = serde_json::from_str(&line).expect(&line);
        let text = |name: &str| ready[name].as_str().unwrap().to_owned();
        Worker {
            log: BufReader::new(child.stderr.take().unwrap()),
            address: text("address"),
            instance: text("instance"),
            status: text("status").parse().unwrap(),
            child,
        }
    }

    /// Status and body.
    fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.status).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    fn health(&self) -> Value {
        serde_json::from_str(&self.get("/health").1).unwrap()
    }

    fn call(&self, folder: &Path, more: &[&str]) {
        let args = ["call", "--address", &self.address];
        let output = corelane(folder, &[&args, more].concat()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// The next line of the log with this message.
    fn line(&mut self, message: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "no {message}");
            let json = serde_json::from_str::<Value>(&line).expect(&line);
            if json["message"] == message {
                return line;
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A family of a scrape.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    labels: BTreeSet<String>,
    bounds: BTreeSet<u64>,
}

/// A bound of a bucket as a number that can be compared, whatever its text.
fn bound(text: &str) -> u64 {
    text.replace("+Inf", "inf")
        .parse::<f64>()
        .unwrap()
        .to_bits()
}

/// The families of a scrape under the names of their series, counters with `_total`.
fn families(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut now = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            let end = if kind == "counter" { "_total" } else { "" };
            now = format!("{name}{end}");
            families.entry(now.clone()).or_default().kind = kind.to_owned();
        }
        let Some(family) = families.get_mut(&now).filter(|_| !line.starts_with('#')) else {
            continue;
        };
        let labels = line
            .split_once('{')
            .and_then(|(_, rest)| rest.split_once('}'));
        for pair in labels
            .map_or("", |(labels, _)| labels)
            .split_terminator("\",")
        {
            let (name, value) = pair.split_once("=\"").unwrap();
            if name == "le" {
                family.bounds.insert(bound(value.trim_end_matches('"')));
            } else {
                family.labels.insert(name.to_owned());
            }
        }
    }
    families
}

#[test]
fn metrics_have_dynamos_names_types_labels_and_buckets() {
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::start(folder.path(), &[]);
    worker.call(folder.path(), &["--count", "3"]);
    let labels = format!(
        "{{dynamo_component=\"back_end\",dynamo_endpoint=\"generate\",dynamo_namespace=\"demo\",\
         worker_id=\"{}\"}}",
        worker.instance
    );
    let served = format!("dynamo_component_request_duration_seconds_count{labels} 3\n");
    let mut text = String::new();
    wait_until("three requests have ended", || {
        text = worker.get("/metrics").1;
        text.contains(&served)
    });
    for line in [
        format!("dynamo_component_requests_total{labels} 3\n"),
        format!("dynamo_component_inflight_requests{labels} 0\n"),
        format!("dynamo_component_cancellation_total{labels} 0\n"),
        "dynamo_work_handler_pool_capacity 10000\n".to_owned(),
        "dynamo_work_handler_queue_capacity 40000\n".to_owned(),
        "dynamo_work_handler_time_to_first_response_seconds_count 3\n".to_owned(),
        "corelane_handled_total{core=\"0\",cpu=\"any\"} 3\n".to_owned(),
    ] {
        assert!(text.contains(&line), "{line}\n{text}");
    }
    let ours = families(&text);
    let mut compared = 0;
    let theirs: Value = serde_json::from_str(THEIRS).unwrap();
    let claimed = |family: &&Value| family["claimed"] == true;
    for theirs in theirs.as_array().unwrap().iter().filter(claimed) {
        let name = theirs["name"].as_str().unwrap();
        let texts = |key: &str| {
            let list = theirs[key].as_array().unwrap().iter();
            let texts = list.map(|text| text.as_str().unwrap().to_owned());
            texts.collect::<BTreeSet<String>>()
        };
        let family = ours.get(name);
        let family = family.unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(theirs["type"], family.kind.as_str(), "{name}");
        assert_eq!(family.labels, texts("labels"), "{name}");
        let bounds: BTreeSet<u64> = texts("bounds").iter().map(|text| bound(text)).collect();
        assert_eq!(family.bounds, bounds, "{name}");
        compared += 1;
    }
    assert_eq!(compared, 16);
}

#[test]
fn health_says_what_each_endpoint_is_until_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::start(folder.path(), &[]);
    assert_eq!(worker.get("/live").0, 200);
    assert_eq!(worker.get("/health").0, 200);
    let health = worker.health();
    let endpoint = "demo/back-end/generate";
    assert_eq!(health["status"], "ready");
    assert_eq!(health["endpoints"][endpoint], "ready");
    assert_eq!(health["states"][endpoint], "healthy");
    assert_eq!(health["paths"][endpoint], worker.address);

    // The grace keeps it there to be looked at.
    let slow = [("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "3600")];
    let worker = Worker::start(folder.path(), &slow);
    let pid = rustix::process::Pid::from_child(&worker.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    wait_until("it is stopping", || {
        let health = worker.health();
        health["states"][endpoint] == "stopping" && health["status"] == "notready"
    });
    assert_eq!(worker.get("/health").0, 503);
    assert_eq!(worker.get("/live").0, 200);
}

#[test]
fn paths_and_decisive_endpoints_are_those_of_the_environment() {
    let folder = tempfile::tempdir().unwrap();
    let set = [
        ("DYN_SYSTEM_HEALTH_PATH", "/probe"),
        ("DYN_SYSTEM_LIVE_PATH", "/alive"),
        ("DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS", "[\"other\"]"),
    ];
    let worker = Worker::start(folder.path(), &set);
    assert_eq!(worker.get("/alive").0, 200);
    assert_eq!(worker.get("/health").0, 404);
    let (status, body) = worker.get("/probe");
    assert_eq!(
        status, 503,
        "the endpoint that decides is not there: {body}"
    );
}

#[test]
fn the_line_of_a_span_has_dynamos_fields() {
    let folder = tempfile::tempdir().unwrap();
    let set = [
        ("DYN_LOGGING_JSONL", "1"),
        ("DYN_LOGGING_SPAN_EVENTS", "1"),
        // The lines of spans stand there whatever else does.
        ("DYN_LOG", "error"),
    ];
    let mut worker = Worker::start(folder.path(), &set);
    let header = format!("traceparent={CALLERS}");
    worker.call(folder.path(), &["--header", &header]);
    let line = worker.line("SPAN_CLOSED");
    let json: Value = serde_json::from_str(&line).unwrap();
    // As in the line of a stock worker, in this order.
    let keys = [
        "time",
        "level",
        "file",
        "line",
        "target",
        "message",
        "component",
        "endpoint",
        "instance_id",
        "namespace",
        "otel.kind",
        "parent_id",
        "request_id",
        "span_id",
        "span_name",
        "time.busy_us",
        "time.duration_us",
        "time.idle_us",
        "trace_flags",
        "trace_id",
    ];
    let at = |key: &str| line.find(&format!("\"{key}\":")).expect(key);
    assert!(
        keys.windows(2).all(|pair| at(pair[0]) < at(pair[1])),
        "{line}"
    );
    for (key, value) in [
        ("target", "request_span"),
        ("component", "back-end"),
        ("namespace", "demo"),
        ("endpoint", "generate"),
        ("otel.kind", "server"),
        ("span_name", "handle_payload"),
        ("parent_id", "60261288d0622a38"),
        ("trace_id", "89ace864b2b31368359610792b23f650"),
        ("trace_flags", "01"),
    ] {
        assert_eq!(json[key], value, "{line}");
    }
    let instance = u64::from_str_radix(&worker.instance, 16).unwrap();
    assert_eq!(json["instance_id"], instance.to_string());
    let us = |key: &str| json[key].as_u64().unwrap();
    let rest = us("time.duration_us").abs_diff(us("time.busy_us") + us("time.idle_us"));
    assert!(rest <= 1, "{line}");
}
