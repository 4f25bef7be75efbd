//! Discovery, NATS and events as the options ask for them.

use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::Result;

use super::options::Options;
use super::paths::Paths;
use crate::config::Backend;
use crate::discovery::{
    BeforeRegister, Discovery, EtcdDiscovery, EtcdOptions, FileDiscovery, FileOptions,
    MemoryDiscovery,
};
use crate::events::{EventPlane, Events};
use crate::nats::{Nats, RequestPlane, Requests};

/// What a runtime has of the world outside.
pub(super) struct Opened {
    pub(super) discovery: Discovery,
    pub(super) nats: Option<Nats>,
    pub(super) requests: Option<Requests>,
    pub(super) events: Events,
}

impl Opened {
    /// Opens all of it; the shards listen at `address`.
    pub(super) async fn open(
        options: &Options,
        paths: &Rc<Paths>,
        address: SocketAddr,
    ) -> Result<Opened> {
        let (nats, requests) = nats(options, address).await?;
        let discovery = discovery(options, paths).await?;
        let events = events(options.events, &discovery, nats.as_ref());
        Ok(Opened {
            discovery,
            nats,
            requests,
            events,
        })
    }
}

/// Opens it. Whoever finds us under a new identity can be served under it already.
async fn discovery(options: &Options, paths: &Rc<Paths>) -> Result<Discovery> {
    let lookup = |name: &str| options.discovery.variable(name);
    let discovery = match options.discovery.backend {
        Backend::Memory => {
            let store = options.memory.clone().unwrap_or_default();
            Discovery::Memory(MemoryDiscovery::new(&store))
        }
        Backend::File => Discovery::File(FileDiscovery::open(FileOptions::from_env(lookup)).await?),
        Backend::Etcd => {
            let mut settings = EtcdOptions::from_env(lookup)?;
            let paths = Rc::clone(paths);
            let hook: BeforeRegister = Rc::new(move |id| {
                let paths = Rc::clone(&paths);
                Box::pin(async move { paths.be(id).await })
            });
            settings.before_register = Some(hook);
            tracing::info!(
                endpoints = settings.endpoints.join(","),
                "connecting to etcd"
            );
            Discovery::Etcd(EtcdDiscovery::connect(settings).await?)
        }
    };
    Ok(discovery)
}

/// Connects to NATS if anything goes over it: events, requests to us, or requests to others if
/// `NATS_SERVER` is set (which may come later).
async fn nats(options: &Options, address: SocketAddr) -> Result<(Option<Nats>, Option<Requests>)> {
    let is_needed =
        options.events == EventPlane::Nats || options.request_plane == RequestPlane::Nats;
    let nats = match (is_needed, options.env.get("NATS_SERVER")) {
        (true, _) => Nats::connect(&options.nats).await?,
        (false, Some(_)) => Nats::connect_later(&options.nats).await?,
        (false, None) => return Ok((None, None)),
    };
    let requests = Requests::start(nats.clone(), options.request_plane, address).await?;
    Ok((Some(nats), Some(requests)))
}

/// The event plane of these.
fn events(plane: EventPlane, discovery: &Discovery, nats: Option<&Nats>) -> Events {
    match (plane, nats) {
        (EventPlane::Nats, Some(nats)) => Events::nats(discovery, nats),
        (EventPlane::Zmq, _) => Events::zmq(discovery),
        _ => Events::off(discovery),
    }
}
