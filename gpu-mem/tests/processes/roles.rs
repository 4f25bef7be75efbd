//! Processes that play roles, and the stage that they play on.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use corelane_gpu_mem::backend::choice::{BackendChoice, open};
use corelane_gpu_mem::backend::host::HostConfig;
use corelane_gpu_mem::client::{Dial, event_history, runtime_state};
use corelane_gpu_mem::domain::DomainConfig;
use corelane_gpu_mem::lock::Profile;
use corelane_gpu_mem::protocol::v1::GetRuntimeStateResponse;
use corelane_gpu_mem::server::{PoolConfig, Server, ServerConfig};

#[cfg(feature = "cuda")]
use crate::common::stand_in;
use crate::common::until;
use crate::share;

/// Where the service's memory comes from, and what goes wrong there.
pub(crate) struct Stage {
    dir: tempfile::TempDir,
    memory: &'static str,
    library: Option<tempfile::TempDir>,
    faults: Vec<(String, String)>,
}

impl Stage {
    pub(crate) fn host() -> Stage {
        Stage::new("host", None, &[])
    }

    /// On the machine's own driver.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu() -> Stage {
        Stage::new("cuda", None, &[])
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn stand_in(faults: &[(&str, &str)]) -> Stage {
        Stage::new("cuda", Some(stand_in::library()), faults)
    }

    fn new(
        memory: &'static str,
        library: Option<tempfile::TempDir>,
        faults: &[(&str, &str)],
    ) -> Stage {
        let owned = |(name, value): &(&str, &str)| (name.to_string(), value.to_string());
        Stage {
            dir: tempfile::tempdir().expect("a directory"),
            memory,
            library,
            faults: faults.iter().map(owned).collect(),
        }
    }

    /// Whether memory can be recognised by its file: everywhere but on a real GPU.
    pub(crate) fn has_files(&self) -> bool {
        self.memory == "host" || self.library.is_some()
    }

    pub(crate) fn dial(&self) -> Dial {
        Dial::new(self.dir.path().join("weights.sock"))
    }

    pub(crate) fn state(&self) -> GetRuntimeStateResponse {
        runtime_state(&self.dial()).expect("the service answers")
    }

    pub(crate) fn until(&self, wanted: impl Fn(&GetRuntimeStateResponse) -> bool) {
        until(|| wanted(&self.state()), || format!("{:?}", self.state()));
    }

    /// How often something happened to the pool.
    pub(crate) fn events(&self, kind: &str) -> usize {
        let events = event_history(&self.dial()).expect("the service answers");
        events.iter().filter(|event| event.kind == kind).count()
    }

    /// Starts the service, with this stage's faults.
    pub(crate) fn serve(&self) -> Role {
        self.serve_with(&[])
    }

    pub(crate) fn serve_with(&self, more: &[(&str, &str)]) -> Role {
        let faults = self.faults.iter().map(|(n, v)| (n.as_str(), v.as_str()));
        let all: Vec<_> = faults.chain(more.iter().copied()).collect();
        let mut service = self.start("serve", &all);
        service.hear("serving");
        service
    }

