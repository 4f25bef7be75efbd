//! The engine's event plane as control holds it: started when it is first needed, told from any
//! thread, stopped with the process.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use corelane_engine::events::stats::Stats;
use corelane_engine::events::{self, Command, Group, PlaneConfig, PlaneHandle, Report, Until};
use corelane_engine::mesh::Sender;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use tokio::task::{spawn_blocking, spawn_local};

use super::super::EventsError;
use super::super::reports;
use crate::cores;

/// A command that the plane has no room for is tried again for so long.
const BUSY: Duration = Duration::from_secs(30);

/// The plane, from any thread.
pub(crate) struct Link {
    commands: Sender<Command>,
    closed: watch::Sender<bool>,
    /// Largest message, all of its parts counted.
    pub(super) event_bytes_max: usize,
}

impl Link {
    /// Hands a command over; waits while the plane's queue is full.
    ///
    /// # Errors
    /// The plane has been stopped, or is stuck.
    pub(super) async fn command(&self, mut command: Command) -> Result<(), EventsError> {
        let mut began = None;
        loop {
            if *self.closed.borrow() {
                return Err(EventsError::Closed);
            }
            match self.commands.send(command) {
                Ok(()) => return Ok(()),
                Err(back) => command = back,
            }
            // It empties its queue in each of its turns; whoever runs us may have no timers.
            if began.get_or_insert_with(Instant::now).elapsed() > BUSY {
                return Err(EventsError::Busy);
            }
            tokio::task::yield_now().await;
        }
    }

    /// Waits for the end of the plane.
    pub(super) async fn ended(&self) {
        // The sender is ours.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// Waits until something is so for a group; false when the time was over before.
    ///
    /// # Errors
    /// As [`Link::command`].
    pub(super) async fn ask(
        &self,
        group: Group,
        until: Until,
        within: Duration,
    ) -> Result<bool, EventsError> {
        let (answer, answered) = oneshot::channel();
        let answer = Box::new(move |is_so| {
            // Who has asked may be gone.
            let _ = answer.send(is_so);
        });
        self.command(Command::Ask {
            group,
            until,
            within,
            answer,
        })
        .await?;
        answered.await.map_err(|_| EventsError::Closed)
    }
}

/// The plane, on the control thread.
pub(super) struct Running {
    pub(super) link: Arc<Link>,
    pub(super) stats: Arc<Stats>,
    handle: RefCell<Option<PlaneHandle>>,
    groups: RefCell<HashSet<Group>>,
    last_group: Cell<Group>,
}

impl Running {
    /// Starts it. Needs a `LocalSet`.
    pub(super) fn start(config: PlaneConfig) -> Result<Rc<Self>, EventsError> {
        let event_bytes_max = config.event_bytes_max as usize;
        let handle = events::spawn(config, Vec::new()).map_err(EventsError::Plane)?;
        let wake = handle.reports.as_fd().try_clone_to_owned();
        let wake = wake.and_then(cores::register).map_err(EventsError::Plane)?;
        let this = Rc::new(Self {
            link: Arc::new(Link {
                commands: handle.commands(),
                closed: watch::Sender::new(false),
                event_bytes_max,
            }),
            stats: Arc::clone(&handle.stats),
            handle: RefCell::new(Some(handle)),
            groups: RefCell::default(),
            last_group: Cell::new(0),
        });
        spawn_local(read_reports(Rc::downgrade(&this), wake));
        Ok(this)
    }

    /// A number that nobody has; numbers that were given back are used again as late as can be.
    pub(super) fn group(&self) -> Result<Group, EventsError> {
        let mut groups = self.groups.borrow_mut();
        let mut group = self.last_group.get();
        for _ in 0..=Group::MAX {
            group = group.wrapping_add(1);
            if groups.insert(group) {
                self.last_group.set(group);
                return Ok(group);
            }
        }
        Err(EventsError::Busy)
    }

    pub(super) fn give_back(&self, group: Group) {
        self.groups.borrow_mut().remove(&group);
    }

    /// Empties queues for a second at most, and waits for the thread.
    pub(super) async fn stop(&self) {
        self.link.closed.send_replace(true);
        let handle = self.handle.borrow_mut().take();
        if let Some(mut handle) = handle {
            // It fails only when the thread has panicked, and that was printed.
            let _ = spawn_blocking(move || handle.stop()).await;
        }
    }

    fn reports(&self) -> Option<Vec<Report>> {
        let handle = self.handle.borrow();
        let reports = &handle.as_ref()?.reports;
        reports.clear_wake();
        Some(std::iter::from_fn(|| reports.next()).collect())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.link.closed.send_replace(true);
        if let Some(handle) = self.handle.get_mut() {
            // It ends by itself; nobody waits for it.
            let _ = handle.command(Command::Stop);
        }
    }
}

async fn read_reports(running: std::rc::Weak<Running>, wake: AsyncFd<OwnedFd>) {
    loop {
        let Ok(mut ready) = wake.readable().await else {
            return;
        };
        ready.clear_ready();
        let Some(running) = running.upgrade() else {
            return;
        };
        let Some(reports) = running.reports() else {
            return;
        };
        for report in &reports {
            if let Report::Stopped { failure } = report {
                running.link.closed.send_replace(true);
                if let Some(failure) = failure {
                    tracing::error!(failure, "events: the event plane has ended by itself");
                }
            }
            reports::tell(report);
        }
    }
}
