//! Both directions of requests over NATS, for a process that has a use for them.

use std::fmt::Write;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::{Arc, PoisonError};

use anyhow::Context;
use async_nats::connection::State;
use corelane_codec::path::{EndpointId, instance_subject};
use serde_json::Value;

use super::{Egress, Ingress, Nats, NatsError, NatsOptions, ServiceData};
use crate::env::Env;

/// Which transport requests to our own endpoints take.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum RequestPlane {
    /// TCP, straight to a shard.
    #[default]
    Tcp,
    /// NATS.
    Nats,
}

impl RequestPlane {
    /// As `DYN_REQUEST_PLANE` says, in any case; `None` for a word that is none of them.
    pub fn read(env: &Env) -> Option<RequestPlane> {
        match env.get("DYN_REQUEST_PLANE") {
            None => Some(RequestPlane::Tcp),
            Some(word) => RequestPlane::of_word(word),
        }
    }

    /// Its word.
    pub fn of_word(word: &str) -> Option<RequestPlane> {
        match word.to_ascii_lowercase().as_str() {
            "tcp" => Some(RequestPlane::Tcp),
            "nats" => Some(RequestPlane::Nats),
            _ => None,
        }
    }
}

/// Requests over NATS: out to others always, in to us if we are offered there. Clones are the
/// same; it lives inside a `LocalSet`.
#[derive(Clone)]
pub struct Requests(Rc<Inner>);

struct Inner {
    nats: Nats,
    egress: Egress,
    ingress: Option<Ingress>,
    data: ServiceData,
}

/// The shards' own address as this process dials it.
fn loopback(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

impl Requests {
    /// As the variables ask for it: both ways if `DYN_REQUEST_PLANE` says so, and then NATS must be
    /// there; out to instances that are found there if only `NATS_SERVER` is set. `None` if
    /// nothing is set.
    ///
    /// # Errors
    /// A variable cannot be used, or there is no contact with NATS in time.
    pub async fn from_env(env: &Env, address: SocketAddr) -> anyhow::Result<Option<Requests>> {
        let plane = RequestPlane::read(env).context("DYN_REQUEST_PLANE is tcp or nats")?;
        let nats = match plane {
            RequestPlane::Nats => Nats::connect(&NatsOptions::read(env)?).await?,
            RequestPlane::Tcp if env.get("NATS_SERVER").is_some() => {
                Nats::connect_later(&NatsOptions::read(env)?).await?
            }
            RequestPlane::Tcp => return Ok(None),
        };
        Ok(Some(Requests::start(nats, plane, address).await?))
    }

    /// Begins; with `plane` NATS, endpoints of the shards at `address` can be offered.
    ///
    /// # Errors
    /// There is no port on loopback.
    pub async fn start(
        nats: Nats,
        plane: RequestPlane,
        address: SocketAddr,
    ) -> io::Result<Requests> {
        let data = ServiceData::default();
        let address = loopback(address);
        let ingress = match plane {
            RequestPlane::Tcp => None,
            RequestPlane::Nats => Some(Ingress::new(&nats, address, Arc::clone(&data))),
        };
        Ok(Requests(Rc::new(Inner {
            egress: Egress::start(&nats).await?,
            ingress,
            nats,
            data,
        })))
    }

    /// The connection.
    pub fn nats(&self) -> &Nats {
        &self.0.nats
    }

    /// Where shards dial instances on NATS.
    pub fn gateway(&self) -> SocketAddr {
        self.0.egress.address()
    }

    /// Writes what is counted, as families of `/metrics` without the mark of the end.
    pub fn write_metrics(&self, out: &mut String) {
        let too_large = self.0.egress.too_large();
        let name = "corelane_nats_connected";
        let connected = self.0.nats.client().connection_state() == State::Connected;
        let _ = write!(
            out,
            "# HELP {name} 1 while there is a connection to NATS.\n# TYPE {name} gauge\n\
             {name} {}\n",
            u8::from(connected)
        );
        let name = "corelane_nats_requests_too_large";
        let _ = write!(
            out,
            "# HELP {name} Requests larger than NATS takes; their callers were told.\n\
             # TYPE {name} counter\n{name}_total {too_large}\n"
        );
    }

    /// Whether our endpoints are offered on NATS.
    pub fn is_offered(&self) -> bool {
        self.0.ingress.is_some()
    }

    /// Takes requests for an instance of ours, if we are offered on NATS; again is no mistake.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn serve(&self, endpoint: &EndpointId, instance_id: u64) -> Result<(), NatsError> {
        match &self.0.ingress {
            Some(ingress) => ingress.serve(endpoint, instance_id).await,
            None => Ok(()),
        }
    }

    /// What the service of an endpoint tells about it from now on.
    pub fn tell(&self, endpoint: &EndpointId, instance_id: u64, value: Value) {
        let name = instance_subject(instance_id, endpoint).replace('.', "-");
        let mut data = self.0.data.lock().unwrap_or_else(PoisonError::into_inner);
        data.insert(name, value);
    }

    /// Takes no more requests.
    pub async fn stop(&self) {
        if let Some(ingress) = &self.0.ingress {
            ingress.stop().await;
        }
    }

    /// Ends the connection.
    pub async fn close(&self) {
        self.0.nats.close().await;
    }
}
