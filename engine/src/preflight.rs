//! What this host allows: whether io_uring can be used here and if not, why and what to do.
//!
//! Nothing is concluded from a kernel's version. The probe makes a small ring with all that a shard
//! uses and receives a byte through it; the files of the kernel only explain a refusal.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::buffers::Buffers;
use crate::operation::{Kind, Operation};
use crate::ring::uring::{Settings, Uring};
use crate::ring::{Event, Handle, Ring};

/// Locked memory that glommio wants to be allowed before it makes its rings: 512 KiB.
pub const MEMLOCK_NEEDED_BYTES: u64 = 512 * 1024;

/// Descriptors beside those of connections: rings, eventfds, listeners, logs, discovery, and the
/// files that libraries open for a moment.
pub const FILES_RESERVED: u64 = 256;

/// Why io_uring is not used, or that it can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nothing is in its way.
    Usable,
    /// The configuration asked for epoll.
    Configured,
    /// `kernel.io_uring_disabled` is 2: off for everybody.
    SysctlOff,
    /// `kernel.io_uring_disabled` is 1: only for CAP_SYS_ADMIN and one group of users.
    SysctlRestricted,
    /// The system call is filtered (the default profile of Docker, containerd and others).
    Seccomp,
    /// Refused with no filter and no sysctl: a security module.
    SecurityModule,
    /// The kernel has no io_uring.
    NoSystemCall,
    /// Too little memory may be locked; the limit in force, in bytes.
    Memlock {
        /// RLIMIT_MEMLOCK (soft), in bytes.
        soft_bytes: u64,
    },
    /// The kernel's io_uring is too old: what it lacks.
    MissingOperations(Vec<&'static str>),
    /// Something else went wrong at this step.
    Other {
        /// The step, in words.
        step: &'static str,
        /// The kernel's answer.
        errno: i32,
    },
}

impl Cause {
    /// One word for metrics and JSON.
    pub fn word(&self) -> &'static str {
        match self {
            Cause::Usable => "usable",
            Cause::Configured => "configured",
            Cause::SysctlOff | Cause::SysctlRestricted => "sysctl",
            Cause::Seccomp => "seccomp",
            Cause::SecurityModule => "security_module",
            Cause::NoSystemCall => "no_system_call",
            Cause::Memlock { .. } => "memlock",
            Cause::MissingOperations(_) => "missing_operations",
            Cause::Other { .. } => "other",
        }
    }

    /// What is the case, as a sentence without its full stop.
    pub fn explain(&self) -> String {
        match self {
            Cause::Usable => "io_uring can be used here".into(),
            Cause::Configured => "the configuration asks for epoll".into(),
            Cause::SysctlOff => "kernel.io_uring_disabled is 2, which switches io_uring off".into(),
            Cause::SysctlRestricted => "kernel.io_uring_disabled is 1, which allows io_uring only \
                 with CAP_SYS_ADMIN or to members of kernel.io_uring_group"
                .into(),
            Cause::Seccomp => {
                "a seccomp filter, usually the container's profile, refuses io_uring_setup".into()
            }
            Cause::SecurityModule => "io_uring_setup is not permitted although neither \
                 kernel.io_uring_disabled nor a seccomp filter is in force: a security module \
                 such as SELinux refuses it"
                .into(),
            Cause::NoSystemCall => "this kernel has no io_uring".into(),
            Cause::Memlock { soft_bytes } => format!(
                "RLIMIT_MEMLOCK is {} KiB, and the rings of a core need {} KiB",
                soft_bytes / 1024,
                MEMLOCK_NEEDED_BYTES / 1024
            ),
            Cause::MissingOperations(missing) => {
                format!("this kernel's io_uring lacks {}", missing.join(", "))
            }
            Cause::Other { step, errno } => {
                let error = io::Error::from_raw_os_error(*errno);
                format!("io_uring failed at {step}: {error}")
            }
        }
    }

    /// What to do about it, as a sentence; empty when there is nothing to do.
    pub fn remedy(&self) -> &'static str {
        match self {
            Cause::Usable | Cause::Configured => "",
            Cause::SysctlOff => {
                "Run `sysctl -w kernel.io_uring_disabled=0` on the host, and keep it in \
                 /etc/sysctl.d."
            }
            Cause::SysctlRestricted => {
                "Add this process's group as kernel.io_uring_group, or run \
                 `sysctl -w kernel.io_uring_disabled=0` on the host."
            }
            Cause::Seccomp => {
                "Start the container with a seccomp profile that allows io_uring_setup, \
                 io_uring_enter and io_uring_register."
            }
            Cause::SecurityModule => {
                "Allow io_uring to this process in the policy of the security module; its audit \
                 log names the rule."
            }
            Cause::NoSystemCall => "Run a kernel of 6.0 or later that is built with io_uring.",
            Cause::Memlock { .. } => {
                "Raise RLIMIT_MEMLOCK: `ulimit -l`, LimitMEMLOCK= of the systemd unit, or the \
                 container's `--ulimit memlock=-1`."
            }
            Cause::MissingOperations(_) => "Run a kernel of 6.0 or later.",
            Cause::Other { .. } => "Set `io = \"epoll\"` if it stays so.",
        }
    }
}

