//! `corelane serve`: the router until it is told to stop.

use std::rc::Rc;

use anyhow::{Context, Result};
use tokio::runtime::Builder;
use tokio::task::LocalSet;

use crate::activation::Handed;
use crate::bridge::Bridge;
use crate::broker::Broker;
use crate::broker_metrics;
use crate::cli::{Exit, ServeArgs};
use crate::config::Config;
use crate::env::Env;
use crate::gpu_memory::{GpuMemory, Names};
use crate::gpu_metrics;
use crate::logging;
use crate::nats::NatsOptions;
use crate::planner::Feed;
use crate::preflight::{self, Plan};
use crate::signals::{Hangups, Signals};
use crate::supervise::{Router, Store};
use crate::trace;

/// Runs the router.
///
/// # Errors
/// The host cannot do what is required, a port is taken, or the store cannot be reached.
pub fn serve(args: ServeArgs) -> Result<Exit> {
    let mut config = args.config;
    logging::change(config.control.log.as_deref());
    let handed = Handed::take(&Env::current())?;
    handed.configure(&mut config)?;
    let mut plan = preflight::plan(&config)?;
    handed.distribute(&mut plan)?;
    pin(plan.control_cpu);
    on_this_thread(async move {
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let hangups = Hangups::catch().context("cannot catch signals")?;
        let gpu = gpu_memory(&config)?;
        let broker = broker(&config, &plan)?;
        let bridge = bridge(&config, broker.as_deref()).await?;
        let planner = config.planner.as_ref().map(Feed::start).transpose()?;
        let started = tokio::select! {
            router = Router::start(&config, &plan, Store::Configured) => Some(router?),
            name = signals.next() => {
                tracing::info!("{name} before everything had started: ending");
                None
            }
        };
        match started {
            Some(mut router) => {
                router.offer();
                router.reload_with(args.inputs, &config, hangups);
                if let Some(planner) = planner {
                    router.add_metrics(Box::new(move |out| planner.write(out)));
                }
                if let Some(gpu) = gpu.clone() {
                    router.add_metrics(Box::new(move |out| gpu_metrics::write(&gpu, out)));
                }
                if let Some(broker) = broker.clone() {
                    let discovery = router.discovery().clone();
                    broker.offer(&discovery).await;
                    let turns = Rc::clone(&broker);
                    router.watch("the event broker", Box::new(move || turns.turns()));
                    router.add_metrics(Box::new(move |out| broker_metrics::write(&broker, out)));
                }
                if let Some(bridge) = bridge.clone() {
                    router.add_metrics(Box::new(move |out| bridge.write_metrics(out)));
                }
                let failed = async {
                    tokio::select! {
                        () = ended(gpu.as_deref(), GpuMemory::ended) => {
                            tracing::error!("the GPU memory service has ended by itself");
                        }
                        () = ended(broker.as_deref(), Broker::ended) => {}
                    }
                };
                let stop = async {
                    if let Some(gpu) = &gpu {
                        gpu.stop().await;
                    }
                    if let Some(bridge) = &bridge {
                        bridge.stop().await;
                    }
                    if let Some(broker) = &broker {
                        broker.stop();
                    }
                };
                Ok(router.run(signals, failed, stop).await)
            }
            None => Ok(Exit::Done),
        }
    })
}

/// The GPU memory service, if the configuration has one.
fn gpu_memory(config: &Config) -> Result<Option<Rc<GpuMemory>>> {
    let gpu = config.gpu.as_ref();
    let started = gpu.map(|gpu| GpuMemory::start(gpu, &Names::default()));
    Ok(started.transpose()?.map(Rc::new))
}

/// The broker of events, if the configuration has one.
fn broker(config: &Config, plan: &Plan) -> Result<Option<Rc<Broker>>> {
    let Some((broker, shard)) = config.broker.as_ref().zip(plan.shards.first()) else {
        return Ok(None);
    };
    Ok(Some(Broker::start(config, broker, shard.config.ring)?))
}

/// What joins the broker to others, if the configuration has it.
async fn bridge(config: &Config, broker: Option<&Broker>) -> Result<Option<Rc<Bridge>>> {
    let settings = config
        .broker
        .as_ref()
        .and_then(|broker| broker.bridge.as_ref());
    let Some((settings, broker)) = settings.zip(broker) else {
        return Ok(None);
    };
    let options = NatsOptions::read(&Env::current())?;
    let security = config.curve.load()?.dials;
    Ok(Some(
        Bridge::start(settings, &options, security, broker).await?,
    ))
}

/// Waits for the end of a part of this process, if there is that part.
async fn ended<T>(part: Option<&T>, wait: impl AsyncFn(&T)) {
    match part {
        Some(part) => wait(part).await,
        None => std::future::pending().await,
    }
}

/// Runs `work` on a runtime of this thread.
pub(super) fn on_this_thread<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    trace::export();
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot make the control runtime")?;
    let local = LocalSet::new();
    let outcome = local.block_on(&runtime, work);
    // Tasks may hold what others wait for: they go first, and nobody waits for file work.
    drop(local);
    runtime.shutdown_background();
    outcome
}

/// Makes this thread the control core's. Threads that it starts begin on the same CPU; shards
/// move to their own.
pub(super) fn pin(cpu: usize) {
    if let Err(error) = corelane_engine::placement::pin_current_thread(cpu) {
        tracing::warn!(cpu, %error, "the control core is not pinned");
    }
}
