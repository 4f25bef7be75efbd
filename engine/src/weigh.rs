//! What a core would choose for a request, and why: control asks, nothing is sent, and nothing
//! changes.

use std::fmt;
use std::net::SocketAddr;

use crate::decode;
use crate::directory::KvRule;
use crate::forward::{self, View};
use crate::in_flight::Request;
use crate::kv::{self, Costs, PROMPT_BLOCKS_MAX, Prompt, Source};
use crate::lane;
use crate::load::Work;
use crate::ring::Ring;
use crate::route::Candidates;
use crate::shard::Shard;
use crate::table::NONE;

/// Asks a core what it would choose.
pub struct Question {
    /// Index of the route in the directory.
    pub route: u32,
    /// Headers, as a request frame has them; empty for none.
    pub headers: Vec<u8>,
    /// Hashes of the prompt's blocks; if there are none, what the headers say of the prompt counts.
    pub prompt: Vec<u64>,
    /// So many candidates are listed, at most, and the chosen one in any case.
    pub candidates_max: usize,
    /// Is called with the answer on the core's thread, so it must be quick; dropped uncalled if
    /// there is no such route.
    pub answer: Box<dyn FnOnce(Weighing) + Send>,
}

impl fmt::Debug for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (blocks, headers) = (self.prompt.len(), self.headers.len());
        let route = self.route;
        write!(
            f,
            "Question {{ route: {route}, headers: {headers} bytes, blocks: {blocks} }}"
        )
    }
}

/// A choice, and what it was made by.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Weighing {
    /// Blocks of the prompt.
    pub prompt_blocks: u32,
    /// Where they came from; a prompt that stands in the question counts as [`Source::Headers`].
    pub prompt: Source,
    /// What the policy has taken from the headers: an instance id, or a hash; 0 for nothing.
    pub hint: u64,
    /// The core refuses new requests because the process is to end.
    pub draining: bool,
    /// In the order of their ids.
    pub candidates: Vec<Weighed>,
    /// Candidates that are not listed.
    pub left_out: usize,
    /// The instance that would get the request.
    pub chosen: Option<u64>,
}

/// One candidate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weighed {
    /// Instance id.
    pub id: u64,
    /// Where it is dialled; `None` for a worker behind a lane.
    pub address: Option<SocketAddr>,
    /// Why it gets nothing now.
    pub barrier: Option<Barrier>,
    /// Blocks of the prompt in its cache, from the first on; of its ranks the best counts.
    pub overlap_blocks: u32,
    /// What it is busy with.
    pub busy: Work,
    /// Whether that is what it reports, and not what this core has counted.
    pub is_reported: bool,
    /// What policies by load compare.
    pub load: f64,
    /// What the policy `kv` compares.
    pub cost: f64,
    /// What this core has seen of it.
    pub seen: Seen,
}

/// What a core has counted of an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Requests given to it and not answered.
    pub unanswered: u32,
    /// Responses of its that are relayed and have not ended; requests of a lane.
    pub streams: u32,
    /// Requests that it has accepted.
    pub answered: u64,
    /// Requests that it has refused or lost.
    pub failed: u64,
}

/// Why an instance gets nothing now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barrier {
    /// It said that it is gone, or did not answer, and is left alone for a while.
    Inhibited {
        /// For so long.
        left_ns: u64,
    },
    /// There is no connection to it.
    Unreachable,
    /// It said that it is overloaded.
    Overloaded {
        /// It is left alone for so long.
        left_ns: u64,
    },
    /// As much waits for it as may.
    QueueFull,
    /// A worker behind a lane that wants no new requests.
    Closing,
}

impl Barrier {
    /// Its word in reports.
    pub fn word(self) -> &'static str {
        match self {
            Barrier::Inhibited { .. } => "inhibited",
            Barrier::Unreachable => "unreachable",
            Barrier::Overloaded { .. } => "overloaded",
            Barrier::QueueFull => "queue_full",
            Barrier::Closing => "closing",
        }
    }

    /// How long it lasts, in ns, if that is known.
    pub fn left_ns(self) -> Option<u64> {
        match self {
            Barrier::Inhibited { left_ns } | Barrier::Overloaded { left_ns } => Some(left_ns),
            Barrier::Unreachable | Barrier::QueueFull | Barrier::Closing => None,
        }
    }
}

