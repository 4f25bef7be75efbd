//! The choice of an instance. Pure: candidates, policy, hint and chance in, a place in the list
//! out.

use crate::directory::Policy;
use crate::kv::mix;

/// What the choice needs to know of an instance.
#[expect(
    clippy::len_without_is_empty,
    reason = "every policy handles an empty list by finding no place"
)]
pub trait Candidates {
    /// How many there are, reachable or not.
    fn len(&self) -> usize;
    /// Whether `place` may get the request.
    fn is_routable(&self, place: usize) -> bool;
    /// Instance id at `place`.
    fn id(&self, place: usize) -> u64;
    /// Load at `place`; less is better.
    fn load(&self, place: usize) -> f64;
}

/// State of a route between two choices.
#[derive(Clone, Debug)]
pub struct Chooser {
    cursor: usize,
    random: u64,
}

impl Chooser {
    /// A chooser whose draws follow from `seed`.
    pub fn new(seed: u64) -> Chooser {
        Chooser {
            cursor: seed as usize & 0xff,
            random: seed | 1,
        }
    }

    /// The place of the instance that gets the request, or `None` when none is routable.
    pub fn choose(
        &mut self,
        policy: Policy,
        hint: u64,
        candidates: &impl Candidates,
    ) -> Option<usize> {
        let len = candidates.len();
        if len == 0 {
            return None;
        }
        match policy {
            Policy::RoundRobin => self.next_in_turn(candidates),
            Policy::Random => self.any(candidates),
            Policy::PowerOfTwoChoices => self.better_of_two(candidates),
            // What is in a cache is weighed by who knows of caches.
            Policy::LeastLoaded | Policy::Kv => {
                self.least(candidates, |place| candidates.load(place))
            }
            Policy::Direct => (0..len)
                .find(|&place| candidates.id(place) == hint && candidates.is_routable(place)),
            Policy::Hash if hint == 0 => self.next_in_turn(candidates),
            Policy::Hash => rendezvous(hint, candidates),
        }
    }

    fn next_in_turn(&mut self, candidates: &impl Candidates) -> Option<usize> {
        let place = from(self.cursor % candidates.len(), candidates)?;
        self.cursor = place + 1;
        Some(place)
    }

    /// Any routable one. A few draws keep the neighbours of one that is not routable from getting
    /// its share; then the next in turn.
    fn any(&mut self, candidates: &impl Candidates) -> Option<usize> {
        let len = candidates.len();
        let drawn = (0..4)
            .map(|_| self.draw(len))
            .find(|&place| candidates.is_routable(place));
        drawn.or_else(|| from(self.draw(len), candidates))
    }

    fn better_of_two(&mut self, candidates: &impl Candidates) -> Option<usize> {
        let first = self.any(candidates)?;
        let drawn = (0..4).find_map(|_| self.any(candidates).filter(|&place| place != first));
        let second = drawn.or_else(|| from((first + 1) % candidates.len(), candidates))?;
        let better = candidates.load(second) < candidates.load(first);
        Some(if better { second } else { first })
    }

    /// The routable place with the least `cost`; ties by chance.
    pub fn least(
        &mut self,
        candidates: &impl Candidates,
        cost: impl Fn(usize) -> f64,
    ) -> Option<usize> {
        let len = candidates.len();
        // Beginning anywhere spreads ties.
        let start = self.draw(len);
        let mut best: Option<(usize, f64)> = None;
        for place in (0..len).map(|step| (start + step) % len) {
            if !candidates.is_routable(place) {
                continue;
            }
            let cost = cost(place);
            if best.is_none_or(|(_, least)| cost < least) {
                best = Some((place, cost));
            }
        }
        best.map(|(place, _)| place)
    }

    /// A routable place by chance, one with less `cost` more often: with costs scaled to 0 to 1, in
    /// proportion to exp(-cost / temperature), which must be above 0.
    pub fn soft_least(
        &mut self,
        candidates: &impl Candidates,
        temperature: f64,
        cost: impl Fn(usize) -> f64,
    ) -> Option<usize> {
        let routable = || (0..candidates.len()).filter(|&place| candidates.is_routable(place));
        let least = routable().map(&cost).fold(f64::INFINITY, f64::min);
        let most = routable().map(&cost).fold(f64::NEG_INFINITY, f64::max);
        let range = if most > least { most - least } else { 1.0 };
        let weight = |place: usize| (-(cost(place) - least) / range / temperature).exp();
        let sum: f64 = routable().map(weight).sum();
        let mut left = sum * self.draw(1 << 24) as f64 / (1 << 24) as f64;
        let mut last = None;
        for place in routable() {
            last = Some(place);
            left -= weight(place);
            if left < 0.0 {
                break;
            }
        }
        last
    }

    /// Uniform in `0..len` (xorshift64*; the multiply-shift keeps the bias below 2^-32).
    fn draw(&mut self, len: usize) -> usize {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let bits = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        ((bits * len as u64) >> 32) as usize
    }
}

