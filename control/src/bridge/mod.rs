//! The bridge of events: what comes on one side, NATS, our own broker's peers or another broker,
//! reaches each other side once.
//!
//! ```text
//!  our publishers, subscribers (ZMTP, plain TCP)  <-- doors -->.
//!                                                              |  course: where to?
//!  NATS: namespace.>                              <-- nats --->+  outboxes: bounded
//!                                                              |
//!  another broker's xsub and xpub                 <-- zmq ---->'
//! ```
//!
//! Two things keep an event from going round: a mark of the sides that it has been to
//! (`corelane_codec::event::origin`), which stock peers ignore, and a memory of the last events of
//! each side. Where several bridges join the same sides, one of them is each publisher's
//! (`members`).

mod course;
mod members;
mod metrics;
mod on_nats;
mod outbox;

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use corelane_codec::event::origin::Origin;
use corelane_codec::event::{Envelope, encode_segment, frame};
use corelane_engine::events::{Command, Group, LocalEvent, Security, Side};
use corelane_engine::mesh::{self, Receiver, Sender};
use sha2::{Digest, Sha256};
use tokio::io::unix::AsyncFd;
use tokio::task::{JoinSet, yield_now};
use tokio::time::{sleep, timeout};

use self::course::Course;
use self::members::Members;
use self::outbox::{Outbox, Parcel};
use crate::broker::Broker;
use crate::config::BridgeConfig;
use crate::cores;
use crate::discovery::random_id;
use crate::events::Numbers;
use crate::nats::{Nats, NatsOptions};

/// Events of the plane that wait for us; what finds no room is counted there
/// (`corelane_events_dropped_local_total`).
const LANE_EVENTS: usize = 16_384;
/// Events that are taken from the plane before others have a turn.
const TURN: usize = 128;
/// The plane does not keep up: it is tried again after this.
const AGAIN_AFTER: Duration = Duration::from_millis(1);
/// What waits at the end is sent for so long.
const LINGER: Duration = Duration::from_secs(1);
/// Groups of the plane: its own doors, and the two ways of another broker, which must not see
/// each other's events.
const DOORS: Group = 0;
const OTHER_IN: Group = 1;
const OTHER_OUT: Group = 2;

/// What a side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Doors,
    Nats,
    Other,
}

impl Kind {
    /// Its name in metrics.
    fn word(self) -> &'static str {
        match self {
            Kind::Doors => "doors",
            Kind::Nats => "nats",
            Kind::Other => "zmq",
        }
    }
}

/// What has been counted of one side.
#[derive(Debug, Default)]
struct Counts {
    heard: Cell<u64>,
    came_back: Cell<u64>,
    left: Cell<u64>,
    unreadable: Cell<u64>,
    passed: Cell<u64>,
    dropped_full: Cell<u64>,
    dropped_too_large: Cell<u64>,
    dropped_unfit: Cell<u64>,
    dropped_too_far: Cell<u64>,
}

fn add(cell: &Cell<u64>, more: u64) {
    cell.set(cell.get().wrapping_add(more));
}

/// One side.
#[derive(Debug)]
struct Place {
    kind: Kind,
    outbox: Outbox,
    counts: Counts,
    numbers: RefCell<Numbers>,
}

/// A running bridge.
pub struct Bridge {
    course: RefCell<Course>,
    places: Vec<Place>,
    commands: Sender<Command>,
    nats: Option<Nats>,
    /// What all subjects begin with that are exchanged: `namespace.` or `namespace.demo.`.
    prefix: String,
    tasks: RefCell<JoinSet<()>>,
}

impl Bridge {
    /// Joins all sides from now on; NATS and the other broker may come later. Needs a `LocalSet`.
    ///
    /// # Errors
    /// A file or a variable of NATS cannot be used.
    pub async fn start(
        config: &BridgeConfig,
        options: &NatsOptions,
        security: Security,
        broker: &Broker,
    ) -> Result<Rc<Bridge>> {
        let me = random_id();
        let mut sides = vec![(doors_id(config, me), config.side.is_none())];
        let mut kinds = vec![Kind::Doors];
        let mut nats = None;
        if config.nats {
            nats = Some(Nats::connect_later(options).await?);
            sides.push((number(b"nats"), false));
            kinds.push(Kind::Nats);
        }
        if let Some((xsub, xpub)) = config.other {
            sides.push((number(format!("zmq {xsub} {xpub}").as_bytes()), false));
            kinds.push(Kind::Other);
        }
        let ids = sides.iter().map(|side| side.0).collect();
        let members = Members::new(me, ids, Instant::now());
        let bridge = Rc::new(Bridge {
            course: RefCell::new(Course::new(sides, members)),
            places: kinds.into_iter().map(Place::new).collect(),
            commands: broker.commands(),
            nats,
            prefix: match &config.namespace {
                Some(namespace) => format!("namespace.{}.", encode_segment(namespace)),
                None => "namespace.".to_owned(),
            },
            tasks: RefCell::default(),
        });
        bridge.begin(config, &security)?;
        let named = bridge.places.iter().map(|place| place.kind.word());
        let named = named.collect::<Vec<_>>().join(" ");
        tracing::info!(sides = named, prefix = bridge.prefix, "events: bridge");
        Ok(bridge)
    }

