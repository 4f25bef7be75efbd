//! Connections to instances: opened when an instance appears, opened again when they are lost,
//! closed when nobody is left behind them.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::connection::{Fifo, Role};
use crate::directory::{Directory, Instance};
use crate::respond::Refusal;
use crate::ring::Ring;
use crate::route::Chooser;
use crate::shard::{RouteState, Shard, TimerKind};
use crate::table::NONE;
use crate::upstream::{BULK_MAX, InstanceState, Upstream, UpstreamState};
use crate::{collect, forward, relay_life, settle, tell};

const CONNECT_TIMEOUT_NS: u64 = 5_000_000_000;
/// A connection for large frames that has carried none for so long is closed.
const BULK_IDLE_NS: u64 = 30_000_000_000;

/// Takes over a new directory: new instances are dialled at once, those that are gone get nothing
/// more and keep what they have.
pub(crate) fn publish<R: Ring>(shard: &mut Shard<R>, directory: Arc<Directory>) {
    shard.epoch += 1;
    shard.stats.shard.directories.add(1);
    shard.route_at.clear();
    make_room(shard, &directory);
    for (index, route) in directory.routes.iter().enumerate() {
        for path in &route.paths {
            shard.route_at.insert(path.clone(), index as u32);
        }
        if shard.routes.len() == index {
            let seed = shard.now_ns ^ (shard.config.shard as u64) << 48 ^ index as u64;
            shard.routes.push(RouteState {
                chooser: Chooser::new(seed),
                instances: Vec::new(),
                ids: Vec::new(),
            });
        }
        if route.relay.is_some() {
            shard.stats.routes.open(index);
        } else if route.paths.is_empty() && route.instances.is_empty() {
            shard.stats.routes.clear(index);
        }
        let known = std::mem::take(&mut shard.routes[index].instances);
        let listed = route.instances.iter();
        let place = (index as u32, route.relay.is_some());
        let slots = listed.filter_map(|instance| list(shard, place, &known, instance));
        let slots: Vec<u32> = slots.collect();
        for slot in &slots {
            shard.instances[*slot].work.rule = route.load;
        }
        shard.routes[index].ids = slots.iter().map(|slot| shard.instances[*slot].id).collect();
        shard.routes[index].instances = slots;
        for slot in known {
            if shard.instances[slot].epoch != shard.epoch {
                unlist(shard, slot);
            }
        }
    }
    let listed = directory
        .routes
        .iter()
        .map(|route| route.instances.len() as u64)
        .sum();
    shard.stats.shard.instances.set(listed);
    shard.kv.prepare(&directory);
    shard.lanes.expected = directory.routes.iter().any(|route| route.lane);
    shard.directory = directory;
    let upstreams: Vec<u32> = shard.upstreams.slots().collect();
    for upstream in upstreams {
        collect::tune(shard, upstream);
    }
    relay_life::directory_changed(shard);
    count_ready(shard);
}

/// Takes the instances out of places that have none any more, before others are listed: a route
/// that has moved stands at a lower place than before every other time, and wants the room.
fn make_room<R: Ring>(shard: &mut Shard<R>, directory: &Directory) {
    let routes = directory.routes.iter().zip(&mut shard.routes);
    let empty = routes.filter(|(route, _)| route.instances.is_empty());
    let gone = empty.flat_map(|(_, state)| std::mem::take(&mut state.instances));
    for slot in gone.collect::<Vec<u32>>() {
        unlist(shard, slot);
    }
}

/// The slot of a listed instance; a new one when it was not known, or has moved.
fn list<R: Ring>(
    shard: &mut Shard<R>,
    (route, relayed): (u32, bool),
    known: &[u32],
    instance: &Instance,
) -> Option<u32> {
    let same = |slot: &&u32| {
        let state = &shard.instances[**slot];
        let same_place = state.address == instance.address && state.prefix[2..] == instance.path;
        state.id == instance.id && same_place
    };
    if let Some(slot) = known.iter().find(same).copied() {
        shard.instances[slot].epoch = shard.epoch;
        return Some(slot);
    }
    if shard.instances.is_full() {
        return None;
    }
    let upstream = shared(shard, instance.address)?;
    let mut state = InstanceState::new(instance.id, route, instance.address, &instance.path);
    state.upstream = upstream;
    state.epoch = shard.epoch;
    state.relayed = relayed;
    let slot = shard.instances.insert(state).ok()?;
    shard.upstreams[upstream].instances += 1;
    if shard.upstreams[upstream].instances == 1 {
        // Not before it counts as used: a dial that fails at once is tried again only then.
        connect(shard, upstream);
    }
    Some(slot)
}