/// A limit of this process: in force (soft), and how far it may raise it (hard). `u64::MAX`: none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// In force.
    pub soft: u64,
    /// The most that this process may set.
    pub hard: u64,
}

impl Limit {
    fn of(resource: Resource) -> Limit {
        let limit = getrlimit(resource);
        Limit {
            soft: limit.current.unwrap_or(u64::MAX),
            hard: limit.maximum.unwrap_or(u64::MAX),
        }
    }
}

/// Raises the soft limits of open files and of locked memory to the hard ones, and says what is in
/// force then: (open files, bytes of locked memory). To be called once, before threads are made.
pub fn raise_limits() -> (Limit, Limit) {
    (raise(Resource::Nofile), raise(Resource::Memlock))
}

fn raise(resource: Resource) -> Limit {
    let maximum = getrlimit(resource).maximum;
    let current = maximum;
    // Up to the hard limit it is always allowed; a sandbox that refuses leaves what there is.
    let _ = setrlimit(resource, Rlimit { current, maximum });
    Limit::of(resource)
}

/// Something that will hurt later, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is the case.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// What the host allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// [`Cause::Usable`], or what stands in the way of io_uring.
    pub io_uring: Cause,
    /// The kernel's release, for the log only.
    pub kernel: String,
    /// RLIMIT_NOFILE.
    pub files: Limit,
    /// RLIMIT_MEMLOCK, in bytes.
    pub memlock_bytes: Limit,
}

impl Report {
    /// Whether the limit of open files is too low for `connections_max` connections on each of
    /// `shards` shards.
    pub fn too_few_files(&self, connections_max: u64, shards: u64) -> Option<Finding> {
        let connections = connections_max.saturating_mul(shards);
        let needed = connections.saturating_add(FILES_RESERVED);
        (self.files.soft < needed).then(|| Finding {
            what: format!(
                "RLIMIT_NOFILE is {} and {shards} cores with {connections_max} connections each \
                 need {needed}: connections beyond it will be refused",
                self.files.soft
            ),
            remedy: format!(
                "Raise it to {needed} (`ulimit -n`, LimitNOFILE= of the systemd unit, or the \
                 container's `--ulimit nofile={needed}`), or lower connections_max."
            ),
        })
    }
}

/// Looks at this host. Takes some milliseconds, and at most a second where io_uring hangs.
pub fn probe() -> Report {
    let memlock_bytes = Limit::of(Resource::Memlock);
    let evidence = Evidence {
        attempt: attempt_apart(),
        sysctl: read_number("/proc/sys/kernel/io_uring_disabled"),
        seccomp: status_number("Seccomp:").unwrap_or(0),
        memlock_soft_bytes: memlock_bytes.soft,
    };
    Report {
        io_uring: evidence.cause(),
        kernel: kernel_release(),
        files: Limit::of(Resource::Nofile),
        memlock_bytes,
    }
}

/// What a refusal is explained with.
struct Evidence {
    attempt: Result<(), Refusal>,
    /// `kernel.io_uring_disabled`; None: the kernel is older than it, or has no io_uring.
    sysctl: Option<u64>,
    /// `Seccomp:` in the process's status: 0 none, 1 strict, 2 a filter.
    seccomp: u64,
    memlock_soft_bytes: u64,
}

