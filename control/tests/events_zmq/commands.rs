//! `corelane events tail` and `corelane events publish` over ZMQ.

use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::broker::Broker;
use crate::lab::DEADLINE;

fn command(args: &[&str], env: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    command.arg("events").args(args).env_clear();
    if let Ok(io) = std::env::var("CORELANE_IO") {
        command.env("CORELANE_IO", io);
    }
    command.envs(env.iter().copied());
    command.stdin(Stdio::null()).stderr(Stdio::null());
    command
}

struct Ended(Option<Child>);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What `tail` shows of what `publish` sends.
fn shown(env: &[(&str, &str)]) -> Vec<serde_json::Value> {
    let tail = ["tail", "--topic", "odd.topic", "--count", "2"];
    let tail = command(&tail, env).stdout(Stdio::piped()).spawn().unwrap();
    let mut tail = Ended(Some(tail));
    let scope = [
        "publish",
        "--scope",
        "demo/backend/generate",
        "--body",
        "{\"a\":[1]}",
    ];
    let began = Instant::now();
    // Nobody knows when it has subscribed.
    while tail.0.as_mut().unwrap().try_wait().unwrap().is_none() {
        for topic in ["other", "odd.topic"] {
            let mut publish = command(&scope, env);
            let sent = publish
                .args(["--topic", topic, "--wait-s", "1"])
                .output()
                .unwrap();
            assert!(sent.status.success(), "{sent:?}");
            let said: serde_json::Value = serde_json::from_slice(&sent.stdout).unwrap();
            assert_eq!(said["published"], 1);
        }
        assert!(began.elapsed() < DEADLINE, "tail saw nothing");
    }
    let shown = tail.0.take().unwrap().wait_with_output().unwrap();
    assert!(shown.status.success());
    let lines = String::from_utf8(shown.stdout).unwrap();
    let read = |line| serde_json::from_str(line).unwrap();
    lines.lines().map(read).collect()
}

fn check(lines: &[serde_json::Value]) {
    assert_eq!(lines.len(), 2, "{lines:?}");
    for line in lines {
        assert_eq!(line["scope"], "demo/backend/generate");
        assert_eq!(
            (&line["topic"], &line["payload"]["a"][0]),
            (&"odd.topic".into(), &1.into())
        );
    }
}

#[test]
fn tail_shows_what_publish_sends_directly() {
    let folder = tempfile::tempdir().unwrap();
    check(&shown(&[
        ("DYN_DISCOVERY_BACKEND", "file"),
        ("DYN_FILE_KV", folder.path().to_str().unwrap()),
        ("DYN_EVENT_PLANE_HOST", "127.0.0.1"),
    ]));
}

#[test]
fn tail_shows_what_publish_sends_through_a_broker() {
    let broker = Broker::start();
    check(&shown(&[("DYN_ZMQ_BROKER_URL", &broker.url())]));
}

#[test]
fn mistakes_are_told() {
    for (args, env, wanted) in [
        (vec!["--broker", "b:5555"], vec![], "names no broker"),
        (vec![], vec![("DYN_ZMQ_BROKER_URL", "")], "names no broker"),
        (
            vec![],
            vec![("DYN_EVENT_PLANE_HOST", "0.0.0.0")],
            "DYN_EVENT_PLANE_HOST",
        ),
        (vec![], vec![("DYN_EVENT_PLANE", "none")], "--plane zmq"),
        (vec!["--plane", "kafka"], vec![], "write zmq or nats"),
    ] {
        let mut tail = command(&["tail"], &env);
        let said = tail.args(&args).stderr(Stdio::piped()).output().unwrap();
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert_eq!(said.status.code(), Some(2), "{text}");
        assert!(text.contains(wanted), "{args:?} {env:?}: {text}");
    }
}
