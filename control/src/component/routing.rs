//! Which instance gets a call: pure choice among those that are free
//! (`spec/request-plane.md` §11.2).

use std::str::FromStr;

/// How a client chooses an instance.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum RoutingMode {
    /// One after the other, by id.
    #[default]
    RoundRobin,
    /// Any one.
    Random,
    /// The less loaded of two drawn at random.
    PowerOfTwoChoices,
    /// The least loaded of all; ties by chance.
    LeastLoaded,
    /// CPU instances get a share that fits their speed, see [`Ratio`].
    DeviceAwareWeighted,
    /// Only the instance that the call names.
    Direct,
    /// A router of cached prefixes names the instance; otherwise as [`RoutingMode::Direct`].
    Kv,
}

impl RoutingMode {
    /// All of them, with the names that Dynamo's configuration has for them.
    pub const NAMES: [(&'static str, RoutingMode); 7] = [
        ("round_robin", RoutingMode::RoundRobin),
        ("random", RoutingMode::Random),
        ("power_of_two_choices", RoutingMode::PowerOfTwoChoices),
        ("least_loaded", RoutingMode::LeastLoaded),
        ("device_aware_weighted", RoutingMode::DeviceAwareWeighted),
        ("direct", RoutingMode::Direct),
        ("k_v", RoutingMode::Kv),
    ];

    /// Whether calls must name their instance.
    pub fn is_exact(self) -> bool {
        matches!(self, RoutingMode::Direct | RoutingMode::Kv)
    }
}

/// A word that names no mode.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "{0:?} is no routing mode; write round_robin, random, power_of_two_choices, least_loaded, \
     device_aware_weighted, direct or kv"
)]
pub struct UnknownMode(String);

impl FromStr for RoutingMode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        let word = text.trim().to_ascii_lowercase().replace('-', "_");
        let word = if word == "kv" { "k_v" } else { &word };
        let found = RoutingMode::NAMES.iter().find(|(name, _)| *name == word);
        found
            .map(|(_, mode)| *mode)
            .ok_or_else(|| UnknownMode(text.to_owned()))
    }
}

/// How many times faster an accelerator is taken to be than a CPU
/// (`DYN_ENCODER_CUDA_TO_CPU_RATIO`, 8); at least 1.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ratio(pub u64);

impl Default for Ratio {
    fn default() -> Self {
        Ratio(8)
    }
}

/// One instance that a call can go to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Candidate {
    /// Calls under way there, of this process.
    pub(super) load: u64,
    /// It has no accelerator.
    pub(super) is_cpu: bool,
}

/// Chance and turn of one router.
pub(super) trait Draw {
    /// The next turn.
    fn turn(&mut self) -> u64;
    /// Any number below `bound`, which is not 0.
    fn below(&mut self, bound: usize) -> usize;
}

/// The index of the one that gets the call; `None` if there is none, or the mode does not choose.
pub(super) fn choose(
    mode: RoutingMode,
    ratio: Ratio,
    free: &[Candidate],
    draw: &mut impl Draw,
) -> Option<usize> {
    if free.is_empty() {
        return None;
    }
    match mode {
        RoutingMode::RoundRobin => Some((draw.turn() % free.len() as u64) as usize),
        RoutingMode::Random => Some(draw.below(free.len())),
        RoutingMode::PowerOfTwoChoices => Some(of_two(free, draw)),
        RoutingMode::LeastLoaded => least(free, |_| true, draw),
        RoutingMode::DeviceAwareWeighted => by_device(ratio, free, draw),
        RoutingMode::Direct | RoutingMode::Kv => None,
    }
}

fn of_two(free: &[Candidate], draw: &mut impl Draw) -> usize {
    let first = draw.below(free.len());
    if free.len() == 1 {
        return first;
    }
    // Any other, each with the same chance.
    let second = (first + 1 + draw.below(free.len() - 1)) % free.len();
    match free[second].load < free[first].load {
        true => second,
        false => first,
    }
}

/// The least loaded of a kind; ties by chance.
fn least(
    free: &[Candidate],
    of_kind: impl Fn(&Candidate) -> bool,
    draw: &mut impl Draw,
) -> Option<usize> {
    let mut best = None;
    let mut ties = 0;
    for (index, candidate) in free.iter().enumerate().filter(|(_, one)| of_kind(one)) {
        match best {
            Some((_, load)) if candidate.load > load => {}
            Some((_, load)) if candidate.load == load => {
                ties += 1;
                if draw.below(ties) == 0 {
                    best = Some((index, load));
                }
            }
            _ => {
                best = Some((index, candidate.load));
                ties = 1;
            }
        }
    }
    best.map(|(index, _)| index)
}

