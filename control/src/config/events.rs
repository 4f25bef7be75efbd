//! `[events]`: the broker of events (`spec/events-discovery.md` §3.6).

use std::net::{IpAddr, SocketAddr};

use super::Purpose;
use super::keys::{self, Key};
use super::layers::{Layers, Of};
use super::resolve::origin;
use super::words::{Overflow, Switch};

/// `[events]`, with `broker` on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Broker {
    /// Namespace that it is registered in.
    pub namespace: String,
    /// Where publishers connect.
    pub xsub: SocketAddr,
    /// Where subscribers connect.
    pub xpub: SocketAddr,
    /// What happens at the bound of a queue.
    pub overflow: Overflow,
    /// Events that wait for one subscriber.
    pub queue_events_max: u32,
    /// Bytes of them.
    pub queue_bytes_max: u32,
    /// Bytes that wait for all of them.
    pub memory_bytes_max: u64,
    /// Largest event.
    pub event_bytes_max: u32,
    /// Publishers and subscribers.
    pub sessions_max: u32,
    /// Prefixes of all subscribers.
    pub subscriptions_max: u32,
    /// Receive buffers.
    pub buffers: u16,
    /// Size of each.
    pub buffer_bytes: u32,
}

/// The settings, if there is to be a broker at all.
pub(super) fn broker(layers: &mut Layers, purpose: Purpose, host: IpAddr) -> Option<Broker> {
    if purpose != Purpose::Serve {
        return None;
    }
    let is_on = layers.word(&keys::EVENTS_BROKER, Switch::parse, Switch::Off) == Switch::On;
    let broker = Broker {
        namespace: namespace(layers),
        xsub: bind(layers, &keys::EVENTS_XSUB, SocketAddr::new(host, 5555)),
        xpub: bind(layers, &keys::EVENTS_XPUB, SocketAddr::new(host, 5556)),
        overflow: layers.word(
            &keys::EVENTS_OVERFLOW,
            Overflow::parse,
            Overflow::DropNewest,
        ),
        queue_events_max: layers.int(&keys::EVENTS_QUEUE_EVENTS_MAX, Of::Once),
        queue_bytes_max: layers.int(&keys::EVENTS_QUEUE_BYTES_MAX, Of::Once),
        memory_bytes_max: layers.int(&keys::EVENTS_MEMORY_BYTES_MAX, Of::Once),
        event_bytes_max: layers.int(&keys::EVENTS_EVENT_BYTES_MAX, Of::Once),
        sessions_max: layers.int(&keys::EVENTS_SESSIONS_MAX, Of::Once),
        subscriptions_max: layers.int(&keys::EVENTS_SUBSCRIPTIONS_MAX, Of::Once),
        buffers: layers.int(&keys::EVENTS_BUFFERS, Of::Once),
        buffer_bytes: layers.int(&keys::EVENTS_BUFFER_BYTES, Of::Once),
    };
    if is_on && broker.xsub == broker.xpub && broker.xsub.port() != 0 {
        let at = origin(layers, &keys::EVENTS_XPUB);
        let what = format!("xpub is {}, which is xsub too", broker.xpub);
        layers.error(&at, what, "write another port");
    }
    is_on.then_some(broker)
}

fn namespace(layers: &mut Layers) -> String {
    let found = layers.text(&keys::EVENTS_NAMESPACE, Of::Once);
    let Some((namespace, at)) = found else {
        return "dynamo".to_owned();
    };
    if namespace.is_empty() {
        layers.error(
            &at,
            "namespace is empty".to_owned(),
            "write namespace = \"dynamo\"",
        );
    }
    namespace
}

/// Reads `tcp://IP:PORT`; `*` is every address, as ZMQ has it.
fn bind(layers: &mut Layers, key: &'static Key, default: SocketAddr) -> SocketAddr {
    let Some((text, at)) = layers.text(key, Of::Once) else {
        return default;
    };
    let address = text.trim().strip_prefix("tcp://");
    let address = address.map(|address| match address.strip_prefix("*:") {
        Some("*") => "0.0.0.0:0".to_owned(),
        Some(port) => format!("0.0.0.0:{port}"),
        None => address.to_owned(),
    });
    match address.and_then(|address| address.parse().ok()) {
        Some(address) => address,
        None => {
            let what = format!("{} is no ZMQ address over TCP", key.name);
            let example = format!("write {} = \"tcp://{default}\"", key.name);
            layers.error(&at, what, example);
            default
        }
    }
}
