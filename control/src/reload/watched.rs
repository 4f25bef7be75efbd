//! One core is watched with a changed configuration.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::canary::{Tally, Watched};
use crate::config;
use crate::cores::Cores;

/// How often it is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Watches a core for as long as `rules` say. `Err` is why it is to be taken back: its requests
/// fail, it stands still, or it has ended.
pub(super) async fn watch(
    cores: &Cores,
    core: usize,
    rules: &config::Reload,
) -> Result<Watched, String> {
    let mut watched = Watched::default();
    if rules.watch.is_zero() {
        return Ok(watched);
    }
    let now = |index: usize| cores.stats(index).map(|stats| Tally::of(&stats.shard));
    let others = || {
        let others = (0..cores.count()).filter(|other| *other != core);
        others
            .filter_map(now)
            .fold(Tally::default(), |sum, one| sum + one)
    };
    let ended = || format!("core {core} has ended");
    let (before, others_before) = (now(core).ok_or_else(ended)?, others());
    watched.before = before;
    let began = Instant::now();
    let (mut turns, mut turned) = (cores.turns(core).ok_or_else(ended)?, began);
    let mut has_turned = false;
    loop {
        sleep(LOOK_EVERY).await;
        let seen = cores.turns(core).ok_or_else(ended)?;
        if seen != turns {
            (turns, turned, has_turned) = (seen, Instant::now(), true);
        } else if turned.elapsed() >= rules.taken_timeout {
            return Err(format!(
                "core {core} stands still since {:?}",
                turned.elapsed()
            ));
        }
        watched.core = now(core).ok_or_else(ended)? - before;
        watched.others = others() - others_before;
        let is_over = began.elapsed() >= rules.watch;
        if let Some(why) = watched.worse(rules.failures_pct, is_over) {
            return Err(format!("core {core}: {why}"));
        }
        if is_over && has_turned {
            return Ok(watched);
        }
    }
}
