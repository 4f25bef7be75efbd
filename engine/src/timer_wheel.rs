//! Deadlines of one shard: a hierarchical timing wheel over a table of fixed size.
//!
//! ```text
//! level 0: 64 slots of 1 tick   level 1: 64 slots of 64 ticks   ...   level 7: 64 of 64^7 ticks
//! ```
//!
//! A timer lies at the level of the highest six bits in which its tick differs from the current
//! one, so a slot ahead of the current one never holds another turn's timers, and eight levels hold
//! every deadline that 64 bits of nanoseconds can name. When the current tick enters a slot of a
//! higher level, its timers move down. One bitmap per level finds the next slot in use, so a jump
//! in time costs no more than the timers that it passes.

/// Nanoseconds of one tick: how late a timer may fire.
pub const TICK_NS: u64 = 1_000_000;

/// Timers of one shard. All memory is taken by [`TimerWheel::new`].
pub struct TimerWheel {
    /// Timers that are due up to and with this tick have been fired.
    current: u64,
    nodes: Vec<Node>,
    /// First of the unused nodes, which are linked by `next`.
    unused: u32,
    running: usize,
    heads: [[u32; SLOTS]; LEVELS],
    /// A bit for each slot that holds a timer.
    in_use: [u64; LEVELS],
}

/// Names a timer until it has fired or was cancelled; after that it names nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimerId {
    index: u32,
    generation: u32,
}

/// The table of timers is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all timers of this core are running; raise its limit of connections and requests")]
pub struct Full;

struct Node {
    tick: u64,
    token: u64,
    previous: u32,
    next: u32,
    generation: u32,
    level: u8,
    running: bool,
}

const LEVELS: usize = 8;
const SLOTS: usize = 1 << SLOT_BITS;
const SLOT_BITS: u32 = 6;
const NONE: u32 = u32::MAX;

const _: () = assert!(u64::MAX / TICK_NS < 1 << (LEVELS as u32 * SLOT_BITS));

impl TimerWheel {
    /// A wheel for at most `capacity` running timers.
    pub fn new(capacity: usize) -> TimerWheel {
        assert!(capacity < NONE as usize, "nodes are numbered by 32 bits");
        let node = |index: usize| Node {
            tick: 0,
            token: 0,
            previous: NONE,
            next: if index + 1 < capacity {
                index as u32 + 1
            } else {
                NONE
            },
            generation: 0,
            level: 0,
            running: false,
        };
        TimerWheel {
            current: 0,
            nodes: (0..capacity).map(node).collect(),
            unused: if capacity == 0 { NONE } else { 0 },
            running: 0,
            heads: [[NONE; SLOTS]; LEVELS],
            in_use: [0; LEVELS],
        }
    }

    /// Timers that are running.
    pub fn len(&self) -> usize {
        self.running
    }

    /// Whether no timer is running.
    pub fn is_empty(&self) -> bool {
        self.running == 0
    }

    /// Starts a timer that gives `token` back at `deadline_ns` (of any clock that never goes back)
    /// or up to one tick later. A deadline in the past is met by the next [`TimerWheel::expire`].
    ///
    /// # Errors
    /// [`Full`] when as many timers are running as the table holds.
    pub fn insert(&mut self, deadline_ns: u64, token: u64) -> Result<TimerId, Full> {
        let index = self.unused;
        let node = self.nodes.get_mut(index as usize).ok_or(Full)?;
        self.unused = node.next;
        node.tick = deadline_ns.div_ceil(TICK_NS).max(self.current);
        node.token = token;
        node.running = true;
        let generation = node.generation;
        self.running += 1;
        self.link(index);
        Ok(TimerId { index, generation })
    }

    /// Stops a timer. `false`, and no harm, when it has fired or was cancelled before.
    pub fn cancel(&mut self, timer: TimerId) -> bool {
        let node = &self.nodes[timer.index as usize];
        if !node.running || node.generation != timer.generation {
            return false;
        }
        self.unlink(timer.index);
        self.free(timer.index);
        true
    }

    /// When [`TimerWheel::expire`] should be called next, in nanoseconds. May be early (nothing
    /// fires then, and the next answer is nearer to the truth), and is at most one tick later than
    /// the first deadline. `None` when no timer is running.
    pub fn next_deadline(&self) -> Option<u64> {
        self.next_tick().map(|tick| tick.saturating_mul(TICK_NS))
    }