    /// Starts a role.
    pub(crate) fn start(&self, role: &str, more: &[(&str, &str)]) -> Role {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command
            .args([
                "--exact",
                "a_role_is_played",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("ROLE", role)
            .env("DIR", self.dir.path())
            .env("MEMORY", self.memory)
            .envs(more.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(library) = &self.library {
            command.env("LD_LIBRARY_PATH", library.path());
        }
        let mut child = command.spawn().expect("it starts");
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Role {
            child,
            stdin,
            stdout,
        }
    }
}

/// A child that plays a role; killed when this is dropped.
pub(crate) struct Role {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Role {
    /// Waits until it says this, and answers the whole line.
    pub(crate) fn hear(&mut self, words: &str) -> String {
        let mut line = String::new();
        while self.stdout.read_line(&mut line).expect("it speaks") > 0 {
            if line.contains(words) {
                return line;
            }
            line.clear();
        }
        panic!("it ended without saying {words}");
    }

    /// Lets it go on.
    pub(crate) fn tell(&mut self) {
        let stdin = self.stdin.as_mut().expect("open");
        stdin.write_all(b"go\n").expect("it listens");
    }

    /// Lets it go on until it says this.
    pub(crate) fn ask(&mut self, words: &str) -> String {
        self.tell();
        self.hear(words)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a good end.
    pub(crate) fn finish(mut self) {
        self.stdin = None;
        self.hear("test result: ok");
        assert!(self.child.wait().expect("it ended").success());
    }

    /// Waits for any end.
    pub(crate) fn end(mut self) -> ExitStatus {
        self.stdin = None;
        self.child.wait().expect("it ended")
    }

    /// SIGKILL; what it had is gone when this returns.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("ours");
        self.child.wait().expect("ours");
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A child says something to its parent.
pub(crate) fn say(words: &str) {
    println!("{words}");
    std::io::stdout().flush().expect("somebody listens");
}

/// A child waits until its parent lets it go on.
pub(crate) fn wait_for_word() {
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut line)
        .expect("somebody speaks");
}

/// A number from the environment of a role.
pub(crate) fn number(name: &str) -> u64 {
    let text = std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    text.parse().unwrap_or_else(|_| panic!("{name}={text}"))
}

/// In a child: plays what it was started for.
pub(crate) fn play() {
    let (Ok(role), Some(dir)) = (std::env::var("ROLE"), std::env::var_os("DIR")) else {
        return;
    };
    let dial = Dial::new(Path::new(&dir).join("weights.sock"));
    let on_host = std::env::var("MEMORY").is_ok_and(|memory| memory == "host");
    match role.as_str() {
        "serve" => serve(&dial, on_host),
        #[cfg(feature = "cuda")]
        "identify" => identify(),
        #[cfg(feature = "cuda")]
        "ask" => crate::strict::ask(),
        #[cfg(feature = "cuda")]
        "lend" => crate::ipc::lend(&dial),
        #[cfg(feature = "cuda")]
        "borrow" => crate::ipc::borrow(dial),
        #[cfg(feature = "cuda")]
        "free too early" => crate::ipc::free_too_early(&dial),
        #[cfg(feature = "cuda")]
        "pin" => crate::pinned::pin(),
        role if on_host => share::play::<share::Host>(role, dial),
        #[cfg(feature = "cuda")]
        role => share::play::<share::Cuda>(role, dial),
        #[cfg(not(feature = "cuda"))]
        role => panic!("no such role: {role}"),
    }
}

#[cfg(feature = "cuda")]
fn identify() {
    use corelane_gpu_mem::backend::cuda::gpu_uuid;
    let id = |ordinal| gpu_uuid(ordinal).expect("there is one");
    say(&format!("GPUs: {} {}", id(0), id(1)));
    say(&format!(
        "no third: {}",
        gpu_uuid(2).expect_err("it is masked")
    ));
}

fn serve(dial: &Dial, on_host: bool) {
    let choice = match on_host {
        true => BackendChoice::Host,
        false => BackendChoice::Cuda,
    };
    let opened = open(choice, 0, HostConfig::default()).expect("there is memory");
    assert!(opened.gpu_uuid.starts_with("GPU-") && opened.gpu_uuid.len() == 40);
    #[cfg(feature = "cuda")]
    if !on_host {
        use corelane_gpu_mem::backend::cuda::{CudaBackend, CudaError};
        let none = CudaBackend::new(99).err();
        let named = matches!(none, Some(CudaError::NoDevice { ordinal: 99, .. }));
        assert!(named, "{none:?}");
    }
    let mut domain = DomainConfig::new(Profile::V1, &opened.gpu_uuid, "weights");
    domain.retry_interval = Duration::from_millis(20);
    if let Ok(ms) = std::env::var("RETRY_TIMEOUT_MS") {
        domain.retry_timeout = Some(Duration::from_millis(ms.parse().expect("a number")));
    }
    let pool = PoolConfig {
        path: dial.path.clone(),
        domain,
        backend: opened.backend(),
        checkpoint_group: None,
    };
    let handle = Server::start(ServerConfig::new(vec![pool])).expect("the service starts");
    say("serving");
    wait_for_word();
    drop(handle);
}
