//! `[events]`: the broker of events (`spec/events-discovery.md` §3.6).

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use super::keys::{self, Key};
use super::layers::{Layers, Of};
use super::resolve::{self, origin};
use super::words::{Bridge, Idle, Overflow, Switch};
use super::{Host, Purpose};
use crate::events::CurveOptions;

/// `[events]`, with `broker` on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Broker {
    /// Namespace that it is registered in.
    pub namespace: String,
    /// Where publishers connect.
    pub xsub: SocketAddr,
    /// Where subscribers connect.
    pub xpub: SocketAddr,
    /// Where both connect that speak no ZMTP.
    pub tcp: Option<SocketAddr>,
    /// Where both connect with CURVE, if that is beside `xsub` and `xpub`.
    pub curve: Option<(SocketAddr, SocketAddr)>,
    /// CPU of its thread; that of the control core unless it is said.
    pub cpu: Option<usize>,
    /// What its thread does with nothing to do.
    pub idle: Idle,
    /// What events are exchanged with.
    pub bridge: Option<BridgeConfig>,
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

/// `bridge` and what goes with it, where it is on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BridgeConfig {
    /// Whether NATS is one of its sides.
    pub nats: bool,
    /// Where the other broker takes events, and where it gives them.
    pub other: Option<(SocketAddr, SocketAddr)>,
    /// The one namespace whose events are exchanged.
    pub namespace: Option<String>,
    /// The name of our own peers, where they are not ours alone.
    pub side: Option<String>,
}

