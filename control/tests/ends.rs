//! `corelane worker echo` and `corelane call` as a shell sees them, against each other.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The longest that anything here may take.
const DEADLINE: Duration = Duration::from_secs(60);

fn corelane(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    let io = std::env::var_os("CORELANE_IO");
    let path = std::env::var_os("PATH");
    command
        .args(args)
        .env_clear()
        .envs(path.map(|path| ("PATH", path)));
    command.envs(io.map(|io| ("CORELANE_IO", io)));
    command
        .env("DYN_FILE_KV", folder)
        .env("CORELANE_LOG", "warn");
    command.env("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0");
    command
}

/// An echo worker, ended with the test.
struct Worker {
    child: Child,
    /// Kept open: a worker that cannot print has nobody to print to.
    _out: BufReader<ChildStdout>,
    address: String,
    instance: String,
}

impl Worker {
    fn start(folder: &Path, options: &[&str]) -> Worker {
        let args = ["worker", "echo", "--endpoint", "a/b/c"];
        let mut child = corelane(folder, &[&args, options].concat())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let ready: Value = serde_json::from_str(&line).expect(&line);
        assert_eq!(ready["ready"], true);
        let text = |name: &str| ready[name].as_str().unwrap().to_owned();
        let (address, instance) = (text("address"), text("instance"));
        Worker {
            child,
            _out: out,
            address,
            instance,
        }
    }

    fn signal(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Its exit code, once it has ended by itself.
    fn ended(&mut self) -> Option<i32> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the worker does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn call(folder: &Path, args: &[&str]) -> Output {
    corelane(folder, &[&["call"], args].concat())
        .output()
        .unwrap()
}

/// The lines of a call with `--json`.
fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect()
}

fn of_kind<'a>(lines: &'a [Value], kind: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["type"] == kind).collect()
}

const BY_NAME: [&str; 5] = ["--endpoint", "a/b/c", "--discovery", "file", "--json"];

#[test]
fn bodies_come_back_in_both_codecs_by_name_and_by_address() {
    for codec in ["json", "msgpack"] {
        let folder = tempfile::tempdir().unwrap();
        let options = ["--discovery", "file", "--items", "3", "--codec", codec];
        let worker = Worker::start(folder.path(), &options);
        let body = r#"{"text":"grüße","n":[1,-2.5,null,true]}"#;
        let want: Value = serde_json::from_str(body).unwrap();
        let by_address = ["--address", &worker.address, "--json"];
        for target in [&BY_NAME[..], &by_address] {
            let output = call(folder.path(), &[target, &["--body", body]].concat());
            assert!(output.status.success(), "{output:?}");
            let lines = lines(&output);
            let items = of_kind(&lines, "item");
            assert_eq!(items.len(), 3);
            assert!(items.iter().all(|item| item["data"] == want), "{items:?}");
            let end = of_kind(&lines, "end")[0];
            assert_eq!(end["outcome"], "ok");
            assert_eq!(end["instance"], worker.instance);
            assert!(end["first_us"].as_f64().unwrap() <= end["end_us"].as_f64().unwrap());
        }
    }
}

#[test]
fn many_calls_take_turns_and_are_summed_up() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--discovery", "file", "--item-bytes", "100"];
    let workers = [0, 1].map(|_| Worker::start(folder.path(), &options));
    let load = ["--count", "200", "--concurrency", "16"];
    let output = call(folder.path(), &[&BY_NAME[..], &load].concat());
    assert!(output.status.success(), "{output:?}");
    let lines = lines(&output);
    for item in of_kind(&lines, "item") {
        assert_eq!(item["data"], "x".repeat(100));
    }
    for worker in &workers {
        let of_worker = |end: &&&Value| end["instance"] == worker.instance;
        assert_eq!(of_kind(&lines, "end").iter().filter(of_worker).count(), 100);
    }
    let summary = of_kind(&lines, "summary")[0];
    assert_eq!(
        (&summary["ok"], &summary["failed"]),
        (&200.into(), &0.into())
    );
    assert!(summary["end_us"]["p99"].as_u64() >= summary["end_us"]["p50"].as_u64());
}

#[test]
fn responses_are_ended_early_and_the_worker_notices() {
    let folder = tempfile::tempdir().unwrap();
    let options = [
        "--discovery",
        "file",
        "--items",
        "1000000",
        "--delay-us",
        "500",
    ];
    let mut worker = Worker::start(folder.path(), &options);
    for early in ["--stop-after", "--kill-after"] {
        let output = call(folder.path(), &[&BY_NAME[..], &[early, "3"]].concat());
        assert!(output.status.success(), "{output:?}");
        let end = lines(&output).pop().unwrap();
        assert_eq!(
            (&end["type"], &end["outcome"]),
            (&"end".into(), &"stopped".into())
        );
        assert!(end["items"].as_u64().unwrap() >= 3);
    }
    // Nothing runs any more, so it ends at once and not after millions of items.
    worker.signal();
    assert_eq!(worker.ended(), Some(0));
}

#[test]
fn a_worker_that_is_told_to_end_finishes_what_runs() {
    let folder = tempfile::tempdir().unwrap();
    let options = [
        "--discovery",
        "file",
        "--items",
        "20",
        "--delay-us",
        "20000",
    ];
    let mut worker = Worker::start(folder.path(), &options);
    let mut running = corelane(folder.path(), &["call", "--endpoint", "a/b/c"]);
    running.args(["--discovery", "file", "--json"]);
    let mut running = running.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(running.stdout.take().unwrap()).lines();
    // Items are shown while they come.
    let first = lines.next().unwrap().unwrap();
    assert!(first.contains("\"item\""), "{first}");
    worker.signal();
    let last = lines.map(Result::unwrap).last().unwrap();
    let end: Value = serde_json::from_str(&last).unwrap();
    assert!(running.wait().unwrap().success());
    assert_eq!((&end["outcome"], &end["items"]), (&"ok".into(), &20.into()));
    assert_eq!(worker.ended(), Some(0));
    let output = call(
        folder.path(),
        &["--endpoint", "a/b/c", "--discovery", "file"],
    );
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("no instance of a/b/c"), "{said}");
}

#[test]
fn failures_are_told_in_words_and_by_the_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::start(folder.path(), &[]);
    let (socket, _) = worker.address.split_once('/').unwrap();
    let output = call(
        folder.path(),
        &["--address", &format!("{socket}/0/no/such/path"), "--json"],
    );
    assert_eq!(output.status.code(), Some(1));
    let end = lines(&output).pop().unwrap();
    assert_eq!(end["outcome"], "refused");
    let text = "Server unavailable: unknown endpoint 0/no/such/path";
    assert_eq!(end["error"], text);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("{}/0/a/b/c", nobody.local_addr().unwrap());
    drop(nobody);
    let output = call(folder.path(), &["--address", &address]);
    assert_eq!(output.status.code(), Some(1));
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        out.starts_with("failed: 0 items") && out.contains("TCP connection to"),
        "{out}"
    );
    drop(worker);
}
