//! The thread of the event plane.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::plane::Plane;
use super::stats::Stats;
use super::{Command, Door, PlaneConfig, Report};
use crate::buffers::Buffers;
use crate::config::{ANY_CPU, RingKind};
use crate::mesh::{self, Receiver, Sender};
use crate::ring::Ring;
use crate::ring::epoll::Epoll;
use crate::ring::uring::{Settings, Uring};

/// A running plane, as control holds it.
pub struct PlaneHandle {
    /// Its counters.
    pub stats: Arc<Stats>,
    /// What it tells; its descriptor is readable when there is something.
    pub reports: Receiver<Report>,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl PlaneHandle {
    /// Hands a command over.
    ///
    /// # Errors
    /// Gives it back when the plane does not keep up; try again later.
    pub fn command(&self, command: Command) -> Result<(), Box<Command>> {
        self.commands.send(command).map_err(Box::new)
    }

    /// Hands commands over from any thread, as long as the plane runs.
    pub fn commands(&self) -> Sender<Command> {
        self.commands.clone()
    }

    /// Whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Empties queues for a second at most, and waits for the thread.
    pub fn stop(&mut self) {
        let mut command = Command::Stop;
        while let Err(back) = self.commands.send(command) {
            if self.is_finished() {
                break;
            }
            command = back;
            std::thread::yield_now();
        }
        if let Some(thread) = self.thread.take() {
            // A panic was printed by its thread already.
            let _ = thread.join();
        }
    }
}

/// Starts the plane with these doors.
///
/// # Errors
/// No thread or eventfd can be made. Whatever fails later is reported as [`Report::Stopped`].
pub fn spawn(config: PlaneConfig, doors: Vec<Door>) -> io::Result<PlaneHandle> {
    let (commands, command_receiver) = mesh::lane()?;
    let (report_sender, reports) = mesh::lane()?;
    let stats = Arc::new(Stats::default());
    let of_thread = Arc::clone(&stats);
    let thread = std::thread::Builder::new()
        .name("events".to_owned())
        .spawn(move || {
            let last = report_sender.clone();
            let lanes = (command_receiver, report_sender);
            let failure = run(config, doors, of_thread, lanes).err();
            let failure = failure.map(|error| error.to_string());
            let _ = last.send(Report::Stopped { failure });
        })?;
    Ok(PlaneHandle {
        stats,
        reports,
        commands,
        thread: Some(thread),
    })
}

type Lanes = (Receiver<Command>, Sender<Report>);

fn run(config: PlaneConfig, doors: Vec<Door>, stats: Arc<Stats>, lanes: Lanes) -> io::Result<()> {
    if config.cpu != ANY_CPU {
        // Not being pinned costs speed and nothing else.
        match crate::placement::pin_current_thread(config.cpu) {
            Ok(()) => stats.plane.pinned.set(1),
            Err(error) => {
                let (cpu, why) = (config.cpu, error.to_string());
                let _ = lanes.1.send(Report::NotPinned { cpu, why });
            }
        }
    }
    let buffers = Buffers::new(config.buffers, config.buffer_bytes as usize)?;
    match config.ring {
        RingKind::Uring => {
            let settings = Settings {
                entries: 512,
                files: config.sessions_max,
            };
            let ring = Uring::new(settings, &buffers).map_err(io::Error::other)?;
            drive(config, ring, buffers, doors, stats, lanes)
        }
        RingKind::Epoll => {
            let ring = Epoll::new(&buffers)?;
            drive(config, ring, buffers, doors, stats, lanes)
        }
    }
}

fn drive<R: Ring>(
    config: PlaneConfig,
    ring: R,
    buffers: Buffers,
    doors: Vec<Door>,
    stats: Arc<Stats>,
    (commands, reports): Lanes,
) -> io::Result<()> {
    let mut plane = Plane::new(config, ring, buffers, stats, commands, reports);
    plane.start(doors);
    while !plane.is_over() {
        plane.tick()?;
    }
    plane.hang_up();
    Ok(())
}