/// Where an attempt ended.
enum Refusal {
    Missing(Vec<&'static str>),
    Failed { step: &'static str, errno: i32 },
}

impl Evidence {
    fn cause(self) -> Cause {
        let memlock = Cause::Memlock {
            soft_bytes: self.memlock_soft_bytes,
        };
        match self.attempt {
            Ok(()) if self.memlock_soft_bytes < MEMLOCK_NEEDED_BYTES => memlock,
            Ok(()) => Cause::Usable,
            Err(Refusal::Missing(missing)) => Cause::MissingOperations(missing),
            Err(Refusal::Failed { step, errno }) => match errno {
                libc::EPERM | libc::EACCES => match (self.sysctl, self.seccomp) {
                    (Some(2), _) => Cause::SysctlOff,
                    (Some(1), _) => Cause::SysctlRestricted,
                    (_, 0) => Cause::SecurityModule,
                    _ => Cause::Seccomp,
                },
                // Some profiles answer so; the sysctl is there only if the kernel has io_uring.
                libc::ENOSYS if self.sysctl.is_some() && self.seccomp != 0 => Cause::Seccomp,
                libc::ENOSYS => Cause::NoSystemCall,
                libc::ENOMEM => memlock,
                errno => Cause::Other { step, errno },
            },
        }
    }
}

/// Attempts it on a thread of its own: the kernel takes a ring down after it was closed, and
/// interrupts system calls of the thread that made it meanwhile.
fn attempt_apart() -> Result<(), Refusal> {
    let step = "a thread for the attempt";
    let failed = |errno| Err(Refusal::Failed { step, errno });
    match thread::Builder::new().spawn(attempt) {
        Ok(attempt) => attempt.join().unwrap_or_else(|_| failed(libc::EIO)),
        Err(error) => failed(error.raw_os_error().unwrap_or(libc::EAGAIN)),
    }
}

/// Uses io_uring as a shard does, once.
fn attempt() -> Result<(), Refusal> {
    let failed = |step| {
        move |error: io::Error| Refusal::Failed {
            step,
            errno: error.raw_os_error().unwrap_or(libc::EIO),
        }
    };
    let plain = IoUring::new(8).map_err(failed("io_uring_setup"))?;
    let missing = missing_operations(&plain);
    drop(plain);
    if !missing.is_empty() {
        return Err(Refusal::Missing(missing));
    }
    let buffers = Buffers::new(2, 64).map_err(failed("memory for two buffers"))?;
    let (entries, files) = (8, 64);
    let mut ring = Uring::new(Settings { entries, files }, &buffers).map_err(|error| {
        match (error.step, error.source.raw_os_error()) {
            ("buffer ring", Some(libc::EINVAL)) => Refusal::Missing(vec!["buffer rings"]),
            _ => failed(error.step)(error.source),
        }
    })?;
    let step = "a first receive";
    match receive_a_byte(&mut ring).map_err(failed(step))? {
        Some(Event::Received { more: true, .. }) => Ok(()),
        Some(Event::Received { more: false, .. }) => {
            Err(Refusal::Missing(vec!["multishot receive"]))
        }
        Some(Event::ReceiveFailed { errno }) if errno == libc::EINVAL => {
            Err(Refusal::Missing(vec!["multishot receive"]))
        }
        Some(Event::ReceiveFailed { errno }) => Err(Refusal::Failed { step, errno }),
        _ => {
            let errno = libc::ETIMEDOUT;
            Err(Refusal::Failed { step, errno })
        }
    }
}

fn missing_operations(ring: &IoUring) -> Vec<&'static str> {
    let needed = [
        ("receive", opcode::RecvMulti::CODE),
        ("accept", opcode::AcceptMulti::CODE),
        ("send", opcode::Send::CODE),
        ("sendmsg", opcode::SendMsg::CODE),
        ("connect", opcode::Connect::CODE),
        ("poll", opcode::PollAdd::CODE),
        ("cancel", opcode::AsyncCancel::CODE),
        ("write from registered memory", opcode::WriteFixed::CODE),
    ];
    let mut probe = Probe::new();
    if ring.submitter().register_probe(&mut probe).is_err() {
        return vec!["the probe of operations"];
    }
    needed
        .into_iter()
        .filter(|(_, code)| !probe.is_supported(*code))
        .map(|(name, _)| name)
        .collect()
}

/// Receives one byte through the ring. None: it did not come within a second.
fn receive_a_byte(ring: &mut Uring) -> io::Result<Option<Event>> {
    let (ours, mut theirs) = UnixStream::pair()?;
    let (fd, slot) = (ours.as_raw_fd(), 0);
    let handle = Handle { fd, slot };
    ring.attach(handle);
    ring.receive(Operation::new(Kind::Receive, slot, 0), handle);
    theirs.write_all(b"?")?;
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        if let Some(completion) = ring.next_completion() {
            return Ok(Some(completion.event));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        ring.wait(left)?;
    }
}

fn kernel_release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn status_number(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().parse().ok()
}

/// What the configuration says about the ring: `auto`, `uring` or `epoll`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// io_uring if it can be used, epoll if not.
    Auto,
    /// io_uring or nothing.
    Uring,
    /// epoll.
    Epoll,
}