/// The first routable place from `start` on, going round.
fn from(start: usize, candidates: &impl Candidates) -> Option<usize> {
    let len = candidates.len();
    (0..len)
        .map(|step| (start + step) % len)
        .find(|&place| candidates.is_routable(place))
}

/// The routable instance with the highest score for this hint: when one leaves, only its share
/// moves.
fn rendezvous(hint: u64, candidates: &impl Candidates) -> Option<usize> {
    let routable = (0..candidates.len()).filter(|&place| candidates.is_routable(place));
    routable.max_by_key(|&place| mix(hint ^ mix(candidates.id(place))))
}

/// Hash of an affinity header's value; never 0, which means "no header".
pub fn hash_hint(value: &[u8]) -> u64 {
    let seed = value.len() as u64;
    let folded = value.chunks(8).fold(seed, |hash, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        mix(hash ^ u64::from_le_bytes(word))
    });
    folded.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(Vec<(u64, bool, f64)>);

    impl Candidates for Fixed {
        fn len(&self) -> usize {
            self.0.len()
        }
        fn is_routable(&self, place: usize) -> bool {
            self.0[place].1
        }
        fn id(&self, place: usize) -> u64 {
            self.0[place].0
        }
        fn load(&self, place: usize) -> f64 {
            self.0[place].2
        }
    }

    fn four() -> Fixed {
        Fixed(vec![
            (10, true, 3.0),
            (11, true, 1.0),
            (12, false, 0.0),
            (13, true, 2.0),
        ])
    }

    fn counts(policy: Policy, candidates: &Fixed) -> Vec<usize> {
        let mut chooser = Chooser::new(7);
        let mut counts = vec![0; candidates.0.len()];
        for hint in 1..=3000 {
            counts[chooser.choose(policy, hint, candidates).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn round_robin_is_even_over_the_routable() {
        assert_eq!(counts(Policy::RoundRobin, &four()), [1000, 1000, 0, 1000]);
    }

    #[test]
    fn random_and_hash_reach_all_routable_and_no_other() {
        for policy in [Policy::Random, Policy::Hash] {
            let counts = counts(policy, &four());
            assert_eq!(counts[2], 0);
            assert!(
                counts.iter().filter(|&&count| count > 600).count() == 3,
                "{counts:?}"
            );
        }
    }

    #[test]
    fn least_loaded_takes_the_least_and_two_choices_never_the_worst() {
        assert_eq!(counts(Policy::LeastLoaded, &four()), [0, 3000, 0, 0]);
        let counts = counts(Policy::PowerOfTwoChoices, &four());
        assert!(
            counts[1] > counts[3] && counts[3] > 500 && counts[0] == 0,
            "{counts:?}"
        );
    }

    #[test]
    fn a_soft_choice_prefers_what_costs_less_and_reaches_all_routable() {
        let candidates = four();
        let counts = |temperature: f64| {
            let (mut chooser, mut counts) = (Chooser::new(7), [0; 4]);
            for _ in 0..3000 {
                let cost = |place: usize| candidates.load(place);
                let place = chooser.soft_least(&candidates, temperature, cost);
                counts[place.unwrap()] += 1;
            }
            counts
        };
        let soft = counts(1.0);
        assert!(
            soft[1] > soft[3] && soft[3] > soft[0] && soft[0] > 300,
            "{soft:?}"
        );
        assert_eq!(soft[2], 0);
        assert_eq!(counts(0.001), [0, 3000, 0, 0]);
        let nobody = Fixed(vec![(1, false, 0.0)]);
        assert_eq!(Chooser::new(3).soft_least(&nobody, 1.0, |_| 0.0), None);
    }

    #[test]
    fn direct_takes_the_one_named_or_none() {
        let mut chooser = Chooser::new(1);
        assert_eq!(chooser.choose(Policy::Direct, 13, &four()), Some(3));
        assert_eq!(chooser.choose(Policy::Direct, 12, &four()), None);
        assert_eq!(chooser.choose(Policy::Direct, 99, &four()), None);
    }

    #[test]
    fn rendezvous_moves_only_the_share_of_the_one_that_left() {
        let (all, mut fewer) = (four(), four());
        fewer.0[1].1 = false;
        for hint in 1..500 {
            let before = rendezvous(hint, &all).unwrap();
            let after = rendezvous(hint, &fewer).unwrap();
            assert!(before == after || before == 1);
        }
    }

    #[test]
    fn nobody_routable_is_none_for_every_policy() {
        let nobody = Fixed(vec![(1, false, 0.0)]);
        for policy in [
            Policy::RoundRobin,
            Policy::Random,
            Policy::PowerOfTwoChoices,
            Policy::LeastLoaded,
            Policy::Direct,
            Policy::Hash,
            Policy::Kv,
        ] {
            assert_eq!(Chooser::new(3).choose(policy, 1, &nobody), None);
            assert_eq!(Chooser::new(3).choose(policy, 1, &Fixed(vec![])), None);
        }
    }
}
