//! What the integration tests share: a service in a directory of its own, and a client that says
//! exactly the bytes that it is told to.

#![allow(dead_code, reason = "each test program uses a part of it")]

#[cfg(feature = "cuda")]
pub(crate) mod stand_in;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use corelane_gpu_mem::backend::Backend;
use corelane_gpu_mem::backend::host::{HostBackend, HostConfig};
use corelane_gpu_mem::client::{Dial, runtime_state};
use corelane_gpu_mem::domain::DomainConfig;
use corelane_gpu_mem::lock::{Grant, LockType, Profile};
use corelane_gpu_mem::protocol::fd_pass;
use corelane_gpu_mem::protocol::frame::{Cut, PREFIX_BYTES, REPLY_BYTES_MAX, cut};
use corelane_gpu_mem::protocol::v1::{
    AllocateRequest, AllocateResponse, GetRuntimeStateResponse, HandshakeRequest,
    HandshakeResponse, Reply, Request,
};
use corelane_gpu_mem::server::{PoolConfig, Server, ServerConfig, ServerHandle};

/// No condition of these tests takes longer on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const GPU: &str = "GPU-00000000-0000-0000-0000-000000000001";

/// A service with the pools of one GPU in both generations.
pub(crate) struct Service {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) handle: ServerHandle,
}

pub(crate) fn pools(dir: &Path, host: HostConfig) -> Vec<PoolConfig> {
    let backend = HostBackend::new(host).expect("a sane config");
    pools_on(dir, &|| Box::new(backend.clone()))
}

/// The same on any kind of memory.
pub(crate) fn pools_on(dir: &Path, backend: &dyn Fn() -> Box<dyn Backend>) -> Vec<PoolConfig> {
    let mut pools = Vec::new();
    for tag in ["weights", "kv_cache"] {
        for profile in [Profile::V1, Profile::V2] {
            let mut domain = DomainConfig::new(profile, GPU, tag);
            domain.retry_interval = Duration::from_millis(20);
            domain.retry_timeout = Some(Duration::from_millis(400));
            domain.server_nonce = "nonce".into();
            let name = match profile {
                Profile::V1 => format!("{tag}.sock"),
                Profile::V2 => format!("{tag}-v2.sock"),
            };
            pools.push(PoolConfig {
                path: dir.join(name),
                domain,
                backend: backend(),
                checkpoint_group: (profile == Profile::V2).then_some(0),
            });
        }
    }
    pools
}

impl Service {
    pub(crate) fn start() -> Service {
        Service::with(HostConfig::default(), |_| {})
    }

    pub(crate) fn with(host: HostConfig, change: impl FnOnce(&mut ServerConfig)) -> Service {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = ServerConfig::new(pools(dir.path(), host));
        change(&mut config);
        let handle = Server::start(config).expect("the service starts");
        Service { dir, handle }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn dial(&self, name: &str) -> Dial {
        Dial::new(self.path(name))
    }

    pub(crate) fn raw(&self) -> Raw {
        Raw::connect(&self.path("weights.sock"))
    }

    /// A raw client that holds the lock.
    pub(crate) fn holder(&self, lock_type: LockType) -> (Raw, Grant) {
        let mut raw = self.raw();
        let answer = raw.handshake(lock_type, Some(PATIENCE.as_millis() as i128));
        (raw, answer.granted_lock_type.expect("granted"))
    }

    pub(crate) fn state(&self) -> GetRuntimeStateResponse {
        runtime_state(&self.dial("weights.sock")).expect("the service answers")
    }

    /// Waits until the state is as wanted.
    pub(crate) fn until(&self, wanted: impl Fn(&GetRuntimeStateResponse) -> bool) {
        until(|| wanted(&self.state()), || format!("{:?}", self.state()));
    }
}

/// Waits for a condition, and says what there was instead when it never comes.
pub(crate) fn until(condition: impl Fn() -> bool, instead: impl Fn() -> String) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "it never came: {}", instead());
        thread::sleep(Duration::from_millis(1));
    }
}

/// A client without manners of its own.
pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    pub(crate) input: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

impl Raw {
    pub(crate) fn connect(path: &Path) -> Raw {
        let stream = UnixStream::connect(path).expect("the service listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Raw {
            stream,
            input: Vec::new(),
            descriptors: Vec::new(),
        }
    }

    pub(crate) fn say(&mut self, request: impl Into<Request>) {
        self.say_bytes(&request.into().encode());
    }

    pub(crate) fn say_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the service reads");
    }

    /// Says a payload as a frame.
    pub(crate) fn say_payload(&mut self, payload: &[u8]) {
        let len = u32::try_from(payload.len()).expect("short").to_be_bytes();
        self.say_bytes(&[&len[..], payload].concat());
    }

    /// The payload of the next frame; none at the end.
    pub(crate) fn hear_payload(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Cut::Frame(payload) = cut(&self.input, REPLY_BYTES_MAX) {
                let payload = payload.to_vec();
                self.input.drain(..PREFIX_BYTES + payload.len());
                return Some(payload);
            }
            let mut chunk = [0; 4096];
            match fd_pass::receive(&self.stream, &mut chunk) {
                Ok(received) if received.bytes > 0 => {
                    assert!(!received.too_many, "one descriptor at most");
                    self.descriptors.extend(received.descriptor);
                    self.input.extend_from_slice(&chunk[..received.bytes]);
                }
                Ok(_) | Err(rustix::io::Errno::CONNRESET) => return None,
                Err(errno) => panic!("no answer: {errno}"),
            }
        }
    }

    pub(crate) fn hear(&mut self) -> Option<Reply> {
        self.hear_payload()
            .map(|payload| Reply::decode(&payload).expect("a reply"))
    }

    pub(crate) fn ask(&mut self, request: impl Into<Request>) -> Reply {
        self.say(request);
        self.hear().expect("an answer")
    }

    pub(crate) fn handshake(
        &mut self,
        lock_type: LockType,
        timeout: Option<i128>,
    ) -> HandshakeResponse {
        match self.ask(HandshakeRequest {
            lock_type,
            timeout_ms: timeout,
        }) {
            Reply::Handshake(answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn allocate(&mut self, size: i128) -> AllocateResponse {
        match self.ask(AllocateRequest {
            size,
            tag: "t".into(),
        }) {
            Reply::Allocate(made) => made,
            other => panic!("{other:?}"),
        }
    }

    /// Whether the service has closed the connection, without a word.
    pub(crate) fn is_dropped(&mut self) -> bool {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
