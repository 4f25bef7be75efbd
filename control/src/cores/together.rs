//! What the cores have together: the address that they listen on, each other, and who waits for
//! them.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use corelane_engine::balance::Neighbour;
use corelane_engine::executor;
use corelane_engine::shard::Command;
use corelane_engine::steering::Program;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Core, Cores, CoresError};
use crate::preflight::Plan;
use crate::steering::{self, Placing};

impl Cores {
    /// Makes the cores known to each other where connections may go from one to the other: not to
    /// a core that listens by itself, nor from it. That they do is a setting of each, which may
    /// change.
    pub(super) async fn introduce(&self) {
        let meets = |core: &Core| {
            let planned = core.planned.borrow();
            let listens = planned.config.listen.is_some() || planned.config.handed.is_some();
            listens && !planned.alone
        };
        let neighbour = |core: &Core| {
            let handle = core.handle.borrow();
            Neighbour {
                stats: Arc::clone(&handle.stats),
                commands: handle.commands(),
            }
        };
        let others = |index: usize| match meets(&self.list[index]) {
            true => {
                let others = self.list.iter().enumerate();
                let others = others.filter(|(other, core)| *other != index && meets(core));
                others.map(|(_, core)| neighbour(core)).collect()
            }
            false => Vec::new(),
        };
        if self.list.iter().filter(|core| meets(core)).count() > 1 {
            self.tell_each(|index| Command::Neighbours(others(index)))
                .await;
        }
    }

    /// Has connections go to the cores by something else from now on.
    pub async fn steer(&self, wanted: Placing) {
        let handed = |core: &Core| core.planned.borrow().config.handed.is_some();
        let placing = steering::in_force(wanted, self.list.iter().any(handed));
        let by = placing.by.word();
        if !self.group.change(placing) {
            return;
        }
        tracing::info!(by, "steering has changed");
        self.group.tell();
        let member = |index: &usize| !self.list[*index].planned.borrow().alone;
        // One program is that of all who listen together.
        if let Some(index) = (0..self.list.len()).find(member) {
            let program = self.group.program(index).unwrap_or_else(Program::none);
            self.tell_one(index, Command::Steer(program)).await;
        }
    }
}

/// The kernel's answer in words.
pub(super) fn os(errno: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(errno)
}

/// The address to bind. Shards share their port with whoever of the same user asks for it, so a
/// port that another process has is found out by asking for it alone.
pub(super) fn wanted_address(plan: &Plan) -> Result<SocketAddr, CoresError> {
    let mut handed = plan
        .shards
        .iter()
        .filter_map(|shard| shard.config.handed.as_ref());
    if let Some(address) = handed.find_map(|socket| socket.local_addr().ok()) {
        return Ok(address);
    }
    let mut shared = plan.shards.iter().filter(|shard| !shard.alone);
    let listen = shared.find_map(|shard| shard.config.listen);
    let address = listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
    if address.port() != 0 {
        let alone = executor::listen(address, false, true);
        alone.map_err(|source| CoresError::Listen { address, source })?;
    }
    Ok(address)
}

/// A descriptor of theirs to be waited on by control.
#[expect(
    deprecated,
    reason = "sound for an OwnedFd, which is open and the same until dropped"
)]
pub(crate) fn register(wake: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(wake, Interest::READABLE)
}
