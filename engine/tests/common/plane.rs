//! An event plane with a door of each kind, for its peers.

use std::net::SocketAddr;

use corelane_engine::config::RingKind;
use corelane_engine::events::{Command, Door, DoorKind, PlaneConfig, PlaneHandle, Security, spawn};
use corelane_engine::executor::listen;

/// A running plane, stopped when it is dropped.
pub struct Plane {
    pub handle: PlaneHandle,
    pub xsub: SocketAddr,
    pub xpub: SocketAddr,
    pub plain: SocketAddr,
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

impl Plane {
    /// A plane of few small buffers, changed as a test wants it.
    pub fn start(ring: RingKind, change: impl FnOnce(&mut PlaneConfig)) -> Plane {
        let mut config = PlaneConfig {
            buffers: 64,
            buffer_bytes: 4096,
            ..PlaneConfig::new(ring)
        };
        change(&mut config);
        let (xsub, publishers) = door(DoorKind::Publishers, 0);
        let (xpub, subscribers) = door(DoorKind::Subscribers, 0);
        let (plain, plain_door) = door(DoorKind::Plain, 0);
        Plane {
            handle: spawn(config, vec![publishers, subscribers, plain_door]).unwrap(),
            xsub,
            xpub,
            plain,
        }
    }

    pub fn tell(&self, command: Command) {
        assert!(self.handle.command(command).is_ok());
    }
}

/// A door on a free port of loopback.
pub fn door(kind: DoorKind, group: u16) -> (SocketAddr, Door) {
    let listener = listen("127.0.0.1:0".parse().unwrap(), false, false).unwrap();
    let address = listener.local_addr().unwrap();
    let door = Door {
        listener,
        kind,
        group,
        security: Security::Null,
    };
    (address, door)
}
