//! Processes that a run needs: start them on loopback, wait until they answer, stop them whatever
//! happens. Each ends with the bench, even if that is killed.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use crate::cpu::CpuRange;
use crate::interrupt::wait_for;

/// How long a server may take until it answers.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Variables that would change what a child does; a bench starts from none of them.
const DROPPED_VARIABLES: [&str; 6] = ["DYN_", "NATS_", "ETCD_", "OTEL_", "RUST_", "CORELANE_"];

/// A running child; dropping it stops it.
pub(crate) struct Server {
    name: String,
    child: Child,
    /// Its standard output.
    pub(crate) stdout: PathBuf,
    log: PathBuf,
}

impl Server {
    /// Starts `command`, its output in files of `dir`. Call it from the main thread: a child gets
    /// SIGTERM when the thread that started it ends.
    pub(crate) fn start(
        name: &str,
        mut command: Command,
        dir: &Path,
        cpus: Option<CpuRange>,
    ) -> Result<Self> {
        let stdout = dir.join(format!("{name}.out"));
        let log = dir.join(format!("{name}.log"));
        clean_environment(&mut command);
        // In a group of its own: Ctrl-C in a terminal is for us, and we end it in order.
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).context("cannot make a log file")?)
            .stderr(File::create(&log).context("cannot make a log file")?);
        // SAFETY: between fork and exec only system calls are made: no allocation, no lock.
        unsafe {
            command.pre_exec(move || {
                set_parent_process_death_signal(Some(Signal::TERM))?;
                cpus.map_or(Ok(()), CpuRange::bind_this_thread)
            });
        }
        let program = command.get_program().display().to_string();
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        Ok(Self {
            name: name.into(),
            child,
            stdout,
            log,
        })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// An error with the end of its output if it has ended.
    pub(crate) fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!(
                "{} ended with {status}; its last words:\n{}",
                self.name,
                self.last_words()
            );
        }
        Ok(())
    }

    /// Waits until `ready` has an answer or the server ends.
    pub(crate) fn wait_until<T>(
        &mut self,
        what: &str,
        mut ready: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        let what = format!("{} {what}", self.name);
        wait_for(&what, START_LIMIT, || {
            self.check_alive()?;
            Ok(ready())
        })
        .map_err(|error| match self.check_alive() {
            // Its last words are in the error already.
            Err(_) => error,
            Ok(()) => error.context(format!(
                "last words of {}:\n{}",
                self.name,
                self.last_words()
            )),
        })
    }

    /// Waits until something listens on `address`.
    pub(crate) fn wait_listening(&mut self, address: SocketAddr) -> Result<()> {
        self.wait_until(&format!("to listen on {address}"), || {
            TcpStream::connect_timeout(&address, Duration::from_secs(1))
                .ok()
                .map(drop)
        })
    }

    /// Waits for the program to end by itself, at most `limit`.
    pub(crate) fn wait_end(&mut self, limit: Duration) -> Result<()> {
        let what = format!("{} to end", self.name);
        let status = wait_for(&what, limit, || Ok(self.child.try_wait()?))?;
        if !status.success() {
            bail!(
                "{} ended with {status}; its last words:\n{}",
                self.name,
                self.last_words()
            );
        }
        Ok(())
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.pid()).ok().and_then(Pid::from_raw) {
            // It may have ended meanwhile, which is what the signal is for.
            let _ = kill_process(pid, signal);
        }
    }

    /// The end of what it printed.
    fn last_words(&self) -> String {
        let read = |file: &Path| {
            let bytes = fs::read(file).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let text = read(&self.stdout) + &read(&self.log);
        let lines: Vec<&str> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(15)..];
        if last.is_empty() {
            "(nothing)".into()
        } else {
            last.join("\n")
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        self.signal(Signal::TERM);
        let deadline = Instant::now() + STOP_LIMIT;
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        eprintln!(
            "{} did not stop in {} s: killed",
            self.name,
            STOP_LIMIT.as_secs()
        );
        // Both fail only if it is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn clean_environment(command: &mut Command) {
    let given: Vec<_> = command
        .get_envs()
        .map(|(name, _)| name.to_owned())
        .collect();
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let is_dropped = DROPPED_VARIABLES
            .iter()
            .any(|family| text.starts_with(family));
        if is_dropped && !given.contains(&name) {
            command.env_remove(&name);
        }
    }
}

/// A port of 127.0.0.1 that was free a moment ago.
pub(crate) fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port")?;
    Ok(listener.local_addr()?)
}

/// Where `name` lies: itself if it is a path, else on PATH and in the directories of system
/// programs, which PATH may lack.
pub(crate) fn find_program(name: &Path) -> Option<PathBuf> {
    if name.components().count() > 1 {
        return name.is_file().then(|| name.to_path_buf());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// The first line that a program prints when asked for its version.
pub(crate) fn version_of(program: &Path, flag: &str) -> String {
    let Ok(output) = Command::new(program).arg(flag).output() else {
        return "unknown".into();
    };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    text.lines().next().unwrap_or("unknown").trim().to_string()
}

/// The body of a GET, whatever its status; for status pages on loopback.
pub(crate) fn http_get(address: SocketAddr, path: &str) -> Result<String> {
    let limit = Duration::from_secs(1);
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.take(1 << 20).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (_, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    Ok(body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_ends_is_reported_with_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such luck >&2; exit 3"]);
        let mut server = Server::start("broken", command, dir.path(), None).unwrap();
        let error = server.wait_until("to be ready", || None::<()>).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("no such luck") && text.contains("exit status: 3"),
            "{text}"
        );
    }

    #[test]
    fn dropping_a_server_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        let server = Server::start("sleeper", command, dir.path(), None).unwrap();
        let place = PathBuf::from(format!("/proc/{}", server.pid()));
        assert!(place.exists());
        drop(server);
        assert!(!place.exists());
    }

    #[test]
    fn programs_are_found_by_name_and_by_path() {
        let shell = find_program(Path::new("sh")).unwrap();
        assert_eq!(find_program(&shell), Some(shell));
        assert_eq!(find_program(Path::new("no-such-program-here")), None);
        assert_eq!(find_program(Path::new("/no/such/program")), None);
    }
}