/// Answers a question.
pub(crate) fn answer<R: Ring>(shard: &mut Shard<R>, question: Question) {
    let Some(route) = shard.directory.routes.get(question.route as usize) else {
        return;
    };
    let (rule, is_lane) = (route.kv, route.lane);
    let hint = decode::hint(shard, question.route, &question.headers);
    let mut weighing = match is_lane {
        true => lane::weigh(shard, question.route, hint),
        false => {
            let prompt = prompt(&question, rule);
            weigh(shard, question.route, hint, &prompt)
        }
    };
    weighing.hint = hint;
    weighing.draining = shard.draining;
    cut(&mut weighing, question.candidates_max);
    (question.answer)(weighing);
}

/// Leaves candidates out, but not the chosen one.
fn cut(weighing: &mut Weighing, most: usize) {
    let chosen = weighing.chosen;
    let all = weighing.candidates.len();
    let mut place = 0;
    weighing.candidates.retain(|one| {
        place += 1;
        place <= most || Some(one.id) == chosen
    });
    weighing.left_out = all - weighing.candidates.len();
}

/// A prompt of its own: that of the shard may belong to a request.
fn prompt(question: &Question, rule: Option<KvRule>) -> Prompt {
    let mut prompt = Prompt::new();
    match rule {
        Some(_) if !question.prompt.is_empty() => {
            let blocks = question.prompt.len().min(PROMPT_BLOCKS_MAX);
            prompt.set(&question.prompt[..blocks]);
        }
        Some(rule) => prompt.read_headers(&question.headers, rule.block_tokens),
        None => {}
    }
    prompt
}

fn weigh<R: Ring>(shard: &mut Shard<R>, route: u32, hint: u64, prompt: &Prompt) -> Weighing {
    let rules = &shard.directory.routes[route as usize];
    let (rule, policy) = (rules.kv, rules.policy);
    let state = &shard.routes[route as usize];
    match rule {
        Some(rule) => shard.kv.measure(rule, &state.ids, Some(prompt.hashes())),
        None => shard.kv.overlaps.clear(),
    }
    let request = Request::new(NONE, route, shard.now_ns);
    let view = forward::view_of(shard, &request);
    let prompt_blocks = prompt.hashes().len() as u32;
    let costs = rule.map(|rule| Costs {
        view: &view,
        overlaps: &shard.kv.overlaps,
        rule,
        prompt_blocks,
    });
    let mut chooser = state.chooser.clone();
    let chosen = match &costs {
        Some(costs) => kv::draw(&mut chooser, costs),
        None => chooser.choose(policy, hint, &view),
    };
    let candidates = (0..view.len()).map(|place| weighed(&view, costs.as_ref(), place));
    Weighing {
        prompt_blocks,
        prompt: prompt.source(),
        candidates: candidates.collect(),
        chosen: chosen.map(|place| view.id(place)),
        ..Weighing::default()
    }
}

fn weighed(view: &View<'_>, costs: Option<&Costs<'_>>, place: usize) -> Weighed {
    let (address, seen) = view.seen(place);
    Weighed {
        id: view.id(place),
        address: Some(address),
        barrier: view.barrier(place),
        overlap_blocks: costs.map_or(0, |costs| costs.overlap(place)),
        busy: view.busy(place),
        is_reported: view.is_reported(place),
        load: view.load(place),
        cost: costs.map_or(0.0, |costs| costs.at(place)),
        seen,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(id: u64) -> Weighed {
        Weighed {
            id,
            address: None,
            barrier: None,
            overlap_blocks: 0,
            busy: Work::default(),
            is_reported: false,
            load: 0.0,
            cost: 0.0,
            seen: Seen::default(),
        }
    }

    #[test]
    fn a_list_that_is_cut_keeps_the_chosen_one() {
        for (chosen, most, left) in [
            (Some(3), 2, vec![0, 1, 3]),
            (Some(1), 2, vec![0, 1]),
            (None, 1, vec![0]),
            (None, 9, vec![0, 1, 2, 3]),
        ] {
            let mut weighing = Weighing {
                candidates: (0..4).map(candidate).collect(),
                chosen,
                ..Weighing::default()
            };
            cut(&mut weighing, most);
            let ids: Vec<u64> = weighing.candidates.iter().map(|one| one.id).collect();
            assert_eq!((weighing.left_out, ids), (4 - left.len(), left));
        }
    }
}