    /// Fires each timer whose deadline is at or before `now_ns`: once, in the order of their ticks.
    pub fn expire(&mut self, now_ns: u64, fire: &mut impl FnMut(u64)) {
        let now = now_ns / TICK_NS;
        while let Some(tick) = self.next_tick().filter(|tick| *tick <= now) {
            self.current = tick;
            self.move_down();
            let slot = slot_of(tick, 0);
            while self.heads[0][slot] != NONE {
                let index = self.heads[0][slot];
                let token = self.nodes[index as usize].token;
                self.unlink(index);
                self.free(index);
                fire(token);
            }
        }
        self.current = self.current.max(now);
    }

    /// First tick of the first slot in use. Lower levels lie before the slots of higher ones.
    fn next_tick(&self) -> Option<u64> {
        let level = self.in_use.iter().position(|bits| *bits != 0)?;
        let slot = u64::from(self.in_use[level].trailing_zeros());
        let shift = level as u32 * SLOT_BITS;
        let turn = self.current >> (shift + SLOT_BITS) << (shift + SLOT_BITS);
        Some(turn + (slot << shift))
    }

    /// Spreads the timers of the slots that the current tick has just entered over lower levels.
    fn move_down(&mut self) {
        for level in (1..LEVELS).rev() {
            let slot = slot_of(self.current, level);
            while self.heads[level][slot] != NONE {
                let index = self.heads[level][slot];
                self.unlink(index);
                self.link(index);
            }
        }
    }

    fn link(&mut self, index: u32) {
        let tick = self.nodes[index as usize].tick;
        debug_assert!(tick >= self.current);
        let differing = (tick ^ self.current) | (SLOTS as u64 - 1);
        let level = (differing.ilog2() / SLOT_BITS) as usize;
        let slot = slot_of(tick, level);
        let next = self.heads[level][slot];
        let node = &mut self.nodes[index as usize];
        node.level = level as u8;
        node.previous = NONE;
        node.next = next;
        if let Some(next) = self.nodes.get_mut(next as usize) {
            next.previous = index;
        }
        self.heads[level][slot] = index;
        self.in_use[level] |= 1 << slot;
    }

    fn unlink(&mut self, index: u32) {
        let node = &self.nodes[index as usize];
        let (level, previous, next) = (usize::from(node.level), node.previous, node.next);
        let slot = slot_of(node.tick, level);
        if let Some(next) = self.nodes.get_mut(next as usize) {
            next.previous = previous;
        }
        if let Some(previous) = self.nodes.get_mut(previous as usize) {
            previous.next = next;
        } else {
            debug_assert_eq!(self.heads[level][slot], index);
            self.heads[level][slot] = next;
            if next == NONE {
                self.in_use[level] &= !(1 << slot);
            }
        }
    }

    fn free(&mut self, index: u32) {
        let node = &mut self.nodes[index as usize];
        debug_assert!(node.running);
        node.running = false;
        node.generation = node.generation.wrapping_add(1);
        node.next = self.unused;
        self.unused = index;
        self.running -= 1;
    }
}

