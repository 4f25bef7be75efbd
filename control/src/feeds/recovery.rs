//! Asks workers what is in their KV caches: what was published before we listened, and what was
//! lost on the way.
//!
//! ```text
//! v1/event_sources/.. --watch--> sources --> Digest --Ask--> [calls of this process] --> worker
//!                                              ^------ its answer, or why there is none --'
//! ```
//!
//! Calls are made by a thread of its own, begun when the first worker is found that can be asked:
//! a large answer delays no request.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::event::{EventKey, EventSourceRecord, SOURCES_BUCKET, Scope, topic, typed};
use corelane_codec::item::from_bytes;
use corelane_codec::path::EndpointId;
use corelane_engine::kv::RankId;
use serde_json::Value;
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::{sleep, timeout};

use super::asking::{Ask, Source, Target};
use super::caches::RANKS_MAX;
use crate::component::{Options, Runtime};
use crate::config::{Config, Drain};
use crate::discovery::{Discovery, MemoryStore, Watch};
use crate::nats::RequestPlane;
use crate::watch::{Instance, dial};

/// Questions under way at the same time: their answers are held in memory.
const ASKS_MAX: usize = 4;
/// Attempts of one question.
const ATTEMPTS: u32 = 3;
/// Pause before the second attempt; it doubles.
const PAUSE: Duration = Duration::from_millis(200);
/// Longest wait for one answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Asks for all feeds of a router.
pub(super) struct Recovery {
    options: Options,
    runtime: OnceCell<Runtime>,
    turns: Semaphore,
}

impl Recovery {
    /// Nothing is begun before the first question.
    ///
    /// # Errors
    /// The environment says what no call can be made with.
    pub(super) fn new(config: &Config) -> anyhow::Result<Recovery> {
        let mut server = config.server.clone();
        if server.home_host != server.host {
            // What is advertised is another address.
            (server.host, server.advertise_host) = (server.home_host, None);
        }
        let nothing = Drain {
            grace_s: 0,
            timeout_s: 0,
        };
        let options = Options::of_command(server, config.discovery.clone(), nothing)?;
        let options = options.calls_only().calls_max(2 * ASKS_MAX as u32);
        let options = options.status(None).signals(false);
        // Whom to call is known already, and he who is on NATS is called by our gateway.
        let options = options.memory(&MemoryStore::default());
        Ok(Recovery {
            options: options.request_plane(RequestPlane::Tcp),
            runtime: OnceCell::new(),
            turns: Semaphore::new(ASKS_MAX),
        })
    }

    /// Asks, and answers with the item in MessagePack.
    ///
    /// # Errors
    /// Why there is no answer.
    pub(super) async fn ask(&self, ask: &Ask) -> Result<Vec<u8>, String> {
        let _turn = self.turns.acquire().await.map_err(|why| why.to_string())?;
        let runtime = self.runtime.get_or_try_init(|| async {
            let started = Runtime::start(self.options.clone()).await;
            started.map_err(|why| format!("calls cannot be made: {why:#}"))
        });
        let runtime = runtime.await?;
        let mut pause = PAUSE;
        for _ in 1..ATTEMPTS {
            if let Ok(answer) = call(runtime, ask).await {
                return Ok(answer);
            }
            sleep(pause).await;
            pause *= 2;
        }
        call(runtime, ask).await
    }

    /// No more questions.
    pub(super) async fn stop(&self) {
        self.turns.close();
        if let Some(runtime) = self.runtime.get() {
            runtime.stop().await;
        }
    }
}

async fn call(runtime: &Runtime, ask: &Ask) -> Result<Vec<u8>, String> {
    let client = runtime.client_of_instance(&ask.target.endpoint, &ask.target.instance);
    let call = client
        .request(&ask.query())
        .map_err(|why| why.to_string())?
        .within(ANSWER_MAX);
    let answer = async {
        let mut reply = client.send(call).await.map_err(|why| why.to_string())?;
        let item = match reply.next_item().await {
            Some(item) => item.map_err(|why| why.to_string())?,
            None => return Err("the response is empty".to_owned()),
        };
        match reply.codec() {
            PayloadCodec::MessagePack => Ok(item),
            PayloadCodec::Json => packed(&item),
        }
    };
    let late = |_| format!("no answer in {ANSWER_MAX:?}");
    timeout(2 * ANSWER_MAX, answer).await.map_err(late)?
}

/// An item in JSON, in MessagePack.
fn packed(item: &[u8]) -> Result<Vec<u8>, String> {
    let value: Value = from_bytes(item, PayloadCodec::Json).map_err(|why| why.to_string())?;
    typed::to_payload(&value).map_err(|why| why.to_string())
}

/// Who publishes KV events of a target, by publisher.
pub(super) struct Sources {
    watch: Watch<EventSourceRecord>,
    gateway: Option<SocketAddr>,
}

impl Sources {
    pub(super) fn new(
        discovery: &Discovery,
        target: &EndpointId,
        gateway: Option<SocketAddr>,
    ) -> Sources {
        let scope = Scope::of(target.clone());
        let prefix = EventKey::prefix(SOURCES_BUCKET, &scope, topic::KV_EVENTS);
        let watch = discovery.watch(&prefix, |_, value| serde_json::from_slice(value));
        Sources { watch, gateway }
    }

    /// Waits until they may have changed. Cancel safe.
    pub(super) async fn changed(&mut self) {
        self.watch.changed().await;
    }

    /// Those that are there.
    pub(super) fn list(&self) -> HashMap<u64, Source> {
        let directory = self.watch.directory();
        let sources = directory.entries().filter_map(|(key, record, _)| {
            let source = source(record, self.gateway);
            match source {
                Ok(source) => Some((record.publisher_id, source)),
                Err(why) => {
                    tracing::debug!(key, why, "no source of KV events");
                    None
                }
            }
        });
        sources.take(RANKS_MAX).collect()
    }
}

fn source(record: &EventSourceRecord, gateway: Option<SocketAddr>) -> Result<Source, String> {
    let metadata = record.kv().map_err(|why| why.to_string())?;
    let rank = RankId {
        worker_id: metadata.worker.worker_id,
        dp_rank: metadata.worker.dp_rank,
    };
    let target = metadata.recovery_target.and_then(|target| {
        let dialled = dial(&target.transport, gateway);
        if let Err(why) = &dialled {
            let worker = format_args!("{:x}", rank.worker_id);
            tracing::debug!(%worker, %why, "a worker cannot be asked for its KV cache");
        }
        let (address, path) = dialled.ok()?;
        Some(Target {
            endpoint: target.endpoint_id(),
            instance: Instance {
                id: target.instance_id,
                address,
                path,
                codec: target.payload_codec(),
                device: target.device_type,
            },
        })
    });
    Ok(Source { rank, target })
}