fn by_device(ratio: Ratio, free: &[Candidate], draw: &mut impl Draw) -> Option<usize> {
    let of = |cpu: bool| free.iter().filter(move |one| one.is_cpu == cpu);
    let (cpus, accelerators) = (of(true).count() as u64, of(false).count() as u64);
    if cpus == 0 || accelerators == 0 {
        return least(free, |_| true, draw);
    }
    let load = |cpu: bool| of(cpu).map(|one| one.load).sum::<u64>();
    let allowed = load(false) * cpus / (ratio.0.max(1) * accelerators);
    let to_cpu = load(true) < allowed;
    least(free, |one| one.is_cpu == to_cpu, draw)
}

/// A small generator of numbers that nobody needs to be unable to guess (splitmix64).
pub(super) struct Chance {
    state: u64,
    turn: u64,
}

impl Chance {
    /// Begins at a place of its own.
    pub(super) fn new() -> Chance {
        use std::hash::BuildHasher;
        let seed = std::collections::hash_map::RandomState::new().hash_one(0u8);
        Chance {
            state: seed,
            turn: 0,
        }
    }
}

impl Draw for Chance {
    fn turn(&mut self) -> u64 {
        let turn = self.turn;
        self.turn = turn.wrapping_add(1);
        turn
    }

    fn below(&mut self, bound: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        ((u128::from(mixed) * bound as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loads(loads: &[u64]) -> Vec<Candidate> {
        let of = |load: &u64| Candidate {
            load: *load,
            is_cpu: false,
        };
        loads.iter().map(of).collect()
    }

    fn counts(mode: RoutingMode, free: &[Candidate]) -> Vec<u32> {
        let mut counts = vec![0; free.len()];
        let mut chance = Chance::new();
        for _ in 0..6_000 {
            counts[choose(mode, Ratio::default(), free, &mut chance).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn turns_go_round_and_chance_is_even() {
        let free = loads(&[9, 0, 3]);
        assert_eq!(counts(RoutingMode::RoundRobin, &free), [2_000; 3]);
        for count in counts(RoutingMode::Random, &free) {
            assert!((1_600..2_400).contains(&count), "{count}");
        }
    }

    #[test]
    fn load_decides_and_ties_are_drawn() {
        assert_eq!(
            counts(RoutingMode::LeastLoaded, &loads(&[2, 1, 3]))[1],
            6_000
        );
        let tied = counts(RoutingMode::LeastLoaded, &loads(&[1, 5, 1, 1]));
        assert_eq!(tied[1], 0);
        for count in [tied[0], tied[2], tied[3]] {
            assert!((1_600..2_400).contains(&count), "{count}");
        }
        let two = counts(RoutingMode::PowerOfTwoChoices, &loads(&[0, 5, 9]));
        // The most loaded never wins a pair; the least loaded is in two pairs of three.
        assert!(two[2] == 0 && (3_500..4_500).contains(&two[0]), "{two:?}");
        let one = counts(RoutingMode::PowerOfTwoChoices, &loads(&[7]));
        assert_eq!(one, [6_000]);
    }

    #[test]
    fn cpus_get_their_share() {
        let mixed = |accelerator: u64, cpu: u64| {
            let mut free = loads(&[accelerator]);
            free.push(Candidate {
                load: cpu,
                is_cpu: true,
            });
            let mode = RoutingMode::DeviceAwareWeighted;
            choose(mode, Ratio(8), &free, &mut Chance::new())
        };
        assert_eq!(mixed(0, 0), Some(0));
        assert_eq!(mixed(7, 0), Some(0), "7 / 8 is no whole one");
        assert_eq!(mixed(8, 0), Some(1));
        assert_eq!(mixed(8, 1), Some(0));
        assert_eq!(mixed(16, 1), Some(1));
    }

    #[test]
    fn modes_have_dynamos_names() {
        for (name, mode) in RoutingMode::NAMES {
            assert_eq!(name.parse(), Ok(mode));
        }
        assert_eq!("kv".parse(), Ok(RoutingMode::Kv));
        assert_eq!("Round-Robin".parse(), Ok(RoutingMode::RoundRobin));
        assert!("best".parse::<RoutingMode>().is_err());
        assert_eq!(
            choose(
                RoutingMode::Direct,
                Ratio(8),
                &loads(&[0]),
                &mut Chance::new()
            ),
            None
        );
    }
}
