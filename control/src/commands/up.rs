//! `corelane up`: a router, discovery in memory and echo workers, all in this process.

use std::future::poll_fn;
use std::task::Poll;

use anyhow::{Context, Result};

use super::serve::{on_this_thread, pin};
use crate::cli::{self, Exit, UpArgs};
use crate::component::Options;
use crate::config::{EndpointId, Server};
use crate::discovery::MemoryStore;
use crate::echo::EchoWorker;
use crate::preflight::{self, Plan};
use crate::signals::Signals;
use crate::supervise::{Router, Store};

/// Runs router and workers.
///
/// # Errors
/// The host cannot do what is required, or a port is taken.
pub fn up(args: UpArgs) -> Result<Exit> {
    let plan = preflight::plan(&args.config)?;
    on_this_thread(async move {
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let started = tokio::select! {
            started = start(&args, &plan) => started?,
            name = signals.next() => {
                tracing::info!("{name} before everything had started: ending");
                return Ok(Exit::Done);
            }
        };
        let (router, workers) = started;
        let (failed, stop) = (any_ended(&workers), stop(&workers));
        Ok(router.run(signals, failed, stop).await)
    })
}

async fn start(args: &UpArgs, plan: &Plan) -> Result<(Router, Vec<EchoWorker>)> {
    let config = &args.config;
    let target = config.routes.first().map(|route| route.target.clone());
    let target = target.context("there is no route")?;
    let store = MemoryStore::default();
    let server = Server {
        port: 0,
        ..config.server.clone()
    };
    let options = Options::of_command(server, config.discovery.clone(), config.drain)?;
    let options = options.memory(&store).calls_max(0).status(None);
    let mut workers = Vec::with_capacity(args.workers.into());
    for _ in 0..args.workers {
        workers.push(EchoWorker::start(options.clone(), &target, &args.answer).await?);
    }
    // Only now: the threads of workers are to go wherever there is room.
    pin(plan.control_cpu);
    let mut router = Router::start(config, plan, Store::Shared(store)).await?;
    router.offer();
    cli::print(&announcement(&router, &target, &workers))?;
    Ok((router, workers))
}

/// What listens where, and what to do next.
fn announcement(router: &Router, target: &EndpointId, workers: &[EchoWorker]) -> String {
    let mut lines = Vec::new();
    let paths = router.paths();
    for (listen, address) in &paths {
        lines.push(format!("router  {address}"));
        lines.push(format!(
            "        offers {listen}, its requests go to {target}"
        ));
    }
    for worker in workers {
        lines.push(format!("worker  {}", worker.called_at()));
    }
    if let Some(status) = router.status_address() {
        lines.push(format!(
            "status  http://{status}/health and http://{status}/metrics"
        ));
    }
    if let Some((listen, address)) = paths.first() {
        let program = program(std::env::args().next());
        lines.push("\nTry it in another shell; Ctrl-C in this one drains and ends:\n".to_owned());
        lines.push(format!(
            "  {program} call --endpoint {listen} --address {address}\n"
        ));
    }
    lines.join("\n") + "\n"
}

/// This program as it was called, so that the line can be copied.
fn program(called: Option<String>) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let copied = |called: &String| called.contains('/') && called.chars().all(plain);
    called
        .filter(copied)
        .unwrap_or_else(|| "corelane".to_owned())
}

/// Waits until a worker has ended by itself.
async fn any_ended(workers: &[EchoWorker]) {
    let ended = |worker| Box::pin(EchoWorker::failed(worker));
    let mut all: Vec<_> = workers.iter().map(ended).collect();
    poll_fn(|context| {
        match all
            .iter_mut()
            .any(|one| one.as_mut().poll(context).is_ready())
        {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
}

/// Lets the workers finish their responses, and stops them.
async fn stop(workers: &[EchoWorker]) {
    for worker in workers {
        worker.stop().await;
    }
    tracing::info!(workers = workers.len(), "workers stopped");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_named_as_it_was_called() {
        let named = |called: &str| program(Some(called.to_owned()));
        assert_eq!(named("target/release/corelane"), "target/release/corelane");
        assert_eq!(named("corelane"), "corelane");
        assert_eq!(named("/odd place/corelane"), "corelane");
        assert_eq!(program(None), "corelane");
    }
}