fn unlist<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let instance = &mut shard.instances[slot];
    instance.gone = true;
    let upstream = instance.upstream;
    if shard.upstreams[upstream].state != UpstreamState::Open {
        // Gone from discovery and not to be reached: nobody will call these callers home.
        mourn(shard, upstream);
    }
    release_instance(shard, slot);
}

/// Frees an instance that is gone and has no request left.
pub(crate) fn release_instance<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let Some(instance) = shard.instances.get(slot) else {
        return;
    };
    if !instance.gone || instance.unanswered > 0 || instance.streams > 0 {
        return;
    }
    let upstream = instance.upstream;
    shard.instances.remove(slot);
    shard.upstreams[upstream].instances -= 1;
    if shard.upstreams[upstream].instances == 0 {
        discard(shard, upstream);
    }
}

/// The upstream for whole frames to `address`; a new one is to be dialled.
fn shared<R: Ring>(shard: &mut Shard<R>, address: SocketAddr) -> Option<u32> {
    if let Some(upstream) = shard.upstream_at.get(&address) {
        return Some(*upstream);
    }
    let upstream = shard.upstreams.insert(Upstream::new(address, false)).ok()?;
    shard.upstream_at.insert(address, upstream);
    Some(upstream)
}

/// An upstream for a large frame to `address`: an idle one, a new one, or the one with the fewest
/// frames before this.
pub(crate) fn bulk<R: Ring>(shard: &mut Shard<R>, address: SocketAddr) -> Option<u32> {
    let of_address = |upstream: &u32| {
        let link = &shard.upstreams[*upstream];
        link.bulk && link.address == address && link.connection != NONE
    };
    let links: Vec<u32> = shard.upstreams.slots().filter(of_address).collect();
    let least = links
        .iter()
        .copied()
        .min_by_key(|&upstream| shard.upstreams[upstream].queue.len);
    if let Some(least) = least
        && (shard.upstreams[least].queue.len == 0 || links.len() >= BULK_MAX)
    {
        return Some(least);
    }
    let upstream = shard.upstreams.insert(Upstream::new(address, true)).ok()?;
    let generation = shard.upstreams.generation(upstream);
    connect(shard, upstream);
    // A dial that fails at once, for lack of descriptors for example, takes it along.
    shard
        .upstreams
        .is_current(upstream, generation)
        .then_some(upstream)
}

/// Sets the timer of an upstream's connect. One that was set before means nothing from now on.
fn connect_at<R: Ring>(shard: &mut Shard<R>, upstream: u32, at_ns: u64) {
    shard.upstreams[upstream].connect_due_ns = at_ns;
    let generation = shard.upstreams.generation(upstream);
    shard.timer(TimerKind::Connect, upstream, generation, at_ns);
}

/// A timer of an upstream's connect has run out.
pub(crate) fn connect_due<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    if shard.upstreams[upstream].connect_due_ns <= shard.now_ns {
        connect(shard, upstream);
    }
}

/// Dials an upstream that waits; gives up on one whose connect takes too long.
fn connect<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let link = &mut shard.upstreams[upstream];
    match link.state {
        UpstreamState::Open => {}
        UpstreamState::Connecting => {
            let slot = link.connection;
            shard.lost(slot, libc::ETIMEDOUT);
        }
        UpstreamState::Waiting => {
            let address = link.address;
            link.state = UpstreamState::Connecting;
            match shard.dial(&address, Role::Upstream(upstream)) {
                Ok(slot) => {
                    shard.upstreams[upstream].connection = slot;
                    connect_at(shard, upstream, shard.now_ns + CONNECT_TIMEOUT_NS);
                }
                Err(errno) => lost(shard, upstream, errno),
            }
        }
    }
}

/// The connect has succeeded.
pub(crate) fn connected<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let link = &mut shard.upstreams[upstream];
    link.state = UpstreamState::Open;
    link.failures = 0;
    link.lost = false;
    link.lazy = false;
    if link.unsent != NONE {
        forward::soil(shard, upstream);
    }
    collect::tune(shard, upstream);
    count_ready(shard);
}

/// The connection is gone, or could not be made. Its requests go to other instances; it is dialled
/// again as long as discovery lists an instance behind it.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, upstream: u32, errno: i32) {
    let link = &mut shard.upstreams[upstream];
    let was_open = link.state == UpstreamState::Open;
    let queue = std::mem::replace(&mut link.queue, Fifo::EMPTY);
    link.connection = NONE;
    link.state = UpstreamState::Waiting;
    (link.unsent, link.unsent_offset, link.queued_bytes) = (NONE, 0, 0);
    let (bulk, abandoned) = (link.bulk, link.instances == 0);
    if was_open {
        shard.stats.shard.upstreams_lost.add(1);
        shard.upstreams[upstream].lost = true;
    } else {
        shard.stats.shard.connect_failures.add(1);
        shard.upstreams[upstream].failures += 1;
        if shard.upstreams[upstream].lost {
            // It was there and now nobody answers: the process is dead.
            mourn(shard, upstream);
        }
    }
    let refusal = match errno {
        libc::ETIMEDOUT if was_open => Refusal::AnswerOverdue,
        _ => Refusal::InstanceLost,
    };
    let mut request = queue.head;
    while request != NONE {
        let next = shard.requests[request].next_upstream;
        settle::replace(shard, request, refusal);
        request = next;
    }
    if was_open && !bulk {
        relay_life::upstream_lost(shard, upstream);
    }
    if bulk {
        shard.upstreams.remove(upstream);
    } else if !abandoned && shard.upstreams.get(upstream).is_some() {
        let link = &shard.upstreams[upstream];
        let pause_ns = if was_open { 0 } else { link.backoff_ns() };
        connect_at(shard, upstream, shard.now_ns + pause_ns);
    }
    count_ready(shard);
}

