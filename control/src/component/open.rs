//! Discovery, NATS and events as the options ask for them.

use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::Result;
use corelane_engine::config::RingKind;

use super::options::Options;
use super::paths::Paths;
use crate::discovery::{self, BeforeRegister, Discovery};
use crate::events::{EventPlane, Events, ZmqOptions};
use crate::nats::{Nats, RequestPlane, Requests};

/// What a runtime has of the world outside.
pub(super) struct Opened {
    pub(super) discovery: Discovery,
    pub(super) nats: Option<Nats>,
    pub(super) requests: Option<Requests>,
    pub(super) events: Events,
}

impl Opened {
    /// Opens all of it; the shards listen at `address`, on this kind of ring.
    pub(super) async fn open(
        options: &Options,
        paths: &Rc<Paths>,
        address: SocketAddr,
        ring: RingKind,
    ) -> Result<Opened> {
        let zmq = zmq(options, ring)?;
        let (nats, requests) = nats(options, address).await?;
        let discovery = discovery(options, paths).await?;
        let events = match (zmq, &nats) {
            (Some(zmq), _) => Events::zmq(&discovery, zmq),
            (None, Some(nats)) if options.events == EventPlane::Nats => {
                Events::nats(&discovery, nats)
            }
            _ => Events::off(&discovery),
        };
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
    let paths = Rc::clone(paths);
    let hook: BeforeRegister = Rc::new(move |id| {
        let paths = Rc::clone(&paths);
        Box::pin(async move { paths.be(id).await })
    });
    let store = options.memory.clone().unwrap_or_default();
    discovery::open(&options.discovery, &store, Some(hook)).await
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

/// How events go over ZMQ, if they do.
fn zmq(options: &Options, ring: RingKind) -> Result<Option<ZmqOptions>> {
    let zmq = match (options.events, &options.zmq) {
        (EventPlane::Zmq, Some(zmq)) => zmq.clone(),
        (EventPlane::Zmq, None) => ZmqOptions::read(&options.env, ring)?,
        _ => return Ok(None),
    };
    Ok(Some(zmq))
}