fn slot_of(tick: u64, level: usize) -> usize {
    (tick >> (level as u32 * SLOT_BITS)) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn fired(wheel: &mut TimerWheel, now_ns: u64) -> Vec<u64> {
        let mut tokens = Vec::new();
        wheel.expire(now_ns, &mut |token| tokens.push(token));
        tokens
    }

    #[test]
    fn a_timer_fires_within_a_tick_and_never_early() {
        let mut wheel = TimerWheel::new(4);
        wheel.insert(5 * TICK_NS + 1, 7).unwrap();
        assert!(fired(&mut wheel, 5 * TICK_NS + 1).is_empty());
        assert_eq!(wheel.next_deadline(), Some(6 * TICK_NS));
        assert_eq!(fired(&mut wheel, 6 * TICK_NS), [7]);
        assert_eq!(wheel.next_deadline(), None);
    }

    #[test]
    fn a_deadline_in_the_past_fires_at_once() {
        let mut wheel = TimerWheel::new(4);
        let now_ns = 1_000_000 * TICK_NS;
        assert!(fired(&mut wheel, now_ns).is_empty());
        wheel.insert(3, 1).unwrap();
        assert!(wheel.next_deadline().unwrap() <= now_ns);
        assert_eq!(fired(&mut wheel, now_ns), [1]);
    }

    #[test]
    fn a_full_table_refuses_and_recovers() {
        let mut wheel = TimerWheel::new(2);
        let first = wheel.insert(1, 1).unwrap();
        wheel.insert(u64::MAX, 2).unwrap();
        assert_eq!(wheel.insert(1, 3), Err(Full));
        assert!(wheel.cancel(first));
        let second = wheel.insert(1, 4).unwrap();
        assert!(!wheel.cancel(first), "its node belongs to another timer");
        assert!(wheel.cancel(second));
        assert_eq!(wheel.len(), 1);
        assert_eq!(TimerWheel::new(0).insert(1, 1), Err(Full));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert { ahead_ns: u64 },
        Cancel { which: prop::sample::Index },
        Advance { by_ns: u64 },
    }

    /// Spans from nanoseconds to centuries, each magnitude as likely as the next.
    fn span() -> impl Strategy<Value = u64> {
        (0u32..62, any::<u64>()).prop_map(|(bits, value)| value & ((1 << bits) - 1))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => span().prop_map(|ahead_ns| Step::Insert { ahead_ns }),
            1 => any::<prop::sample::Index>().prop_map(|which| Step::Cancel { which }),
            2 => span().prop_map(|by_ns| Step::Advance { by_ns }),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_a_sorted_map(
            start_ns in span(),
            steps in prop::collection::vec(step(), 1..200),
        ) {
            const CAPACITY: usize = 32;
            let mut wheel = TimerWheel::new(CAPACITY);
            let mut now_ns = start_ns;
            // The model: tokens in the order of their insertion, with their deadline.
            let mut running = BTreeMap::<u64, (u64, TimerId)>::new();
            let mut ids = Vec::new();
            let mut token = 0;
            for step in steps {
                match step {
                    Step::Insert { ahead_ns } => {
                        let deadline_ns = now_ns.saturating_add(ahead_ns);
                        token += 1;
                        match wheel.insert(deadline_ns, token) {
                            Ok(id) => {
                                running.insert(token, (deadline_ns, id));
                                ids.push((token, id));
                            }
                            Err(Full) => prop_assert_eq!(running.len(), CAPACITY),
                        }
                    }
                    Step::Cancel { which } => {
                        if !ids.is_empty() {
                            let (token, id) = *which.get(&ids);
                            prop_assert_eq!(wheel.cancel(id), running.remove(&token).is_some());
                        }
                    }
                    Step::Advance { by_ns } => {
                        now_ns = now_ns.saturating_add(by_ns);
                        for token in fired(&mut wheel, now_ns) {
                            let (deadline_ns, _) = running.remove(&token).expect("fired once");
                            prop_assert!(deadline_ns <= now_ns, "fired early");
                        }
                        for (deadline_ns, _) in running.values() {
                            prop_assert!(*deadline_ns > now_ns.saturating_sub(TICK_NS), "late");
                        }
                    }
                }
                prop_assert_eq!(wheel.len(), running.len());
                let first_ns = running.values().map(|(deadline_ns, _)| *deadline_ns).min();
                match (wheel.next_deadline(), first_ns) {
                    (None, None) => {}
                    (Some(next_ns), Some(first_ns)) => {
                        // A deadline of before now is due now; the wheel knows ticks, not `now`.
                        prop_assert!(next_ns <= first_ns.max(now_ns).saturating_add(TICK_NS));
                    }
                    (next, first) => prop_assert!(false, "{next:?} but the model says {first:?}"),
                }
            }
        }

        #[test]
        fn following_next_deadline_meets_every_deadline(
            aheads in prop::collection::vec(span(), 1..32),
        ) {
            let mut wheel = TimerWheel::new(32);
            for (token, ahead_ns) in aheads.iter().enumerate() {
                wheel.insert(*ahead_ns, token as u64).unwrap();
            }
            let mut turns = 0;
            while let Some(now_ns) = wheel.next_deadline() {
                for token in fired(&mut wheel, now_ns) {
                    let ahead_ns = aheads[token as usize];
                    prop_assert!(ahead_ns <= now_ns && now_ns - ahead_ns < TICK_NS);
                }
                turns += 1;
                prop_assert!(turns <= 32 * LEVELS, "each turn moves a timer down or fires it");
            }
            prop_assert!(wheel.is_empty());
        }
    }
}
