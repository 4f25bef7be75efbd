//! The process that lends memory, watched by a descriptor of the kernel's, so that its end is seen
//! and no other process that gets its number is taken for it.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::history::Peer;
use crate::lock::ClientId;

/// A process that lends memory of its own.
#[derive(Debug)]
pub struct Exporter {
    /// The session in which it did.
    pub session: ClientId,
    /// Who it is.
    pub peer: Peer,
    process: OwnedFd,
}

impl Exporter {
    /// Watches the process behind a session. None where the service cannot see it: it is gone, or
    /// lives in another pid namespace (where CUDA IPC would not work either).
    pub fn watch(session: ClientId, peer: Peer) -> Option<Exporter> {
        let pid = i32::try_from(peer.pid).ok().and_then(Pid::from_raw)?;
        let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        Some(Exporter {
            session,
            peer,
            process,
        })
    }

    /// Whether the process has not ended. One that is dead and not yet waited for has ended: its
    /// memory is gone.
    pub fn is_alive(&self) -> bool {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut watched = [PollFd::new(&self.process, PollFlags::IN)];
        match poll(&mut watched, Some(&now)) {
            Ok(_) => watched[0].revents().is_empty(),
            Err(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn peer(pid: u32) -> Peer {
        Peer { pid, uid: 0 }
    }

    #[test]
    fn the_end_of_a_process_is_seen_even_before_it_is_waited_for() {
        let mut child = Command::new("sleep").arg("600").spawn().expect("it starts");
        let exporter = Exporter::watch(ClientId(1), peer(child.id())).expect("it is visible");
        assert!(exporter.is_alive());
        child.kill().expect("ours");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while exporter.is_alive() {
            assert!(std::time::Instant::now() < deadline, "its end is not seen");
            std::thread::yield_now();
        }
        child.wait().expect("ours");
        assert!(!exporter.is_alive());
    }

    #[test]
    fn a_process_that_cannot_be_seen_lends_nothing() {
        assert!(Exporter::watch(ClientId(1), peer(0)).is_none());
        assert!(Exporter::watch(ClientId(1), peer(u32::MAX)).is_none());
    }
}