/// The word for the ring is not one of the three.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a way to do I/O; write auto, uring or epoll")]
pub struct UnknownIo(pub String);

impl FromStr for Io {
    type Err = UnknownIo;

    fn from_str(word: &str) -> Result<Io, UnknownIo> {
        match word {
            "auto" => Ok(Io::Auto),
            "uring" => Ok(Io::Uring),
            "epoll" => Ok(Io::Epoll),
            _ => Err(UnknownIo(word.to_owned())),
        }
    }
}

pub use crate::config::RingKind;

/// The ring and the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The ring.
    pub ring: RingKind,
    /// Why not the other one.
    pub cause: Cause,
    /// One line for the log: the choice, its cause and the remedy.
    pub explain: String,
}

/// io_uring was required and cannot be used (exit code 78).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("io_uring is required (`io = \"uring\"`) but {}. {}", cause.explain(), cause.remedy())]
pub struct UringRefused {
    /// Why.
    pub cause: Cause,
}

/// Chooses the ring.
///
/// # Errors
/// [`UringRefused`] when io_uring is required and the report says that it cannot be used.
pub fn choose(io: Io, report: &Report) -> Result<Choice, UringRefused> {
    let cause = match io {
        Io::Epoll => Cause::Configured,
        Io::Auto | Io::Uring => report.io_uring.clone(),
    };
    let explain = match (&cause, io) {
        (Cause::Usable, _) => "uring: io_uring can be used here".to_owned(),
        (_, Io::Uring) => return Err(UringRefused { cause }),
        _ => format!("epoll: {}. {}", cause.explain(), cause.remedy())
            .trim_end()
            .to_owned(),
    };
    let ring = match cause {
        Cause::Usable => RingKind::Uring,
        _ => RingKind::Epoll,
    };
    Ok(Choice {
        ring,
        cause,
        explain,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLENTY: u64 = 8 << 20;

    fn cause(errno: i32, sysctl: Option<u64>, seccomp: u64) -> Cause {
        let step = "io_uring_setup";
        Evidence {
            attempt: Err(Refusal::Failed { step, errno }),
            sysctl,
            seccomp,
            memlock_soft_bytes: PLENTY,
        }
        .cause()
    }

    fn report(io_uring: Cause) -> Report {
        let limit = Limit {
            soft: 1024,
            hard: 4096,
        };
        Report {
            io_uring,
            kernel: "6.1".into(),
            files: limit,
            memlock_bytes: limit,
        }
    }

    #[test]
    fn each_refusal_has_its_cause() {
        assert_eq!(cause(libc::EPERM, Some(2), 2), Cause::SysctlOff);
        assert_eq!(cause(libc::EPERM, Some(1), 0), Cause::SysctlRestricted);
        assert_eq!(cause(libc::EPERM, Some(0), 2), Cause::Seccomp);
        assert_eq!(cause(libc::EPERM, None, 2), Cause::Seccomp);
        assert_eq!(cause(libc::EACCES, Some(0), 0), Cause::SecurityModule);
        assert_eq!(cause(libc::ENOSYS, None, 0), Cause::NoSystemCall);
        assert_eq!(cause(libc::ENOSYS, Some(0), 2), Cause::Seccomp);
        let soft_bytes = PLENTY;
        assert_eq!(
            cause(libc::ENOMEM, Some(0), 0),
            Cause::Memlock { soft_bytes }
        );
        let other = cause(libc::EMFILE, Some(0), 0);
        assert!(other.explain().contains("io_uring_setup"), "{other:?}");
    }

    #[test]
    fn a_low_memlock_limit_counts_even_where_io_uring_works() {
        let with = |memlock_soft_bytes| Evidence {
            attempt: Ok(()),
            sysctl: Some(0),
            seccomp: 0,
            memlock_soft_bytes,
        };
        let soft_bytes = 64 << 10;
        assert_eq!(with(soft_bytes).cause(), Cause::Memlock { soft_bytes });
        assert_eq!(with(MEMLOCK_NEEDED_BYTES).cause(), Cause::Usable);
        assert_eq!(with(u64::MAX).cause(), Cause::Usable);
    }

    #[test]
    fn auto_falls_back_and_says_why() {
        let refused = report(Cause::SysctlOff);
        let choice = choose(Io::Auto, &refused).unwrap();
        assert_eq!(choice.ring, RingKind::Epoll);
        assert_eq!(choice.cause.word(), "sysctl");
        assert!(
            choice
                .explain
                .starts_with("epoll: kernel.io_uring_disabled is 2")
        );
        assert!(choice.explain.contains("sysctl -w"), "{}", choice.explain);

        let error = choose(Io::Uring, &refused).unwrap_err();
        assert!(error.to_string().contains("sysctl -w"), "{error}");

        let usable = report(Cause::Usable);
        for io in [Io::Auto, Io::Uring] {
            assert_eq!(choose(io, &usable).unwrap().ring, RingKind::Uring);
        }
        let asked = choose(Io::Epoll, &usable).unwrap();
        assert_eq!(
            (asked.ring, asked.cause),
            (RingKind::Epoll, Cause::Configured)
        );
        assert_eq!(asked.explain, "epoll: the configuration asks for epoll.");
    }

    #[test]
    fn every_cause_but_a_wish_has_a_remedy() {
        let causes = [
            Cause::SysctlOff,
            Cause::SysctlRestricted,
            Cause::Seccomp,
            Cause::SecurityModule,
            Cause::NoSystemCall,
            Cause::Memlock { soft_bytes: 1 },
            Cause::MissingOperations(vec!["accept", "poll"]),
            Cause::Other {
                step: "eventfd",
                errno: libc::EMFILE,
            },
        ];
        for cause in causes {
            assert!(cause.remedy().ends_with('.'), "{cause:?}");
            assert!(!cause.explain().ends_with('.'), "{cause:?}");
        }
    }

    #[test]
    fn words_are_read_and_others_refused() {
        assert_eq!("auto".parse(), Ok(Io::Auto));
        assert_eq!("uring".parse(), Ok(Io::Uring));
        assert_eq!("epoll".parse(), Ok(Io::Epoll));
        let error = "Uring".parse::<Io>().unwrap_err();
        assert!(error.to_string().contains("auto, uring or epoll"));
    }

    #[test]
    fn files_are_counted_over_all_shards() {
        let report = report(Cause::Usable);
        assert_eq!(report.too_few_files(384, 2), None);
        let finding = report.too_few_files(385, 2).unwrap();
        assert!(finding.what.contains("need 1026"), "{finding:?}");
        assert!(report.too_few_files(u64::MAX, 2).is_some());
    }

    #[test]
    fn the_probe_of_this_host_agrees_with_making_a_ring() {
        let report = probe();
        assert!(!report.kernel.is_empty());
        let buffers = Buffers::new(2, 64).unwrap();
        let (entries, files) = (8, 64);
        let made = Uring::new(Settings { entries, files }, &buffers).is_ok();
        let usable = report.io_uring == Cause::Usable;
        assert!(made || !usable, "{:?}", report.io_uring);
        assert_eq!(choose(Io::Uring, &report).is_ok(), usable);
        let (files, _) = raise_limits();
        assert_eq!(files.soft, files.hard);
    }
}
