//! The programs of `examples/` as a shell runs them: a worker that fits on a page, and its client.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// The longest that anything here may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// An example, built from what stands: `cargo test` alone has built it already.
fn example(name: &str) -> PathBuf {
    static BUILT: Once = Once::new();
    let own = std::env::current_exe().unwrap();
    let folder = own.parent().and_then(Path::parent).unwrap();
    BUILT.call_once(|| {
        let mut build = Command::new(env!("CARGO"));
        // Both, so that dependencies are the same as for the tests of the whole workspace.
        build.args(["build", "-q", "--examples"]);
        build.args(["-p", "corelane-engine", "-p", "corelane"]);
        // What cargo says to us of this package is not to be said again: build scripts that look
        // at it would run again, and what hangs on them be compiled again, now and afterwards.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                build.env_remove(name);
            }
        }
        if folder.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success());
    });
    folder.join("examples").join(name)
}

fn command(name: &str, folder: &Path, grace_s: &str) -> Command {
    let mut command = Command::new(example(name));
    command.env_clear();
    let kept = ["PATH", "CORELANE_IO"];
    command.envs(
        kept.iter()
            .filter_map(|name| Some((*name, std::env::var_os(name)?))),
    );
    command.env("DYN_DISCOVERY_BACKEND", "file");
    command.env("DYN_FILE_KV", folder);
    command.env("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", grace_s);
    command
}

struct Worker(Child);

impl Worker {
    /// Runs it, until it says that it serves.
    fn start(folder: &Path, grace_s: &str) -> Worker {
        let mut worker = command("worker", folder, grace_s);
        let mut child = worker.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let out = child.stdout.take().unwrap();
        BufReader::new(out).read_line(&mut line).unwrap();
        assert!(
            line.starts_with("serving production/worker/generate at "),
            "{line:?}"
        );
        Worker(child)
    }

    fn terminate(&self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
    }

    fn ended(&mut self) -> Option<i32> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(began.elapsed() < DEADLINE, "the worker does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Files of records anywhere under a folder.
fn records(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let count = |path: PathBuf| match path.is_dir() {
        true => records(&path),
        false => 1,
    };
    entries.map(|entry| count(entry.path())).sum()
}

#[test]
fn the_client_prints_the_words_and_the_worker_drains_at_a_signal() {
    let folder = tempfile::tempdir().unwrap();
    let mut worker = Worker::start(folder.path(), "0");
    let output = command("client", folder.path(), "0")
        .arg("one two three")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "one\ntwo\nthree\n"
    );
    worker.terminate();
    assert_eq!(worker.ended(), Some(0));
    assert_eq!(records(&folder.path().join("v1")), 0);
}

#[test]
fn a_second_signal_ends_a_drain_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut worker = Worker::start(folder.path(), "3600");
    assert_eq!(records(&folder.path().join("v1")), 1);
    worker.terminate();
    let began = Instant::now();
    while records(&folder.path().join("v1")) > 0 {
        assert!(began.elapsed() < DEADLINE, "still in discovery");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(worker.0.try_wait().unwrap().is_none(), "an hour of grace");
    worker.terminate();
    assert_eq!(worker.ended(), Some(1));
}

#[test]
fn the_worker_is_as_short_as_it_is_said() {
    let text = include_str!("../../examples/worker.rs");
    assert!(text.lines().count() < 40);
}
