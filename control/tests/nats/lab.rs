//! A NATS server of a test's own.

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use corelane::nats::NatsOptions;
use tempfile::TempDir;

/// The longest that anything here may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(300);

/// Debian puts it where only root looks.
const PLACES: [&str; 3] = ["nats-server", "/usr/sbin/nats-server", "/sbin/nats-server"];

/// Ends with the test.
pub(crate) struct NatsServer {
    child: Child,
    port: u16,
    folder: TempDir,
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn spawn(folder: &Path, port: u16, jetstream: bool) -> Option<Child> {
    for place in PLACES {
        let mut command = Command::new(place);
        let port = port.to_string();
        command.args(["-a", "127.0.0.1", "-p", &port, "-c", "nats.conf"]);
        if jetstream {
            command.args(["-js", "-sd", "store"]);
        }
        command.current_dir(folder);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        match command.spawn() {
            Ok(child) => return Some(child),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => panic!("{place} does not start: {error}"),
        }
    }
    None
}

impl NatsServer {
    /// A server that lets everybody in, with JetStream.
    pub(crate) fn start() -> NatsServer {
        let folder = tempfile::tempdir().unwrap();
        NatsServer::with(folder, "", true)
    }

    /// A server with this configuration, which may name files of `folder`.
    pub(crate) fn configured(folder: TempDir, configuration: &str) -> NatsServer {
        NatsServer::with(folder, configuration, false)
    }

    fn with(folder: TempDir, configuration: &str, jetstream: bool) -> NatsServer {
        std::fs::write(folder.path().join("nats.conf"), configuration).unwrap();
        // Another process may take the port between our look and the server's.
        for _ in 0..10 {
            let port = free_port();
            let Some(child) = spawn(folder.path(), port, jetstream) else {
                panic!(
                    "there is no nats-server; install Debian's package nats-server, or run \
                     scripts/test install"
                );
            };
            let mut child = child;
            let began = Instant::now();
            while child.try_wait().unwrap().is_none() {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    return NatsServer {
                        child,
                        port,
                        folder,
                    };
                }
                assert!(began.elapsed() < DEADLINE, "nats-server does not listen");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        panic!("nats-server ends at once; is its configuration right?\n{configuration}");
    }

    /// Ends it, as a power cut would.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again at the same port.
    pub(crate) fn again(&mut self) {
        let began = Instant::now();
        loop {
            // The port may still be in use for a moment.
            self.child = spawn(self.folder.path(), self.port, false).unwrap();
            while self.child.try_wait().unwrap().is_none() {
                if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(began.elapsed() < DEADLINE, "nats-server does not come back");
        }
    }

    /// Its folder.
    pub(crate) fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// Its URL, of this scheme.
    pub(crate) fn url(&self, scheme: &str) -> String {
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// How it is reached by those who say nothing about themselves.
    pub(crate) fn options(&self) -> NatsOptions {
        NatsOptions::server(self.url("nats"))
    }
}

/// Runs a test inside a `LocalSet`, bounded.
pub(crate) fn run(test: impl Future<Output = ()>) {
    let tokio = tokio::runtime::Builder::new_current_thread();
    let tokio = { tokio }.enable_all().build().unwrap();
    let bounded = async { tokio::time::timeout(DEADLINE, test).await.expect("in time") };
    tokio::task::LocalSet::new().block_on(&tokio, bounded);
}
