//! What this process holds in its KV cache: published as it changes, and kept, so that a KV router
//! that comes later, or has missed something, can ask for it.
//!
//! ```text
//! stored, removed, cleared --> ledger --> event --> routers that listen
//!                                '--> worker_kv_query_source_ID <-- routers that ask
//! ```

use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use corelane_codec::event::typed::{KvAnswer, KvBlock, KvChange, KvEvent};
use corelane_codec::event::{KvQuery, KvWorker, topic};
use corelane_codec::item::write_value;
use corelane_codec::path::EndpointId;
use tokio::sync::watch;

use super::endpoint::Endpoint;
use super::error::{Error, Fault, Outcome};
use super::handler::{Request, Stream};
use super::kv_ledger::Ledger;
use crate::events::{EventsError, Publisher};
use crate::offer::{self, Place};

/// Blocks that are kept to be asked for; an answer about them has some 8 MB. Of a larger cache
/// nothing is told to whoever asks.
const KEPT_BLOCKS_MAX: usize = 1 << 17;

/// Why a KV cache cannot be told of.
#[derive(Debug, thiserror::Error)]
pub enum KvCacheError {
    /// Its events cannot be published.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// Nobody can ask for it.
    #[error(transparent)]
    Serve(#[from] Error),
}

/// The KV cache of one rank of this process, as KV routers know it. Clones share it, and may be
/// used from any thread.
#[derive(Clone)]
pub struct KvCache(Arc<Inner>);

struct Inner {
    publisher: Publisher,
    state: Arc<State>,
    /// Changes are published in the order of their numbers.
    turn: tokio::sync::Mutex<()>,
}

/// What whoever asks is told from.
struct State {
    ledger: Mutex<Ledger>,
    /// Our id in discovery.
    identity: watch::Receiver<u64>,
    dp_rank: u32,
}

impl State {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // It is whole between any two steps.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn worker(&self) -> KvWorker {
        KvWorker {
            worker_id: *self.identity.borrow(),
            dp_rank: self.dp_rank,
        }
    }

    /// The answer to a question.
    fn answer(&self, query: &KvQuery) -> KvAnswer {
        let worker = self.worker();
        if (query.worker_id, query.dp_rank) != (worker.worker_id, worker.dp_rank) {
            let (id, rank) = (worker.worker_id, worker.dp_rank);
            let error = format!("this is rank {rank} of worker {id}; ask discovery again");
            return KvAnswer::Error(error);
        }
        let ledger = self.ledger();
        let last_event_id = ledger.last_event_id();
        match query.start_event_id.unwrap_or(0) {
            start if start > last_event_id.saturating_add(1) => KvAnswer::TooNew {
                requested_start: start,
                requested_end: query.end_event_id,
                newest_available: last_event_id,
            },
            start if start > last_event_id => KvAnswer::Events {
                events: Vec::new(),
                last_event_id,
            },
            _ => match ledger.dump(worker) {
                Some(events) => KvAnswer::TreeDump {
                    events,
                    last_event_id,
                    reset_scope: "all".to_owned(),
                },
                None => KvAnswer::TreeDumpFailed {
                    last_event_id,
                    message: "the cache is larger than what is kept of it".to_owned(),
                },
            },
        }
    }
}

impl Endpoint {
    /// Tells KV routers what rank `dp_rank` of this process has in its KV cache, as an instance of
    /// this endpoint: what changes is published as events, and what is there is answered to whoever
    /// asks, under an endpoint beside this one.
    ///
    /// # Errors
    /// As [`Endpoint::publisher`] and [`Endpoint::serve`].
    pub async fn kv_cache(&self, dp_rank: u32) -> Result<KvCache, KvCacheError> {
        let publisher = self.publisher(topic::KV_EVENTS).await?;
        let inner = Rc::clone(self.runtime.inner());
        let state = Arc::new(State {
            ledger: Mutex::new(Ledger::new(KEPT_BLOCKS_MAX)),
            identity: inner.discovery.identity(),
            dp_rank,
        });
        let name = format!("worker_kv_query_source_{:x}", publisher.id());
        let asked_at = EndpointId::new(&self.id().namespace, &self.id().component, &name);
        let asked = self.runtime.endpoint_of_any_name(&asked_at);
        let codec = inner.options.codec;
        let told = Arc::clone(&state);
        let handler = move |_: &super::Shard| {
            let told = Arc::clone(&told);
            async move |request: Request, stream: &mut Stream| tell(&told, &request, stream).await
        };
        asked.serve_with(handler).await?;
        let is_on_nats = inner.requests.as_ref().is_some_and(|one| one.is_offered());
        let place = match is_on_nats {
            true => Place::Nats,
            false => Place::Tcp(self.runtime.address()),
        };
        let asked_at = offer::record(&asked_at, place, codec);
        let discovery = &inner.discovery;
        let said = publisher.is_source_with(discovery, self.id(), (None, dp_rank), Some(asked_at));
        said.await?;
        Ok(KvCache(Arc::new(Inner {
            publisher,
            state,
            turn: tokio::sync::Mutex::default(),
        })))
    }
}

/// Answers one question: one item, not annotated.
async fn tell(state: &State, request: &Request, stream: &mut Stream) -> Outcome {
    let query: KvQuery = request.parse()?;
    let mut item = Vec::new();
    let answer = state.answer(&query);
    write_value(&answer, stream.codec(), &mut item).map_err(Fault::Unwritable)?;
    stream.send_item(&item).await
}

impl KvCache {
    /// The id of its publisher.
    pub fn publisher_id(&self) -> u64 {
        self.0.publisher.id()
    }

    /// Blocks came, each behind the one before, and the first behind `parent`, by the engine's own
    /// hash; at the begin of a sequence there is none.
    ///
    /// # Errors
    /// As [`Publisher::publish_bytes`]; routers find out that they have missed it.
    pub async fn stored(
        &self,
        parent: Option<u64>,
        blocks: Vec<KvBlock>,
    ) -> Result<(), EventsError> {
        let change = KvChange::Stored {
            parent_hash: parent,
            start_position: None,
            blocks,
        };
        self.publish(change).await
    }

    /// Blocks went, by the engine's own hashes.
    ///
    /// # Errors
    /// As [`KvCache::stored`].
    pub async fn removed(&self, block_hashes: Vec<u64>) -> Result<(), EventsError> {
        self.publish(KvChange::Removed { block_hashes }).await
    }

    /// All blocks went.
    ///
    /// # Errors
    /// As [`KvCache::stored`].
    pub async fn cleared(&self) -> Result<(), EventsError> {
        self.publish(KvChange::Cleared).await
    }

    async fn publish(&self, change: KvChange) -> Result<(), EventsError> {
        let _turn = self.0.turn.lock().await;
        let state = &self.0.state;
        let event_id = state.ledger().note(&change);
        let event = KvEvent::new(state.worker(), event_id, change);
        self.0.publisher.publish(&[event]).await
    }
}
