//! The life of a program that is all runtime: its own work, signals, and the order in which both
//! end.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::time::timeout;

use super::options::Options;
use super::runtime::Runtime;
use crate::signals::Signals;

/// Runs `main` until it returns, a signal comes, or a shard fails; see [`Runtime::run`].
pub(super) async fn run<T>(
    options: Options,
    main: impl AsyncFnOnce(Runtime) -> Result<T>,
) -> Result<Option<T>> {
    let mut signals = match options.signals {
        true => Some(Signals::catch().context("cannot catch signals")?),
        false => None,
    };
    let work_max = options.work_max;
    let runtime = tokio::select! {
        started = Runtime::start(options) => started?,
        name = next(&mut signals) => {
            tracing::info!("{name} before everything had started: ending");
            return Ok(None);
        }
    };
    let ending = runtime.clone();
    let life = async {
        let mut work = pin!(main(runtime.clone()));
        let outcome = tokio::select! {
            outcome = &mut work => Some(outcome),
            () = runtime.stopping() => None,
            () = runtime.failed() => {
                runtime.stop().await;
                bail!("a core has ended by itself")
            }
        };
        match outcome {
            Some(outcome) => {
                runtime.stop().await;
                outcome.map(Some)
            }
            None => after(&runtime, work, work_max).await,
        }
    };
    let mut life = pin!(life);
    tokio::select! {
        outcome = &mut life => return outcome,
        name = next(&mut signals) => {
            tracing::info!("{name}: draining; a second signal ends at once");
        }
    }
    let stop = async {
        ending.stop().await;
        std::future::pending().await
    };
    tokio::select! {
        outcome = life => outcome,
        () = stop => Ok(None),
        name = next(&mut signals) => bail!("{name} again: ended at once"),
    }
}

/// The rest of the program's own work once the runtime is stopping.
async fn after<T>(
    runtime: &Runtime,
    work: impl Future<Output = Result<T>>,
    patience: Duration,
) -> Result<Option<T>> {
    let mut work = pin!(work);
    tokio::select! {
        outcome = &mut work => {
            runtime.drained().await;
            return outcome.map(Some);
        }
        () = runtime.drained() => {}
    }
    match timeout(patience, work).await {
        Ok(outcome) => outcome.map(Some),
        Err(_) => bail!("the program's own work goes on {patience:?} after everything stopped"),
    }
}

async fn next(signals: &mut Option<Signals>) -> &'static str {
    match signals {
        Some(signals) => signals.next().await,
        None => std::future::pending().await,
    }
}
