//! What several tests of this crate need of their surroundings.
#![allow(dead_code, reason = "each test file uses a part")]

use std::io::ErrorKind;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tokio::task::LocalSet;

/// Runs a test on the kind of runtime that the control core has.
pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, test);
}

/// Starts a quiet program; None, with a line that says so, when there is no such program.
pub(crate) fn if_there(command: &mut Command) -> Option<Child> {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null());
    match quiet.stderr(Stdio::null()).spawn() {
        Ok(child) => Some(child),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let program = command.get_program().display();
            eprintln!("skipped: there is no {program} on the path");
            None
        }
        Err(error) => panic!("{command:?} does not start: {error}"),
    }
}

/// Starts etcd on these ports of loopback, if there is one.
pub(crate) fn etcd(data: &Path, client_port: u16, peer_port: u16) -> Option<Child> {
    let [client, peer] = [client_port, peer_port].map(|port| format!("http://127.0.0.1:{port}"));
    let (client, peer) = (client.as_str(), peer.as_str());
    let mut command = Command::new("etcd");
    command.args(["--name", "test", "--data-dir"]).arg(data);
    command.args([
        "--listen-client-urls",
        client,
        "--advertise-client-urls",
        client,
    ]);
    command.args([
        "--listen-peer-urls",
        peer,
        "--initial-advertise-peer-urls",
        peer,
    ]);
    command.args(["--initial-cluster", &format!("test={peer}")]);
    if_there(command.env_remove("ETCD_UNSUPPORTED_ARCH"))
}
