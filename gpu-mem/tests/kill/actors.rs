//! Who plays in these tests: the service in a process of its own, and clients that obey letters.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use corelane_gpu_mem::client::{Dial, runtime_state};
use corelane_gpu_mem::lock::{Grant, LockType};
use corelane_gpu_mem::protocol::v1::{
    AllocateRequest, Bytes, CommitLayoutRequest, CommitRequest, ExportAllocationRequest,
    GetLockStateRequest, HandshakeRequest, ListAllocationsRequest, MetadataPutRequest, Reply,
    Request,
};

use crate::common::{PATIENCE, Raw, until};

/// Whose memory a service lends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Memory {
    Host,
    /// The host's, lent by a service that may have few descriptors under way.
    Confined,
    /// A GPU's that the stand-in for the driver plays.
    #[cfg(feature = "cuda")]
    StandIn,
}

/// The service in another process, killed when this is dropped.
pub(crate) struct Service {
    dir: tempfile::TempDir,
    pub(crate) child: Child,
    /// Descriptors of a service with nobody and nothing in it.
    baseline: usize,
    /// The size of its blocks.
    pub(crate) block_bytes: u64,
    _library: Option<tempfile::TempDir>,
}

impl Service {
    pub(crate) fn start() -> Service {
        Service::on(Memory::Host)
    }

    pub(crate) fn on(memory: Memory) -> Service {
        let dir = tempfile::tempdir().expect("a directory");
        let program = std::env::current_exe().expect("this program");
        let mut command = Command::new(program);
        command.arg("--serve").arg(dir.path()).stdin(Stdio::null());
        let library = match memory {
            Memory::Host | Memory::Confined => None,
            #[cfg(feature = "cuda")]
            Memory::StandIn => Some(crate::common::stand_in::library()),
        };
        if memory == Memory::Confined {
            command.arg("confined");
        }
        if let Some(library) = &library {
            command.arg("cuda").env("LD_LIBRARY_PATH", library.path());
        }
        let mut service = Service {
            dir,
            child: command.spawn().expect("it starts"),
            baseline: 0,
            block_bytes: if library.is_some() { 2 << 20 } else { 4096 },
            _library: library,
        };
        runtime_state(&service.dial()).expect("the service answers");
        until(
            || service.descriptors() == service.settled(),
            || "descriptors come and go".into(),
        );
        service.baseline = service.descriptors();
        service
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("weights.sock")
    }

    pub(crate) fn dial(&self) -> Dial {
        Dial::new(self.path())
    }

    fn descriptors(&self) -> usize {
        let dir = format!("/proc/{}/fd", self.child.id());
        std::fs::read_dir(dir).expect("the service lives").count()
    }

    /// The count once the probe's own connection is gone: seen twice, a moment apart.
    fn settled(&self) -> usize {
        let before = self.descriptors();
        std::thread::sleep(Duration::from_millis(2));
        before.max(self.descriptors())
    }

    /// Stops the service in its tracks: it does nothing more when this returns.
    pub(crate) fn stop(&self) {
        let (pid, mut status) = (self.child.id() as i32, 0);
        // SAFETY: the child is ours and was not waited for; the pointer is to a live value.
        let answer = unsafe {
            libc::kill(pid, libc::SIGSTOP);
            libc::waitpid(pid, &raw mut status, libc::WUNTRACED)
        };
        assert!(answer == pid && libc::WIFSTOPPED(status), "it stops");
    }

    pub(crate) fn go_on(&self) {
        // SAFETY: the child is ours and was not waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGCONT) };
    }

    /// Waits until nothing is open but these.
    pub(crate) fn until_descriptors(&self, more: usize) {
        let wanted = self.baseline + more;
        until(
            || self.descriptors() == wanted,
            || format!("{} descriptors, not {wanted}", self.descriptors()),
        );
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A forked client.
pub(crate) struct Client {
    pub(crate) pid: i32,
    orders: UnixStream,
}

/// Forks. The closure runs in the child, which never returns from here.
pub(crate) fn fork(child: impl FnOnce()) -> i32 {
    // SAFETY: this program has one thread, so the child may do anything.
    match unsafe { libc::fork() } {
        -1 => panic!("fork failed"),
        0 => {
            // SAFETY: whatever goes wrong, nobody stays behind for long.
            unsafe { libc::alarm(CHILD_SECONDS_MAX) };
            child();
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(0) }
        }
        pid => pid,
    }
}

pub(crate) fn wait(pid: i32) -> ExitStatus {
    let mut status = 0;
    // SAFETY: the child is ours; the pointer is to a live value.
    let answer = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(answer, pid);
    ExitStatus::from_raw(status)
}

impl Client {
    pub(crate) fn new(socket: &Path) -> Client {
        let (orders, theirs) = UnixStream::pair().expect("a pair");
        orders.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let parent = orders.as_raw_fd();
        let pid = fork(|| {
            // SAFETY: the child ends with its parent, and does not keep the parent's end open.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::close(parent);
            }
            obey(theirs, socket);
        });
        Client { pid, orders }
    }

