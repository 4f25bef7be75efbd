//! Runs the independent peer (`tests/peer/peer.py`, built on msgspec) against a service.

mod common;

use std::path::Path;
use std::process::Command;

use common::Service;

#[test]
fn an_independent_peer_finds_every_answer_right() {
    let Some(python) = std::env::var_os("CORELANE_TEST_PYTHON").filter(|path| !path.is_empty())
    else {
        println!("left out: CORELANE_TEST_PYTHON names no interpreter that has msgspec");
        return;
    };
    let service = Service::start();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peer/peer.py");
    let done = Command::new(python)
        .arg(script)
        .arg(service.dir.path())
        .output();
    let done = done.expect("the interpreter runs");
    let (out, err) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    assert!(done.status.success(), "{out}\n{err}");
    assert!(out.contains("all answers were right"), "{out}\n{err}");
}
