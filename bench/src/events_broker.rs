//! The brokers that `events` compares: corelane, libzmq's proxy, nats-server; each on two free
//! ports, or one.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::cpu::{CpuRange, Usage};
use crate::events_load::Protocol;
use crate::servers::{Server, find_program, free_address, version_of};

/// Which broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Ours.
    Corelane,
    /// libzmq's XSUB/XPUB proxy.
    Libzmq,
    /// NATS.
    Nats,
}

impl Kind {
    /// As it stands in the table.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Corelane => "corelane",
            Self::Libzmq => "libzmq proxy",
            Self::Nats => "nats-server",
        }
    }

    /// What its clients speak.
    pub(crate) fn protocol(self) -> Protocol {
        match self {
            Self::Corelane | Self::Libzmq => Protocol::Zmtp,
            Self::Nats => Protocol::Nats,
        }
    }
}

/// A running broker.
pub(crate) struct Broker {
    /// Which one.
    pub(crate) kind: Kind,
    /// Its program's version.
    pub(crate) version: String,
    /// Where publishers connect.
    pub(crate) publish: SocketAddr,
    /// Where subscribers connect.
    pub(crate) subscribe: SocketAddr,
    server: Server,
}

impl Broker {
    /// CPU time of its process until now.
    pub(crate) fn usage(&self) -> Usage {
        Usage::of_tree(self.server.pid())
    }

    /// corelane with nothing but the broker.
    pub(crate) fn corelane(program: &Path, dir: &Path, cpus: Option<CpuRange>) -> Result<Self> {
        let (publish, subscribe) = (free_address()?, free_address()?);
        let file = dir.join("corelane-events.toml");
        let text = format!(
            "[server]\nstatus_port = -1\n[drain]\ngrace_s = 0\ntimeout_s = 1\n\
             [events]\nbroker = true\nxsub = \"tcp://{publish}\"\nxpub = \"tcp://{subscribe}\"\n"
        );
        fs::write(&file, text)?;
        let mut command = Command::new(program);
        command.args(["serve", "--config"]).arg(&file);
        let version = version_of(program, "--version");
        Self::start(
            Kind::Corelane,
            version,
            command,
            (publish, subscribe),
            dir,
            cpus,
        )
    }

    /// libzmq, as `python` has it.
    pub(crate) fn libzmq(python: &Path, dir: &Path, cpus: Option<CpuRange>) -> Result<Self> {
        let (publish, subscribe) = (free_address()?, free_address()?);
        let script = dir.join("zmq_proxy.py");
        fs::write(&script, include_str!("../zmq_proxy.py"))?;
        let asked = Command::new(python)
            .args(["-c", "import zmq; print('libzmq', zmq.zmq_version())"])
            .output()
            .with_context(|| format!("cannot run {}", python.display()))?;
        anyhow::ensure!(
            asked.status.success(),
            "{} has no pyzmq: name another with --python, or install it",
            python.display()
        );
        let version = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
        let mut command = Command::new(python);
        command.arg(&script);
        command.args([publish, subscribe].map(|address| format!("tcp://{address}")));
        Self::start(
            Kind::Libzmq,
            version,
            command,
            (publish, subscribe),
            dir,
            cpus,
        )
    }

    /// nats-server as it comes.
    pub(crate) fn nats(program: &Path, dir: &Path, cpus: Option<CpuRange>) -> Result<Self> {
        let address = free_address()?;
        let mut command = Command::new(program);
        command
            .args(["-a", "127.0.0.1", "-p"])
            .arg(address.port().to_string());
        let version = version_of(program, "--version");
        Self::start(Kind::Nats, version, command, (address, address), dir, cpus)
    }

    fn start(
        kind: Kind,
        version: String,
        command: Command,
        (publish, subscribe): (SocketAddr, SocketAddr),
        dir: &Path,
        cpus: Option<CpuRange>,
    ) -> Result<Self> {
        let name = kind.name().replace(' ', "-");
        let mut server = Server::start(&name, command, dir, cpus)?;
        server.wait_listening(publish)?;
        server.wait_listening(subscribe)?;
        Ok(Self {
            kind,
            version,
            publish,
            subscribe,
            server,
        })
    }
}

/// nats-server, wherever it is.
pub(crate) fn find_nats() -> Option<PathBuf> {
    find_program(Path::new("nats-server"))
}