    pub(crate) fn order(&mut self, letter: u8) {
        self.orders.write_all(&[letter]).expect("it listens");
    }

    /// Gives an order and waits for its result.
    pub(crate) fn done(&mut self, letter: u8) -> u8 {
        self.order(letter);
        self.report()
    }

    pub(crate) fn report(&mut self) -> u8 {
        self.try_report().expect("it reports")
    }

    pub(crate) fn try_report(&mut self) -> std::io::Result<u8> {
        let mut byte = [0];
        self.orders.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    /// Kills it and waits until the kernel has closed all that it had.
    pub(crate) fn kill(self) {
        self.kill_only();
        wait(self.pid);
    }

    pub(crate) fn kill_only(&self) {
        // SAFETY: the child is ours and was not waited for.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }
}

/// A client's life: one letter, one act, one letter back.
fn obey(mut orders: UnixStream, socket: &Path) {
    let mut raw = Raw::connect(socket);
    let mut letter = [0];
    while orders.read_exact(&mut letter).is_ok() {
        let report = act(letter[0], &mut raw);
        if let Some(report) = report {
            let _ = orders.write_all(&[report]);
        }
    }
}

fn act(letter: u8, raw: &mut Raw) -> Option<u8> {
    let handshake = |lock_type| HandshakeRequest {
        lock_type,
        timeout_ms: None,
    };
    match letter {
        b'W' => raw.say(handshake(LockType::Rw)),
        b'R' => raw.say(handshake(LockType::Ro)),
        b'O' => raw.say(handshake(LockType::RwOrRo)),
        b'D' => raw.say(handshake(LockType::RwDataOrRw)),
        b'?' => match raw.hear() {
            Some(Reply::Handshake(answer)) => return Some(grant_letter(answer.granted_lock_type?)),
            other => panic!("{other:?}"),
        },
        b'a' => {
            return Some(kind(&raw.ask(AllocateRequest {
                size: 1,
                tag: "t".into(),
            })));
        }
        b'm' => {
            let Reply::ListAllocations(list) = raw.ask(ListAllocationsRequest { tag: None }) else {
                return Some(b'e');
            };
            let Some(first) = list.allocations.first() else {
                return Some(b'-');
            };
            return Some(kind(&raw.ask(put(&first.allocation_id))));
        }
        b'c' => return Some(kind(&raw.ask(CommitRequest {}))),
        b'l' => return Some(kind(&raw.ask(CommitLayoutRequest {}))),
        b'C' => raw.say(CommitRequest {}),
        b'A' => raw.say(AllocateRequest {
            size: 1,
            tag: "t".into(),
        }),
        b'h' => {
            let frame = Request::from(put("half")).encode();
            raw.say_bytes(&frame[..frame.len() / 2]);
        }
        b'H' => {
            let frame = Request::from(handshake(LockType::Rw)).encode();
            raw.say_bytes(&frame[..frame.len() / 2]);
        }
        b'x' => {
            let Reply::ListAllocations(list) = raw.ask(ListAllocationsRequest { tag: None }) else {
                return Some(b'e');
            };
            for found in list.allocations {
                raw.say(ExportAllocationRequest {
                    allocation_id: found.allocation_id,
                });
            }
        }
        b's' => return Some(kind(&raw.ask(GetLockStateRequest {}))),
        other => panic!("no such order: {other}"),
    }
    Some(b'.')
}

fn put(id: &str) -> MetadataPutRequest {
    let (key, allocation_id) = ("k".into(), id.into());
    MetadataPutRequest {
        key,
        allocation_id,
        offset_bytes: 0,
        value: Bytes(vec![0; 64]),
    }
}

fn kind(reply: &Reply) -> u8 {
    if matches!(reply, Reply::Error(_)) {
        b'e'
    } else {
        b'.'
    }
}

pub(crate) fn grant_letter(grant: Grant) -> u8 {
    match grant {
        Grant::Rw => b'w',
        Grant::RwData => b'd',
        Grant::Ro => b'r',
    }
}

const CHILD_SECONDS_MAX: u32 = 600;