/// The settings, if there is to be a broker at all.
pub(super) fn broker(
    layers: &mut Layers,
    purpose: Purpose,
    host: IpAddr,
    cpus: &Host,
) -> Option<Broker> {
    if purpose != Purpose::Serve {
        return None;
    }
    let is_on = layers.word(&keys::EVENTS_BROKER, Switch::parse, Switch::Off) == Switch::On;
    let broker = Broker {
        namespace: named(layers, &keys::EVENTS_NAMESPACE).unwrap_or_else(|| "dynamo".to_owned()),
        xsub: bind(layers, &keys::EVENTS_XSUB, SocketAddr::new(host, 5555)),
        xpub: bind(layers, &keys::EVENTS_XPUB, SocketAddr::new(host, 5556)),
        tcp: address(layers, &keys::EVENTS_TCP, SocketAddr::new(host, 5557)),
        curve: curve_doors(layers),
        cpu: resolve::cpu(layers, cpus, &keys::EVENTS_CPU, |_| true).map(|(cpu, _)| cpu),
        idle: layers.word(&keys::EVENTS_IDLE, Idle::parse, Idle::Block),
        bridge: bridge(layers),
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
    if is_on {
        distinct(layers, &broker);
    } else {
        idle_keys(layers, &broker);
    }
    is_on.then_some(broker)
}

/// Each door has a port of its own.
fn distinct(layers: &mut Layers, broker: &Broker) {
    let mut doors = vec![("xsub", broker.xsub)];
    let others = [
        ("xpub", &keys::EVENTS_XPUB, Some(broker.xpub)),
        ("tcp", &keys::EVENTS_TCP, broker.tcp),
        (
            "curve_xsub",
            &keys::EVENTS_CURVE_XSUB,
            broker.curve.map(|doors| doors.0),
        ),
        (
            "curve_xpub",
            &keys::EVENTS_CURVE_XPUB,
            broker.curve.map(|doors| doors.1),
        ),
    ];
    for (name, key, address) in others {
        let Some(address) = address else {
            continue;
        };
        if let Some((other, _)) = doors.iter().find(|(_, known)| *known == address)
            && address.port() != 0
        {
            let at = origin(layers, key);
            let what = format!("{name} is {address}, which is {other} too");
            layers.error(&at, what, "write another port");
        }
        doors.push((name, address));
    }
}

/// Doors and bridges are the broker's: without it they would be silently absent.
fn idle_keys(layers: &mut Layers, broker: &Broker) {
    let written = [
        (&keys::EVENTS_TCP, broker.tcp.is_some()),
        (&keys::EVENTS_BRIDGE, broker.bridge.is_some()),
        (&keys::EVENTS_CURVE_XSUB, broker.curve.is_some()),
    ];
    for (key, is_written) in written {
        if is_written {
            let at = origin(layers, key);
            let what = format!("{} is written, and there is no broker", key.name);
            layers.error(&at, what, "write broker = true under [events] as well");
        }
    }
}

/// Both or none of the doors for CURVE alone.
fn curve_doors(layers: &mut Layers) -> Option<(SocketAddr, SocketAddr)> {
    let example = SocketAddr::from(([0, 0, 0, 0], 5565));
    let xsub = address(layers, &keys::EVENTS_CURVE_XSUB, example);
    let xpub = address(layers, &keys::EVENTS_CURVE_XPUB, example);
    match (xsub, xpub) {
        (Some(xsub), Some(xpub)) => Some((xsub, xpub)),
        (None, None) => None,
        (Some(_), None) => missing(layers, &keys::EVENTS_CURVE_XSUB, &keys::EVENTS_CURVE_XPUB),
        (None, Some(_)) => missing(layers, &keys::EVENTS_CURVE_XPUB, &keys::EVENTS_CURVE_XSUB),
    }
}

fn missing<T>(layers: &mut Layers, there: &'static Key, other: &'static Key) -> Option<T> {
    let at = origin(layers, there);
    let what = format!("{} without {}", there.name, other.name);
    layers.error(&at, what, format!("write {} too", other.name));
    None
}

/// The keys of CURVE, which are looked at: nobody is to find out from a peer that they are wrong.
pub(super) fn curve(
    layers: &mut Layers,
    purpose: Purpose,
    broker: Option<&Broker>,
) -> CurveOptions {
    if purpose != Purpose::Serve {
        return CurveOptions::default();
    }
    let mut text = |key| layers.text(key, Of::Once).map(|(text, _)| text);
    let options = CurveOptions {
        secret_key_file: text(&keys::EVENTS_CURVE_SECRET_KEY_FILE).map(PathBuf::from),
        allowed_keys: text(&keys::EVENTS_CURVE_ALLOWED_KEYS),
        server_key: text(&keys::EVENTS_CURVE_SERVER_KEY),
    };
    if let Err(error) = options.load() {
        let at = origin(layers, error.key());
        layers.error(&at, error.to_string(), error.instead());
    }
    let Some(file) = &options.secret_key_file else {
        if broker.is_some_and(|broker| broker.curve.is_some()) {
            let _: Option<()> = missing(
                layers,
                &keys::EVENTS_CURVE_XSUB,
                &keys::EVENTS_CURVE_SECRET_KEY_FILE,
            );
        }
        return options;
    };
    if is_exposed(file) {
        let at = origin(layers, &keys::EVENTS_CURVE_SECRET_KEY_FILE);
        let what = format!("others than its owner may read {}", file.display());
        layers.warn(&at, what, "chmod 600 it");
    }
    if broker.is_some_and(|broker| broker.tcp.is_some() && broker.curve.is_none()) {
        let at = origin(layers, &keys::EVENTS_TCP);
        let what = "tcp lets in whoever can reach it, without CURVE".to_owned();
        layers.warn(&at, what, "bind it where only friends are, or leave it out");
    }
    let other = broker.and_then(|broker| broker.bridge.as_ref()?.other);
    if other.is_some() && options.server_key.is_none() {
        let at = origin(layers, &keys::EVENTS_BRIDGE);
        let what = "the other broker is dialled without CURVE".to_owned();
        layers.warn(
            &at,
            what,
            "write curve_server_key, its public key, if it has one",
        );
    }
    options
}

/// Whether a file may be read by others than its owner.
fn is_exposed(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(file).map(|about| about.permissions().mode());
    mode.is_ok_and(|mode| mode & 0o077 != 0)
}

fn bridge(layers: &mut Layers) -> Option<BridgeConfig> {
    let word = layers.word(&keys::EVENTS_BRIDGE, Bridge::parse, Bridge::Off);
    let any = SocketAddr::from(([127, 0, 0, 1], 5555));
    let xsub = address(layers, &keys::EVENTS_BRIDGE_XSUB, any);
    let xpub = address(layers, &keys::EVENTS_BRIDGE_XPUB, any);
    let namespace = named(layers, &keys::EVENTS_BRIDGE_NAMESPACE);
    let side = named(layers, &keys::EVENTS_BRIDGE_SIDE);
    let other = matches!(word, Bridge::Zmq | Bridge::Both);
    let pair = xsub.zip(xpub);
    if other && pair.is_none() {
        let at = origin(layers, &keys::EVENTS_BRIDGE);
        let what = format!("bridge is {word}, and the other broker is not named");
        let example = "write bridge_xsub and bridge_xpub, tcp://IP:PORT each";
        layers.error(&at, what, example);
    }
    (word != Bridge::Off).then_some(BridgeConfig {
        nats: matches!(word, Bridge::Nats | Bridge::Both),
        other: pair.filter(|_| other),
        namespace,
        side,
    })
}

/// A name that must not be empty.
fn named(layers: &mut Layers, key: &'static Key) -> Option<String> {
    let (name, at) = layers.text(key, Of::Once)?;
    if name.is_empty() {
        let example = format!("write {} = \"dynamo\", or leave it out", key.name);
        layers.error(&at, format!("{} is empty", key.name), example);
        return None;
    }
    Some(name)
}

/// [`address`], or `default`.
fn bind(layers: &mut Layers, key: &'static Key, default: SocketAddr) -> SocketAddr {
    address(layers, key, default).unwrap_or(default)
}

/// Reads `tcp://IP:PORT`; `*` is every address, as ZMQ has it.
fn address(layers: &mut Layers, key: &'static Key, example: SocketAddr) -> Option<SocketAddr> {
    let (text, at) = layers.text(key, Of::Once)?;
    let address = text.trim().strip_prefix("tcp://");
    let address = address.map(|address| match address.strip_prefix("*:") {
        Some("*") => "0.0.0.0:0".to_owned(),
        Some(port) => format!("0.0.0.0:{port}"),
        None => address.to_owned(),
    });
    let address = address.and_then(|address| address.parse().ok());
    if address.is_none() {
        let what = format!("{} is no ZMQ address over TCP", key.name);
        let example = format!("write {} = \"tcp://{example}\"", key.name);
        layers.error(&at, what, example);
    }
    address
}
