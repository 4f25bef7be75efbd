//! A choice in sentences: why this instance, and why not the others.

use corelane_codec::path::instance_hex;
use corelane_engine::directory::{Policy, Route};
use corelane_engine::kv::Source;
use corelane_engine::weigh::{Barrier, Weighed, Weighing};

/// A choice of a route.
pub(super) struct Reasons<'a> {
    route: &'a Route,
    weighing: &'a Weighing,
    chosen: Option<&'a Weighed>,
    /// Lanes know nothing of caches.
    by_cost: bool,
    drawn: bool,
}

impl<'a> Reasons<'a> {
    pub(super) fn new(route: &'a Route, weighing: &'a Weighing) -> Self {
        let mut candidates = weighing.candidates.iter();
        let chosen = candidates.find(|one| Some(one.id) == weighing.chosen);
        let rule = route.kv.filter(|_| !route.lane);
        Self {
            route,
            weighing,
            chosen,
            by_cost: route.policy == Policy::Kv && rule.is_some(),
            drawn: rule.is_some_and(|rule| rule.temperature_pct > 0),
        }
    }

    /// Why this one, or why none.
    pub(super) fn all(&self) -> String {
        let text = match self.chosen {
            Some(chosen) => self.of_chosen(chosen),
            None => self.of_none(),
        };
        match self.weighing.draining {
            true => "this core refuses new requests: the process is to end".to_owned(),
            false => text,
        }
    }

    /// Why, or why not, a candidate.
    pub(super) fn of(&self, one: &Weighed) -> String {
        if let Some(barrier) = one.barrier {
            return barred(barrier);
        }
        match self.chosen {
            Some(chosen) if chosen.id == one.id => self.of_chosen(one),
            Some(chosen) => self.of_other(one, chosen),
            None if self.route.policy == Policy::Direct => {
                "not the one that is asked for".to_owned()
            }
            None => "it could take the request".to_owned(),
        }
    }

    fn of_chosen(&self, one: &Weighed) -> String {
        let header = &self.route.header;
        match self.route.policy {
            _ if self.by_cost => self.of_cost(one),
            Policy::RoundRobin => "it is next in turn".to_owned(),
            Policy::Hash if self.weighing.hint == 0 => {
                format!("it is next in turn: the request has no header {header}")
            }
            Policy::Hash => format!("it scores highest for this value of {header}"),
            Policy::Random => "drawn by chance; another request may draw another".to_owned(),
            Policy::PowerOfTwoChoices => {
                let load = number(one.load);
                format!("drawn by chance, and not more loaded than the other one drawn: {load}")
            }
            Policy::LeastLoaded | Policy::Kv => {
                format!("it has the least load: {}", loaded(one))
            }
            Policy::Direct => format!("the header {header} names it"),
        }
    }

    fn of_cost(&self, one: &Weighed) -> String {
        let (cost, blocks) = (number(one.cost), self.weighing.prompt_blocks);
        let overlap = one.overlap_blocks;
        let how = match self.drawn {
            true => "drawn, more often the less it costs",
            false => "it costs least",
        };
        let prompt = match self.weighing.prompt {
            Source::Headers | Source::Body => format!("{overlap} of {blocks} blocks cached"),
            Source::Nothing => "the headers say nothing of the prompt".to_owned(),
            Source::Unreadable => "what the headers say of the prompt cannot be read".to_owned(),
        };
        format!("{how}: {cost}; {prompt}, {}", busy(one))
    }

    fn of_other(&self, one: &Weighed, chosen: &Weighed) -> String {
        let (load, least) = (number(one.load), number(chosen.load));
        match self.route.policy {
            _ if self.by_cost => {
                let (cost, least) = (number(one.cost), number(chosen.cost));
                let overlap = one.overlap_blocks;
                let cached = format!("{overlap} blocks cached, {}", busy(one));
                match one.cost.total_cmp(&chosen.cost) {
                    std::cmp::Ordering::Greater => {
                        format!("it costs more: {cost} against {least}; {cached}")
                    }
                    _ if self.drawn => format!("not drawn this time: {cost}; {cached}"),
                    _ => format!("it costs the same: {cost}; ties go by chance; {cached}"),
                }
            }
            Policy::RoundRobin => "its turn comes later".to_owned(),
            Policy::Hash if self.weighing.hint == 0 => "its turn comes later".to_owned(),
            Policy::Hash => "it scores lower for this value of the header".to_owned(),
            Policy::Random => "not drawn this time".to_owned(),
            Policy::PowerOfTwoChoices if one.load > chosen.load => {
                format!("not drawn this time, or more loaded: {load} against {least}")
            }
            Policy::PowerOfTwoChoices => format!("not drawn this time: {load}"),
            Policy::LeastLoaded | Policy::Kv if one.load > chosen.load => {
                format!("it is more loaded: {} against {least}", loaded(one))
            }
            Policy::LeastLoaded | Policy::Kv => {
                format!("it is loaded the same: {load}; ties go by chance")
            }
            Policy::Direct => "not the one that is asked for".to_owned(),
        }
    }

