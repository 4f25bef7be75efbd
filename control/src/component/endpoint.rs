//! Namespace, component, endpoint: the names under which work is offered and found.

use std::rc::Rc;
use std::sync::Arc;

use corelane_codec::control_message::{PayloadCodec, RequestType};
use corelane_codec::item::write_value;
use corelane_codec::path::{EndpointId, Slug};
use corelane_engine::handler::NewHandler;
use corelane_engine::shard::Command;
use serde::Serialize;

use super::client::Client;
use super::error::Error;
use super::handler::{Handler, make};
use super::many::{Many, ManyHandler};
use super::names;
use super::runtime::Runtime;
use super::serving::{Served, Serving, StatsHandler};
use super::shard::Shard;
use super::tokio_handler::{Bridge, TokioHandler};
use super::tokio_many::TokioManyHandler;
use crate::health::State;

/// A space of names, such as `production`.
#[derive(Clone)]
pub struct Namespace {
    pub(super) runtime: Runtime,
    pub(super) name: String,
}

impl Namespace {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A component of it, such as `worker`.
    ///
    /// # Errors
    /// The name is not one that may be made up.
    pub fn component(&self, name: &str) -> Result<Component, Error> {
        names::check(names::COMPONENT, name)?;
        Ok(Component {
            namespace: self.clone(),
            name: name.to_owned(),
        })
    }
}

/// A kind of worker; its instances are the processes that serve its endpoints.
#[derive(Clone)]
pub struct Component {
    pub(super) namespace: Namespace,
    name: String,
}

impl Component {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its service on NATS: `production_worker`
    /// (`spec/events-discovery.md` §2.5).
    pub fn service_name(&self) -> String {
        let joined = format!("{}_{}", self.namespace.name, self.name);
        Slug::slugify(&joined).as_str().to_owned()
    }

    /// An endpoint of it, such as `generate`: what is called.
    ///
    /// # Errors
    /// The name is not one that may be made up.
    pub fn endpoint(&self, name: &str) -> Result<Endpoint, Error> {
        names::check(names::ENDPOINT, name)?;
        let id = EndpointId::new(&self.namespace.name, &self.name, name);
        Ok(Endpoint::new(&self.namespace.runtime, id))
    }
}

/// What can be served here and called from anywhere.
pub struct Endpoint {
    pub(super) runtime: Runtime,
    id: EndpointId,
    codec: PayloadCodec,
    health_check: Option<serde_json::Value>,
    stats: Option<StatsHandler>,
    /// It may have a name that is not to be made up.
    any_name: bool,
}

impl Endpoint {
    pub(super) fn new(runtime: &Runtime, id: EndpointId) -> Endpoint {
        Endpoint {
            runtime: runtime.clone(),
            id,
            codec: runtime.inner().options.codec,
            health_check: None,
            stats: None,
            any_name: false,
        }
    }

    /// One that is served under whatever name a person has given it.
    pub(super) fn of_any_name(runtime: &Runtime, id: EndpointId) -> Endpoint {
        Endpoint {
            any_name: true,
            ..Endpoint::new(runtime, id)
        }
    }

    /// Its three names.
    pub fn id(&self) -> &EndpointId {
        &self.id
    }

    /// The codec that callers are asked to use; `DYN_REQUEST_PLANE_CODEC` or MessagePack unless it
    /// is said. Handlers take both.
    #[must_use]
    pub fn codec(mut self, codec: PayloadCodec) -> Self {
        self.codec = codec;
        self
    }

    /// A request that shows whether the endpoint is healthy: it is sent when nobody has got an
    /// item for a while, if [`super::Checks::enabled`]. From then on the endpoint is ready as long
    /// as it answers with an item.
    ///
    /// # Errors
    /// The payload has no JSON form.
    pub fn health_check(mut self, payload: &impl Serialize) -> Result<Self, Error> {
        let value = serde_json::to_value(payload).map_err(|why| Error::HealthCheck {
            endpoint: self.id.to_string(),
            why: why.into(),
        })?;
        self.health_check = Some(value);
        Ok(self)
    }

    /// What [`Runtime::stats`] tells of this endpoint beside its counters.
    #[must_use]
    pub fn stats(mut self, stats: impl Fn() -> serde_json::Value + 'static) -> Self {
        self.stats = Some(Box::new(stats));
        self
    }

    /// Calls it, wherever it is served. All clients of an endpoint share one watch in discovery.
    pub fn client(&self) -> Client {
        self.runtime.client_of(std::slice::from_ref(&self.id))
    }

    /// Serves it from now on, on every shard, with a handler that each shard has a clone of.
    /// Requests are answered, and the first attempt to register has been made, when this returns;
    /// a store that is away delays the registration and is no error.
    ///
    /// # Errors
    /// The names are not ones that may be made up, this process serves it already, it is leaving,
    /// or it is only to call.
    pub async fn serve<H>(self, handler: H) -> Result<Served, Error>
    where
        H: Handler + Clone + Send + Sync,
    {
        self.serve_with(move |_| handler.clone()).await
    }

