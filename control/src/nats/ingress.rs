//! Requests that come over NATS, for endpoints of this process (spec/request-plane.md §8,
//! spec/events-discovery.md §6.4, §6.5).
//!
//! ```text
//! caller --message to the instance's subject--> NATS --> [service of the component]
//!        <--- empty reply, at once -------------             |  request frame, over loopback
//!                                                            v
//! caller <------- response, over TCP, from the worker ---- shard
//! ```
//! A caller over NATS takes every reply for an acknowledgement. When a shard then refuses the
//! request, its sender is called home with an error, as a worker would do it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use async_nats::service::{Request, Service, ServiceExt, endpoint};
use bytes::Bytes;
use corelane_codec::error::DynamoError;
use corelane_codec::path::{EndpointId, Slug, instance_path, instance_subject};
use corelane_codec::reply_frame::Reply;
use corelane_codec::{headers, request_frame};
use futures_util::StreamExt;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_local};

use super::home::tell;
use super::shards::Shards;
use super::{Nats, NatsError};

/// What we say that we are: the version whose protocol this is.
const VERSION: &str = "1.6.1";
/// Connections to our own shards; the kernel spreads them.
const CONNECTIONS: usize = 8;
/// Requests that have been taken off NATS and not been answered by a shard.
const RUNNING_MAX: usize = 4096;

/// What services tell about their endpoints beside counts, by subject.
pub type ServiceData = Arc<Mutex<BTreeMap<String, Value>>>;

/// The services of a process. Lives inside a `LocalSet`.
pub struct Ingress {
    nats: Nats,
    shards: Shards,
    data: ServiceData,
    services: RefCell<BTreeMap<String, Service>>,
    subjects: RefCell<BTreeSet<String>>,
    running: Arc<Semaphore>,
    tasks: RefCell<JoinSet<()>>,
}

impl Ingress {
    /// Services whose requests go to the shards that listen at `address`. What their endpoints
    /// tell about themselves is taken from `data`.
    pub fn new(nats: &Nats, address: SocketAddr, data: ServiceData) -> Ingress {
        Ingress {
            nats: nats.clone(),
            shards: Shards::new(address, CONNECTIONS),
            data,
            services: RefCell::default(),
            subjects: RefCell::default(),
            running: Arc::new(Semaphore::new(RUNNING_MAX)),
            tasks: RefCell::default(),
        }
    }

    /// Takes requests for an instance from now on; one that is served already is served on.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn serve(&self, endpoint: &EndpointId, instance_id: u64) -> Result<(), NatsError> {
        let subject = instance_subject(instance_id, endpoint);
        if self.subjects.borrow().contains(&subject) {
            return Ok(());
        }
        let name = service_name(endpoint);
        if !self.services.borrow().contains_key(&name) {
            let service = self.start(&name, endpoint).await?;
            self.services.borrow_mut().insert(name.clone(), service);
        }
        // A builder borrows nothing, so that nothing is borrowed across the wait.
        let builder = match self.services.borrow().get(&name) {
            Some(service) => service.endpoint_builder(),
            None => return Ok(()),
        };
        let named = builder.name(subject.replace('.', "-"));
        let requests = named.add(&subject).await.map_err(refused)?;
        // The record is written after this: whoever reads it finds somebody.
        self.nats.settled().await?;
        tracing::info!(subject, "takes requests over NATS");
        self.subjects.borrow_mut().insert(subject);
        let path = instance_path(instance_id, endpoint).into_bytes();
        let (shards, running) = (self.shards.clone(), Arc::clone(&self.running));
        let task = take(requests, path, shards, running);
        self.tasks.borrow_mut().spawn_local(task);
        Ok(())
    }

    async fn start(&self, name: &str, endpoint: &EndpointId) -> Result<Service, NatsError> {
        let data = Arc::clone(&self.data);
        let stats = move |endpoint: String, _: endpoint::Stats| {
            let data = data.lock().unwrap_or_else(PoisonError::into_inner);
            data.get(&endpoint).cloned().unwrap_or_default()
        };
        let EndpointId {
            namespace,
            component,
            ..
        } = endpoint;
        let description = format!("Dynamo component {component} in namespace {namespace}");
        let builder = self.nats.client().service_builder();
        let builder = builder.description(description).stats_handler(stats);
        builder.start(name, VERSION).await.map_err(refused)
    }

    /// Takes no more requests. Those that have been taken go on.
    pub async fn stop(&self) {
        let services = self.services.take();
        for (name, service) in services {
            if let Err(error) = service.stop().await {
                tracing::warn!(name, %error, "a service on NATS did not stop");
            }
        }
    }
}

fn refused(error: async_nats::Error) -> NatsError {
    NatsError::Service(error.to_string())
}

/// The name of a component's service (spec/events-discovery.md §2.5).
pub fn service_name(endpoint: &EndpointId) -> String {
    let joined = format!("{}_{}", endpoint.namespace, endpoint.component);
    Slug::slugify(&joined).as_str().to_owned()
}

async fn take(
    mut requests: endpoint::Endpoint,
    path: Vec<u8>,
    shards: Shards,
    running: Arc<Semaphore>,
) {
    while let Some(request) = requests.next().await {
        // Beyond that many they wait in the subscription.
        let Ok(permit) = Arc::clone(&running).acquire_owned().await else {
            return;
        };
        let (path, shards) = (path.clone(), shards.clone());
        spawn_local(async move {
            pass(request, &path, &shards).await;
            drop(permit);
        });
    }
}

/// Acknowledges a request and gives it to a shard.
async fn pass(request: Request, path: &[u8], shards: &Shards) {
    if let Err(error) = request.respond(Ok(Bytes::new())).await {
        tracing::warn!(%error, "a request over NATS could not be acknowledged");
        return;
    }
    let message = &request.message;
    let mut frame = Vec::new();
    let headers = frame_headers(&request, path);
    let payload = &message.payload;
    if let Err(error) = request_frame::write_frame(path, &headers, payload, &mut frame) {
        let error = DynamoError::invalid_argument(error.to_string());
        return tell(payload, &error).await;
    }
    let text = shards.ask(frame).await;
    let error = match text.as_deref().map(Reply::classify) {
        Some(Reply::Accepted) => return,
        Some(Reply::Overloaded(why)) => DynamoError::worker_overloaded(why),
        Some(Reply::Unavailable(why)) => DynamoError::worker_unavailable(why),
        Some(Reply::Other(_)) => {
            DynamoError::worker_unavailable("the worker gave an answer that means nothing")
        }
        None => DynamoError::worker_unavailable("the worker is leaving"),
    };
    tell(payload, &error).await;
}

/// The headers of a message as those of a frame.
fn frame_headers(request: &Request, path: &[u8]) -> Vec<u8> {
    let path = String::from_utf8_lossy(path);
    let mut members = BTreeMap::from([("x-endpoint-path", path.as_ref())]);
    if let Some(found) = &request.message.headers {
        for (name, values) in found.iter() {
            if let Some(value) = values.first() {
                members.insert(name.as_ref(), value.as_str());
            }
        }
    }
    let members: Vec<(&str, &str)> = members.into_iter().collect();
    let mut out = Vec::new();
    headers::write(&members, &mut out);
    out
}