    fn begin(self: &Rc<Self>, config: &BridgeConfig, security: &Security) -> Result<()> {
        if let Some((xsub, xpub)) = config.other {
            let dials = [
                (xpub, Side::Publisher, OTHER_IN),
                (xsub, Side::Subscriber, OTHER_OUT),
            ];
            for (dial, (address, side, group)) in (1..).zip(dials) {
                self.tell(Command::Dial {
                    dial,
                    address,
                    side,
                    group,
                    security: security.clone(),
                })?;
            }
        }
        for at in 0..self.places.len() {
            let tasks = &mut *self.tasks.borrow_mut();
            let (taking, giving) = match self.places[at].kind {
                Kind::Doors => (DOORS, DOORS),
                Kind::Other => (OTHER_IN, OTHER_OUT),
                Kind::Nats => {
                    tasks.spawn_local(on_nats::take(Rc::clone(self), at));
                    tasks.spawn_local(on_nats::give(Rc::clone(self), at));
                    tasks.spawn_local(on_nats::meet(Rc::clone(self)));
                    continue;
                }
            };
            let (events, taken) = mesh::lane_of(LANE_EVENTS)?;
            let wake = cores::register(taken.as_fd().try_clone_to_owned()?);
            let wake = wake.context("cannot watch the event plane")?;
            self.tell(Command::Subscribe {
                consumer: at as u64,
                group: taking,
                prefixes: vec![self.prefix.clone().into_bytes()],
                events: Box::new(events),
            })?;
            tasks.spawn_local(take(Rc::clone(self), at, taken, wake));
            tasks.spawn_local(give(Rc::clone(self), at, giving));
        }
        Ok(())
    }

    fn tell(&self, command: Command) -> Result<()> {
        let told = self.commands.send(command);
        told.map_err(|_| anyhow::anyhow!("the event plane does not take commands"))
    }

    /// An event has come on a side: it goes where it has not been.
    fn heard(&self, from: usize, subject: Bytes, envelope: Bytes, origin: Origin) {
        let counts = &self.places[from].counts;
        add(&counts.heard, 1);
        let Ok(read) = Envelope::decode(&envelope) else {
            return add(&counts.unreadable, 1);
        };
        let (publisher_id, sequence) = (read.publisher_id, read.sequence);
        self.places[from]
            .numbers
            .borrow_mut()
            .came(publisher_id, sequence);
        let mut course = self.course.borrow_mut();
        let verdict = course.decide(from, publisher_id, sequence, origin);
        add(&counts.came_back, u64::from(verdict.came_back));
        add(&counts.dropped_too_far, u64::from(verdict.too_far));
        add(&counts.left, verdict.left);
        for (place, _) in self.places.iter().zip(verdict.to).filter(|(_, to)| *to) {
            let parcel = Parcel {
                subject: subject.clone(),
                publisher_id,
                sequence,
                envelope: envelope.clone(),
                origin: verdict.origin,
            };
            if !place.outbox.put(parcel) {
                add(&place.counts.dropped_full, 1);
            }
        }
    }

    /// Sends what waits, for a second at most, and leaves the other bridges its work.
    pub async fn stop(&self) {
        let empty = async {
            while self.places.iter().any(|place| place.outbox.len() > 0) {
                sleep(AGAIN_AFTER).await;
            }
        };
        let in_time = timeout(LINGER, empty).await.is_ok();
        on_nats::leave(self).await;
        self.tasks.borrow_mut().abort_all();
        for place in &self.places {
            let counts = &place.counts;
            let (heard, passed) = (counts.heard.get(), counts.passed.get());
            let left = place.outbox.len();
            let side = place.kind.word();
            tracing::info!(side, heard, passed, left, in_time, "events: bridge stopped");
        }
    }
}

impl Place {
    fn new(kind: Kind) -> Place {
        Place {
            kind,
            outbox: Outbox::default(),
            counts: Counts::default(),
            numbers: RefCell::default(),
        }
    }
}

/// Our own peers as a side: nobody else's, unless they have a name.
fn doors_id(config: &BridgeConfig, me: u64) -> u64 {
    match &config.side {
        Some(name) => number(format!("doors {name}").as_bytes()),
        None => me,
    }
}

/// The same number for the same name everywhere: marks hold no names.
fn number(name: &[u8]) -> u64 {
    let hash = Sha256::digest(name);
    hash.iter()
        .take(8)
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Takes what the plane receives in a group.
async fn take(bridge: Rc<Bridge>, at: usize, taken: Receiver<LocalEvent>, wake: AsyncFd<OwnedFd>) {
    loop {
        let Ok(mut ready) = wake.readable().await else {
            return;
        };
        ready.clear_ready();
        taken.clear_wake();
        let mut turn = 0;
        while let Some(event) = taken.next() {
            let origin = Origin::of_frame(&event.frame);
            let payload = frame::payload(&event.frame).map(<[u8]>::len);
            let Ok(bytes) = payload else {
                add(&bridge.places[at].counts.unreadable, 1);
                continue;
            };
            let envelope = Bytes::from(event.frame);
            let envelope = envelope.slice(frame::PREFIX_BYTES..frame::PREFIX_BYTES + bytes);
            bridge.heard(at, event.subject.into(), envelope, origin);
            turn += 1;
            if turn % TURN == 0 {
                yield_now().await;
            }
        }
    }
}

/// Brings what waits for a group of the plane there.
async fn give(bridge: Rc<Bridge>, at: usize, group: Group) {
    let place = &bridge.places[at];
    loop {
        let parcel = place.outbox.take().await;
        let mut bytes = Vec::new();
        if frame::write(&parcel.envelope, &mut bytes).is_err() {
            add(&place.counts.dropped_too_large, 1);
            continue;
        }
        parcel.origin.write(&mut bytes);
        let event = LocalEvent {
            subject: parcel.subject.into(),
            publisher_id: parcel.publisher_id,
            sequence: parcel.sequence,
            frame: bytes,
        };
        let mut command = Command::Publish { group, event };
        while let Err(back) = bridge.commands.send(command) {
            sleep(AGAIN_AFTER).await;
            command = back;
        }
        add(&place.counts.passed, 1);
    }
}