    /// The same with a handler that is made for each shard, on its thread: it need be neither
    /// `Send` nor `Clone`.
    ///
    /// # Errors
    /// As [`Endpoint::serve`].
    pub async fn serve_with<H, M>(self, factory: M) -> Result<Served, Error>
    where
        H: Handler,
        M: Fn(&Shard) -> H + Send + Sync + 'static,
    {
        self.serve_as(RequestType::SingleIn, factory).await
    }

    /// Serves it with a handler whose request is a stream of values, as [`Endpoint::serve`] with
    /// one whose request is one.
    ///
    /// # Errors
    /// As [`Endpoint::serve`], or it has a health check.
    pub async fn serve_many<H>(self, handler: H) -> Result<Served, Error>
    where
        H: ManyHandler + Clone + Send + Sync,
    {
        self.serve_many_with(move |_| handler.clone()).await
    }

    /// The same with a handler that is made for each shard, as [`Endpoint::serve_with`].
    ///
    /// # Errors
    /// As [`Endpoint::serve_many`].
    pub async fn serve_many_with<H, M>(self, factory: M) -> Result<Served, Error>
    where
        H: ManyHandler,
        M: Fn(&Shard) -> H + Send + Sync + 'static,
    {
        if self.health_check.is_some() {
            return Err(Error::NotChecked(self.id.to_string()));
        }
        let factory = move |shard: &Shard| Many(factory(shard));
        self.serve_as(RequestType::ManyIn, factory).await
    }

    async fn serve_as<H, M>(mut self, takes: RequestType, factory: M) -> Result<Served, Error>
    where
        H: Handler,
        M: Fn(&Shard) -> H + Send + Sync + 'static,
    {
        if !self.any_name {
            names::check_all(&self.id)?;
        }
        let inner = Rc::clone(self.runtime.inner());
        if inner.options.calls_only {
            return Err(Error::CallsOnly(self.id.to_string()));
        }
        // Handlers have their index by order, which is the same on all shards.
        let _turn = inner.serving_turn.lock().await;
        if inner.is_stopping() {
            return Err(Error::Stopping);
        }
        if inner.paths.has(&self.id) {
            return Err(Error::AlreadyServed(self.id.to_string()));
        }
        let serving = Rc::new(self.serving()?);
        let factory = Arc::new(factory);
        let new = |index: usize| {
            let factory = Arc::clone(&factory);
            let stats = &serving.stats[index];
            let make = make(index, takes, Arc::clone(stats), move |shard| factory(shard));
            let stats = Arc::clone(stats);
            Command::Handler(NewHandler { make, stats })
        };
        inner.cores.tell_each(new).await;
        let handler = inner.handlers.get();
        inner.handlers.set(handler + 1);
        inner.paths.be(inner.discovery.instance_id()).await;
        inner.paths.add(&serving.id, handler).await;
        inner.serving.borrow_mut().push(Rc::clone(&serving));
        serving.begin(&inner);
        let served = Served {
            serving,
            runtime: Rc::downgrade(&inner),
        };
        served.settled().await;
        Ok(served)
    }

    /// Serves it with a handler that runs on `tokio`, a runtime of yours
    /// (`tokio::runtime::Handle::current()` is the one that discovery runs on): for work that
    /// needs tokio's world. Each request and each item takes a hop between threads.
    ///
    /// # Errors
    /// As [`Endpoint::serve`].
    pub async fn serve_on<H: TokioHandler>(
        self,
        tokio: tokio::runtime::Handle,
        handler: H,
    ) -> Result<Served, Error> {
        let factory = self.bridged(tokio, handler);
        self.serve_with(factory).await
    }

    /// The same with a handler whose request is a stream of values.
    ///
    /// # Errors
    /// As [`Endpoint::serve_many`].
    pub async fn serve_many_on<H: TokioManyHandler>(
        self,
        tokio: tokio::runtime::Handle,
        handler: H,
    ) -> Result<Served, Error> {
        let factory = self.bridged(tokio, handler);
        self.serve_many_with(factory).await
    }

    fn bridged<H: Clone>(
        &self,
        tokio: tokio::runtime::Handle,
        handler: H,
    ) -> impl Fn(&Shard) -> Bridge<H> + use<H> {
        let hub = Arc::clone(&self.runtime.inner().hub);
        move |shard: &Shard| Bridge {
            handler: handler.clone(),
            tokio: tokio.clone(),
            nudge: hub.nudge(shard.index()),
        }
    }

    fn serving(&mut self) -> Result<Serving, Error> {
        let inner = self.runtime.inner();
        let entry = inner.endpoints.add(self.id.clone());
        let shards = inner.hub.shards();
        let mut serving = Serving::new(self.id.clone(), self.codec, entry, shards);
        serving.stats_handler = self.stats.take();
        if let Some(payload) = &self.health_check {
            let mut body = Vec::new();
            write_value(payload, self.codec, &mut body).map_err(|why| Error::HealthCheck {
                endpoint: self.id.to_string(),
                why,
            })?;
            serving.entry.is_checked(inner.options.checks.enabled);
            serving.canary = Some(body);
        }
        Ok(serving)
    }
}

impl Served {
    /// Waits for the first attempt to register.
    async fn settled(&self) {
        let attempt = std::time::Duration::from_secs(6);
        self.reached(State::Registered, attempt).await;
    }
}
