//! Events of namespaces, components and endpoints: who publishes, who subscribes.

use corelane_codec::event::{Scope, topic};

use super::endpoint::{Component, Endpoint, Namespace};
use super::runtime::Runtime;
use crate::events::{Events, EventsError, Publisher, Subscriber};

impl Runtime {
    /// The event plane, for scopes that others made.
    pub fn events(&self) -> &Events {
        &self.inner().events
    }
}

impl Namespace {
    /// Its scope.
    pub fn scope(&self) -> Scope {
        Scope::namespace(self.name())
    }

    /// Publishes events of the namespace itself.
    ///
    /// # Errors
    /// As [`Events::publisher`].
    pub async fn publisher(&self, topic: &str) -> Result<Publisher, EventsError> {
        self.runtime.events().publisher(&self.scope(), topic).await
    }

    /// Receives events of the namespace itself; those of its components are not among them.
    ///
    /// # Errors
    /// As [`Events::subscriber`].
    pub async fn subscriber(&self, topic: &str) -> Result<Subscriber, EventsError> {
        self.runtime.events().subscriber(&self.scope(), topic).await
    }
}

impl Component {
    /// Its scope.
    pub fn scope(&self) -> Scope {
        Scope::component(self.namespace.name(), self.name())
    }

    /// Publishes events of the component itself.
    ///
    /// # Errors
    /// As [`Events::publisher`].
    pub async fn publisher(&self, topic: &str) -> Result<Publisher, EventsError> {
        let events = self.namespace.runtime.events();
        events.publisher(&self.scope(), topic).await
    }

    /// Receives events of the component itself; those of its endpoints are not among them.
    ///
    /// # Errors
    /// As [`Events::subscriber`].
    pub async fn subscriber(&self, topic: &str) -> Result<Subscriber, EventsError> {
        let events = self.namespace.runtime.events();
        events.subscriber(&self.scope(), topic).await
    }
}

impl Endpoint {
    /// Its scope: what all of Dynamo's own topics belong to.
    pub fn scope(&self) -> Scope {
        Scope::of(self.id().clone())
    }

    /// Publishes events of the endpoint.
    ///
    /// # Errors
    /// As [`Events::publisher`].
    pub async fn publisher(&self, topic: &str) -> Result<Publisher, EventsError> {
        let events = self.runtime.events();
        events.publisher(&self.scope(), topic).await
    }

    /// Publishes which blocks of KV cache rank `dp_rank` of this process stores and removes:
    /// [`corelane_codec::event::typed::KvEvent`]s, several at a time. A KV router knows from
    /// discovery that they are about this process.
    ///
    /// # Errors
    /// As [`Events::publisher`].
    pub async fn kv_publisher(&self, dp_rank: u32) -> Result<Publisher, EventsError> {
        let publisher = self.publisher(topic::KV_EVENTS).await?;
        let discovery = &self.runtime.inner().discovery;
        publisher.is_source(discovery, self.id(), dp_rank).await?;
        Ok(publisher)
    }

    /// Receives events of the endpoint, from all its instances.
    ///
    /// # Errors
    /// As [`Events::subscriber`].
    pub async fn subscriber(&self, topic: &str) -> Result<Subscriber, EventsError> {
        let events = self.runtime.events();
        events.subscriber(&self.scope(), topic).await
    }
}