    fn of_none(&self) -> String {
        let (header, target) = (&self.route.header, &self.route.target);
        let candidates = &self.weighing.candidates;
        if candidates.is_empty() {
            return match self.route.lane {
                true => "no worker is attached".to_owned(),
                false => format!("discovery knows no instance of {target}"),
            };
        }
        if self.route.policy == Policy::Direct {
            let hint = self.weighing.hint;
            let there = candidates.iter().any(|one| one.id == hint);
            return match (hint, there) {
                (0, _) => format!("the header {header} is missing, or names no instance"),
                (_, true) => "the one that is asked for gets nothing now".to_owned(),
                (_, false) => {
                    let id = instance_hex(hint);
                    format!("the header {header} asks for {id}, which discovery does not know")
                }
            };
        }
        "none of the candidates gets anything now".to_owned()
    }
}

fn barred(barrier: Barrier) -> String {
    let for_so_long = |left_ns: u64| format!("{:.1} s", left_ns as f64 / 1e9);
    match barrier {
        Barrier::Inhibited { left_ns } => format!(
            "it said that it is gone, or did not answer, and is left alone for {}",
            for_so_long(left_ns)
        ),
        Barrier::Unreachable => "there is no connection to it".to_owned(),
        Barrier::Overloaded { left_ns } => format!(
            "it said that it is overloaded, and is left alone for {}",
            for_so_long(left_ns)
        ),
        Barrier::QueueFull => "as much waits for it as may".to_owned(),
        Barrier::Closing => "it takes no new requests: it is leaving".to_owned(),
    }
}

fn loaded(one: &Weighed) -> String {
    let load = number(one.load);
    match one.is_reported {
        true => format!("{load}, which it reports"),
        false => load,
    }
}

fn busy(one: &Weighed) -> String {
    let (prefill, decode) = (
        number(one.busy.prefill_blocks),
        number(one.busy.decode_blocks),
    );
    let who = if one.is_reported {
        "it reports"
    } else {
        "busy with"
    };
    format!("{who} {prefill} blocks to compute and {decode} held")
}

