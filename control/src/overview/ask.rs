//! Questions to the cores, and what of their answers comes in time.

use std::rc::Rc;
use std::sync::Arc;

use corelane_engine::shard::Command;
use corelane_engine::weigh::{Question, Weighing};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{ANSWER_MAX, UNANSWERED_MAX};
use crate::cores::Cores;

/// Who asks the cores.
pub(super) struct Asker {
    cores: Rc<Cores>,
    /// One for each core; each of its questions that stands holds a clone.
    open: Vec<Arc<()>>,
}

impl Asker {
    pub(super) fn new(cores: &Rc<Cores>) -> Self {
        Self {
            cores: Rc::clone(cores),
            open: (0..cores.count()).map(|_| Arc::new(())).collect(),
        }
    }

    /// What each core says of the routes at these places of the directory, by route and then by
    /// core; `None` where it says nothing in time, or does not know the route.
    pub(super) async fn ask(
        &self,
        places: &[usize],
        headers: &[u8],
        candidates_max: usize,
    ) -> Vec<Vec<Option<Weighing>>> {
        let mut answers = vec![vec![None; self.open.len()]; places.len()];
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let commands = self.cores.commands();
        for (core, (commands, open)) in commands.iter().zip(&self.open).enumerate() {
            for (route, place) in places.iter().enumerate() {
                if Arc::strong_count(open) > UNANSWERED_MAX {
                    break;
                }
                let (sender, open) = (sender.clone(), Arc::clone(open));
                let answer = move |weighing| {
                    drop(open);
                    // Nobody waits any more: it has come too late.
                    let _ = sender.send((route, core, weighing));
                };
                let question = Question {
                    route: u32::try_from(*place).unwrap_or(u32::MAX),
                    headers: headers.to_vec(),
                    prompt: Vec::new(),
                    candidates_max,
                    answer: Box::new(answer),
                };
                // A full queue is an answer: none.
                let _ = commands.push(Command::Weigh(Box::new(question)));
            }
            commands.wake();
        }
        drop(sender);
        let all = async {
            while let Some((route, core, weighing)) = receiver.recv().await {
                answers[route][core] = Some(weighing);
            }
        };
        let _ = timeout(ANSWER_MAX, all).await;
        answers
    }
}