/// Nobody is behind an upstream any more.
fn discard<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let link = &shard.upstreams[upstream];
    debug_assert!(link.queue.len == 0, "a request counts as an instance's");
    let (slot, address) = (link.connection, link.address);
    shard.upstream_at.remove(&address);
    shard.upstreams.remove(upstream);
    if slot != NONE {
        shard.forget(slot);
    }
}

/// The timer of an upstream: is its oldest request overdue, or has a bulk one been idle for long?
pub(crate) fn overdue<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let link = &mut shard.upstreams[upstream];
    link.timer = false;
    let (request, slot) = (link.queue.head, link.connection);
    if request == NONE {
        if link.bulk && slot != NONE {
            if link.used_ns + BULK_IDLE_NS <= shard.now_ns {
                return shard.lost(slot, 0);
            }
            watch(shard, upstream, BULK_IDLE_NS);
        }
        return;
    }
    let timeout_ns = forward::answer_timeout_ns(shard, request);
    let entry = &shard.requests[request];
    // A frame that is still arriving has its own timer, on its sender's connection; but if it is
    // the instance that takes none of what has arrived, he waits for it.
    let stalls = entry.streaming && forward::has_unsent(shard, upstream);
    let since_ns = if stalls {
        entry.placed_ns.max(shard.upstreams[upstream].used_ns)
    } else if entry.sent {
        entry.sent_ns
    } else {
        entry.placed_ns
    };
    let left_ns = (since_ns + timeout_ns).saturating_sub(shard.now_ns);
    if entry.streaming && !stalls || left_ns > 0 {
        return watch(shard, upstream, left_ns.max(timeout_ns / 16));
    }
    shard.stats.shard.ack_timeouts.add(1);
    let address = shard.upstreams[upstream].address;
    inhibit(shard, address);
    if slot == NONE {
        return lost(shard, upstream, libc::ETIMEDOUT);
    }
    shard.lost(slot, libc::ETIMEDOUT);
}

fn watch<R: Ring>(shard: &mut Shard<R>, upstream: u32, pause_ns: u64) {
    shard.upstreams[upstream].timer = true;
    let generation = shard.upstreams.generation(upstream);
    shard.timer(
        TimerKind::Answer,
        upstream,
        generation,
        shard.now_ns + pause_ns,
    );
}

/// All instances at an address get nothing for a while.
fn inhibit<R: Ring>(shard: &mut Shard<R>, address: SocketAddr) {
    let slots: Vec<u32> = shard.instances.slots().collect();
    for slot in slots {
        if shard.instances[slot].address == address {
            shard.instances[slot].inhibited_until_ns = shard.now_ns + settle::INHIBITED_NS;
        }
    }
}

/// A worker process is dead: those it has accepted requests from are told.
fn mourn<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let key = ledger_key(shard, upstream);
    let mut envelopes = Vec::new();
    shard.ledger.take(key, shard.now_ns, |envelope| {
        envelopes.push(envelope.to_vec())
    });
    for envelope in envelopes {
        tell::tell(shard, &envelope, tell::Cause::WorkerDied);
    }
}

/// What the ledger knows an upstream by.
pub(crate) fn ledger_key<R: Ring>(shard: &Shard<R>, upstream: u32) -> u64 {
    u64::from(shard.upstreams.generation(upstream)) << 32 | u64::from(upstream)
}

fn count_ready<R: Ring>(shard: &Shard<R>) {
    let open = |upstream: u32| shard.upstreams[upstream].state == UpstreamState::Open;
    let listed = shard.routes.iter().flat_map(|route| &route.instances);
    let ready = listed
        .filter(|slot| open(shard.instances[**slot].upstream))
        .count();
    shard.stats.shard.instances_ready.set(ready as u64);
    let upstreams = shard
        .upstreams
        .slots()
        .filter(|upstream| open(*upstream))
        .count();
    shard.stats.shard.upstreams.set(upstreams as u64);
}