/// At most two digits behind the point.
fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use corelane_engine::directory::KvRule;
    use corelane_engine::load::Work;
    use corelane_engine::weigh::Seen;

    use super::*;

    fn route(policy: Policy) -> Route {
        Route {
            listen: "a/router/g".into(),
            target: "a/worker/g".into(),
            policy,
            header: "x-session".into(),
            ..Route::default()
        }
    }

    fn candidate(id: u64, load: f64) -> Weighed {
        Weighed {
            id,
            address: None,
            barrier: None,
            overlap_blocks: 0,
            busy: Work::default(),
            is_reported: false,
            load,
            cost: 0.0,
            seen: Seen::default(),
        }
    }

    fn weighing(chosen: Option<u64>, hint: u64) -> Weighing {
        Weighing {
            candidates: vec![candidate(1, 1.0), candidate(2, 3.5), candidate(3, 1.0)],
            chosen,
            hint,
            ..Weighing::default()
        }
    }

    /// Of the choice as a whole, and of each candidate.
    fn said(route: &Route, weighing: &Weighing) -> (String, Vec<String>) {
        let reasons = Reasons::new(route, weighing);
        let each = weighing.candidates.iter().map(|one| reasons.of(one));
        (reasons.all(), each.collect())
    }

    #[test]
    fn every_policy_says_why_this_one_and_why_not_that() {
        for (policy, hint, all, other) in [
            (
                Policy::RoundRobin,
                0,
                "it is next in turn",
                "its turn comes later",
            ),
            (Policy::Random, 0, "drawn by chance", "not drawn this time"),
            (
                Policy::PowerOfTwoChoices,
                0,
                "not more loaded than the other one drawn: 1",
                "not drawn this time, or more loaded: 3.5 against 1",
            ),
            (
                Policy::LeastLoaded,
                0,
                "it has the least load: 1",
                "it is more loaded: 3.5 against 1",
            ),
            (
                Policy::Direct,
                1,
                "the header x-session names it",
                "not the one that is asked for",
            ),
            (
                Policy::Hash,
                7,
                "it scores highest for this value of x-session",
                "it scores lower for this value",
            ),
            (
                Policy::Hash,
                0,
                "it is next in turn: the request has no header x-session",
                "its turn comes later",
            ),
        ] {
            let (said_of_all, each) = said(&route(policy), &weighing(Some(1), hint));
            assert!(said_of_all.contains(all), "{policy:?}: {said_of_all}");
            assert_eq!(each[0], said_of_all, "{policy:?}");
            assert!(each[1].contains(other), "{policy:?}: {}", each[1]);
        }
        let (_, each) = said(&route(Policy::LeastLoaded), &weighing(Some(1), 0));
        assert_eq!(each[2], "it is loaded the same: 1; ties go by chance");
    }

    #[test]
    fn by_kv_cache_the_cost_is_taken_apart() {
        let mut route = route(Policy::Kv);
        route.kv = Some(KvRule {
            feed: 0,
            block_tokens: 4,
            body_bytes_max: 0,
            blocks_max: 1,
            ranks_max: 1,
            overlap_credit_pct: 100,
            prefill_scale_pct: 100,
            temperature_pct: 0,
        });
        let mut weighing = weighing(Some(1), 0);
        (weighing.prompt, weighing.prompt_blocks) = (Source::Headers, 8);
        weighing.candidates[0].overlap_blocks = 6;
        for (place, cost) in [10.0, 18.0, 10.0].into_iter().enumerate() {
            weighing.candidates[place].cost = cost;
        }
        let (all, each) = said(&route, &weighing);
        assert_eq!(
            all,
            "it costs least: 10; 6 of 8 blocks cached, busy with 0 blocks to compute and 0 held"
        );
        assert!(each[1].starts_with("it costs more: 18 against 10; 0 blocks cached, "));
        assert!(each[2].starts_with("it costs the same: 10; ties go by chance"));
        weighing.prompt = Source::Nothing;
        assert!(
            said(&route, &weighing)
                .0
                .contains("say nothing of the prompt")
        );
    }

    #[test]
    fn who_gets_nothing_is_told_apart() {
        let mut weighing = weighing(None, 0);
        let second_ns = 1_000_000_000;
        weighing.candidates[0].barrier = Some(Barrier::Inhibited {
            left_ns: 3 * second_ns,
        });
        weighing.candidates[1].barrier = Some(Barrier::Overloaded {
            left_ns: second_ns / 2,
        });
        weighing.candidates[2].barrier = Some(Barrier::Unreachable);
        let (all, each) = said(&route(Policy::LeastLoaded), &weighing);
        assert_eq!(all, "none of the candidates gets anything now");
        assert!(each[0].ends_with("left alone for 3.0 s"), "{}", each[0]);
        assert!(each[1].contains("overloaded") && each[1].ends_with("0.5 s"));
        assert_eq!(each[2], "there is no connection to it");
        weighing.draining = true;
        let (all, _) = said(&route(Policy::LeastLoaded), &weighing);
        assert!(all.contains("the process is to end"));
    }

    #[test]
    fn nobody_to_choose_has_its_reason() {
        let mut direct = weighing(None, 0x1f);
        let (all, _) = said(&route(Policy::Direct), &direct);
        assert_eq!(
            all,
            "the header x-session asks for 1f, which discovery does not know"
        );
        direct.hint = 0;
        let (all, each) = said(&route(Policy::Direct), &direct);
        assert_eq!(all, "the header x-session is missing, or names no instance");
        assert_eq!(each[0], "not the one that is asked for");
        let (all, _) = said(&route(Policy::Hash), &Weighing::default());
        assert_eq!(all, "discovery knows no instance of a/worker/g");
    }
}
