//! How long each step of a relayed response may take. One timer for each relay, set anew only when
//! something is due before it.

use corelane_codec::error::DynamoError;

use crate::directory::RelayTimes;
use crate::relay::{Phase, Relay};
use crate::ring::Ring;
use crate::shard::{Shard, TimerKind};
use crate::{relay_life, settle};

/// A caller has so long to take our connect.
const DIAL_NS: u64 = 5_000_000_000;
/// He has so long to close the socket after the sentinel (spec/request-plane.md §4.5).
const CLOSE_NS: u64 = 10_000_000_000;
/// A caller who takes nothing of what waits for him for so long is given up.
const STALL_NS: u64 = 600_000_000_000;
/// The same while buffers are short.
const STALL_SHORT_NS: u64 = 5_000_000_000;

/// What a deadline is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    /// The caller's connect.
    Dial,
    /// The worker's call home.
    Home,
    /// The first item.
    FirstItem,
    /// The next item.
    Item,
    /// That the caller takes something.
    Stall,
    /// That the caller closes.
    Close,
    /// Nothing; it is looked again then.
    Look,
}

/// Sets the timer for what is due next.
pub(crate) fn watch<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let (due_ns, _) = next(shard, relay);
    let entry = &shard.relays.table[relay];
    if let Some(timer) = entry.timer {
        if entry.timer_ns <= due_ns {
            return;
        }
        shard.timers.cancel(timer);
    }
    let generation = shard.relays.table.generation(relay);
    let timer = shard.timer_to_cancel(TimerKind::Relay, relay, generation, due_ns);
    let entry = &mut shard.relays.table[relay];
    (entry.timer, entry.timer_ns) = (timer, due_ns);
}

/// What is due next, and when.
fn next<R: Ring>(shard: &Shard<R>, relay: u32) -> (u64, Due) {
    let entry = &shard.relays.table[relay];
    let route = shard.directory.routes.get(entry.route as usize);
    let times = route.and_then(|route| route.relay).unwrap_or(RelayTimes {
        home_ns: 0,
        first_item_ns: 0,
        inactivity_ns: 0,
    });
    let caller = shard.connections.get(entry.caller);
    let dial = caller.is_some_and(|caller| caller.connecting);
    let after = |wanted: bool, from_ns: u64, time_ns: u64, due: Due| match wanted && time_ns > 0 {
        true => (from_ns.saturating_add(time_ns), due),
        false => (u64::MAX, Due::Look),
    };
    let look = (shard.now_ns + STALL_NS, Due::Look);
    let all = [
        after(dial, entry.dialled_ns, DIAL_NS, Due::Dial),
        by_phase(entry, &times, after),
        look,
    ];
    all.into_iter()
        .min_by_key(|(due_ns, _)| *due_ns)
        .unwrap_or(look)
}

fn by_phase(
    entry: &Relay,
    times: &RelayTimes,
    after: impl Fn(bool, u64, u64, Due) -> (u64, Due),
) -> (u64, Due) {
    let waits = entry.ready > 0;
    match entry.phase {
        Phase::Closing | Phase::Cutting if waits => {
            after(true, entry.taken_ns, STALL_NS, Due::Stall)
        }
        Phase::Closing | Phase::Cutting => after(true, entry.taken_ns, CLOSE_NS, Due::Close),
        Phase::Passing if waits => after(true, entry.taken_ns, STALL_NS, Due::Stall),
        Phase::Passing => {
            let last_ns = entry.said_ns.max(entry.taken_ns);
            after(true, last_ns, times.inactivity_ns, Due::Item)
        }
        phase => {
            let called = phase == Phase::Called && entry.accepted;
            let home = after(called, entry.accepted_ns, times.home_ns, Due::Home);
            let first = after(true, entry.placed_ns, times.first_item_ns, Due::FirstItem);
            if home.0 < first.0 { home } else { first }
        }
    }
}

/// The timer of a relay.
pub(crate) fn overdue<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    shard.relays.table[relay].timer = None;
    let (due_ns, due) = next(shard, relay);
    if due_ns > shard.now_ns || due == Due::Look {
        return watch(shard, relay);
    }
    let error = match due {
        Due::Dial | Due::Stall => return relay_life::abandon(shard, relay),
        Due::Close | Due::Look => return relay_life::end(shard, relay),
        Due::Home => {
            "the worker acknowledged the request and did not call home in time; it may not have \
             been able to read it"
        }
        Due::FirstItem => "the first item did not come in time",
        Due::Item => "backend response inactivity timeout",
    };
    shard.stats.shard.relay_timeouts.add(1);
    let instance = shard.relays.table[relay].instance;
    if due == Due::FirstItem
        && let Some(instance) = shard.instances.get_mut(instance)
    {
        instance.inhibited_until_ns = shard.now_ns + settle::INHIBITED_NS;
    }
    relay_life::retry(shard, relay, DynamoError::response_timeout(error));
}

/// Buffers have been short for long: callers who take nothing hold them, and workers who do not
/// take their request streams.
pub(crate) fn relieve<R: Ring>(shard: &mut Shard<R>) {
    let stalls = |relay: &u32| {
        let entry = &shard.relays.table[*relay];
        let since = |from_ns: u64| from_ns + STALL_SHORT_NS <= shard.now_ns;
        let feeder = shard.connections.get(entry.feeder);
        let fed = feeder.is_some_and(|feeder| !feeder.incoming.is_empty());
        entry.ready > 0 && entry.passes() && since(entry.taken_ns) || fed && since(entry.fed_ns)
    };
    let stalled: Vec<u32> = shard.relays.table.slots().filter(stalls).collect();
    for relay in stalled {
        if shard.may_hold() {
            return;
        }
        relay_life::abandon(shard, relay);
    }
}
