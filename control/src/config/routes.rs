//! Routes and static instances: names that may be offered, duplicates, loops, and instances that
//! nobody can provide.

use super::keys::{self, Section};
use super::kv;
use super::layers::{Layers, Of};
use super::problem::{Origin, Problem, quoted};
use super::words::{Ack, Backend, Policy, Response};
use super::{EndpointId, Purpose, RelayTimes, Route, RouteLane, StaticInstance, address, endpoint};

/// Header that names the instance when `policy = "direct"` says nothing else.
const DIRECT_HEADER: &str = "x-corelane-instance";

/// A route with the places of its two names.
struct Placed {
    route: Route,
    listen_at: Origin,
    target_at: Origin,
}

/// All routes and instances; those with a fault are left out after it was reported. There may be
/// none when something else is served: `alone`.
pub(super) fn routes(
    layers: &mut Layers,
    purpose: Purpose,
    backend: Backend,
    alone: bool,
) -> (Vec<Route>, Vec<StaticInstance>) {
    let count = layers.main.count(Section::Route);
    if count == 0 && !layers.main.broken && !alone {
        let at = layers.main.start();
        layers.problems.push(Problem::error(
            at,
            "there is no [[route]], so nothing would be served",
            "write [[route]] with listen and target below it",
        ));
    }
    let placed: Vec<Placed> = (0..count)
        .filter_map(|index| route(layers, index))
        .collect();
    duplicates(layers, &placed);
    loops(layers, &placed);
    let instances = instances(layers, backend);
    if purpose == Purpose::Serve && backend == Backend::Memory && !layers.main.broken {
        orphans(layers, &placed, &instances);
    }
    (
        placed.into_iter().map(|placed| placed.route).collect(),
        instances,
    )
}

fn route(layers: &mut Layers, index: usize) -> Option<Placed> {
    let of = Of::Item(index);
    let listen = layers.text(&keys::ROUTE_LISTEN, of);
    let target = layers.text(&keys::ROUTE_TARGET, of);
    let policy = layers.word_of(&keys::ROUTE_POLICY, of, Policy::parse, Policy::LeastLoaded);
    let header = header(layers, index, policy);
    let response = layers.word_of(&keys::ROUTE_RESPONSE, of, Response::parse, Response::Direct);
    let ack = layers.word_of(&keys::ROUTE_ACK, of, Ack::parse, Ack::OnForward);
    let ack_timeout_ms = layers.int(&keys::ROUTE_ACK_TIMEOUT_MS, of);
    let retries_max = layers.int(&keys::ROUTE_RETRIES_MAX, of);
    let hold_bytes = layers.int(&keys::ROUTE_HOLD_BYTES, of);
    let relay = RelayTimes {
        home_timeout_ms: layers.int(&keys::ROUTE_HOME_TIMEOUT_MS, of),
        first_item_timeout_ms: layers.int(&keys::ROUTE_FIRST_ITEM_TIMEOUT_MS, of),
        inactivity_timeout_ms: layers.int(&keys::ROUTE_INACTIVITY_TIMEOUT_MS, of),
    };
    if response == Response::Direct {
        useless(layers, index, &relay);
    }
    let lane = lane(layers, index, ack);
    let kv = kv::kv(layers, index, policy);
    let load = kv::load(layers, index, policy, response);
    let block_tokens = layers.int(&keys::ROUTE_BLOCK_TOKENS, of);
    if let Some((text, at)) = &listen {
        offered(layers, text, at);
    }
    if let Some((text, at)) = &target {
        whole(layers, "target", text, at);
    }
    let ((listen, listen_at), (target, target_at)) = (listen?, target?);
    let (listen, target) = (EndpointId::parse(&listen), EndpointId::parse(&target));
    if listen == target {
        layers.error(
            &target_at,
            format!("target is {target}, the route's own listen: a request would come back"),
            "write the endpoint of the workers",
        );
    }
    let route = Route {
        listen,
        target,
        policy,
        header,
        response,
        ack,
        ack_timeout_ms,
        retries_max,
        hold_bytes,
        relay,
        lane,
        block_tokens,
        kv,
        load,
    };
    Some(Placed {
        route,
        listen_at,
        target_at,
    })
}

/// The keys of a route whose workers share memory with us.
fn lane(layers: &mut Layers, index: usize, ack: Ack) -> Option<RouteLane> {
    let of = Of::Item(index);
    let socket = layers.text(&keys::ROUTE_LANE, of);
    let bytes: u64 = layers.int(&keys::ROUTE_LANE_BYTES, of);
    let uids = layers.text(&keys::ROUTE_LANE_UIDS, of);
    let uids = uids.map_or_else(Vec::new, |(text, at)| {
        let numbers = text.split(',').map(|number| number.trim().parse());
        numbers
            .collect::<Result<Vec<u32>, _>>()
            .unwrap_or_else(|_| {
                let what = format!("lane_uids is {}, no list of users' numbers", quoted(&text));
                layers.error(&at, what, r#"write lane_uids = "1000,1001""#);
                Vec::new()
            })
    });
    let (socket, _) = socket?;
    if ack == Ack::OnAccept {
        let at = entry(layers, index, &keys::ROUTE_ACK);
        layers.error(
            &at,
            "ack = \"on_accept\" does not go with a lane: its workers do not answer".to_owned(),
            r#"write ack = "on_forward", or take it out"#,
        );
    }
    Some(RouteLane {
        socket: socket.into(),
        // Half of it begins at a page, too.
        bytes: bytes / 8192 * 8192,
        uids,
    })
}

/// The header of a route, which two policies need and the others do not read.
fn header(layers: &mut Layers, index: usize, policy: Policy) -> Option<String> {
    let of = Of::Item(index);
    let header = layers.text(&keys::ROUTE_HEADER, of);
    match (policy, header) {
        (Policy::Direct, None) => Some(DIRECT_HEADER.to_owned()),
        (Policy::Hash, None) => {
            let table = layers.main.table(Section::Route, index);
            let refused =
                table.is_some_and(|table| table.refused.contains(&keys::ROUTE_HEADER.name));
            if !refused {
                let at = entry(layers, index, &keys::ROUTE_POLICY);
                let what = "policy = \"hash\" needs a header".to_owned();
                layers.error(
                    &at,
                    what,
                    r#"write header = "x-session-id" or another name"#,
                );
            }
            None
        }
        (Policy::Direct | Policy::Hash, Some((header, _))) => Some(header),
        (_, None) => None,
        (_, Some((_, at))) => {
            let what = format!(
                "header does nothing with policy = {}",
                quoted(policy.as_str())
            );
            layers.warn(
                &at,
                what,
                r#"write policy = "hash" or "direct", or take it out"#,
            );
            None
        }
    }
}

/// Keys that do nothing where responses do not pass through.
fn useless(layers: &mut Layers, index: usize, relay: &RelayTimes) {
    for (key, value) in [
        (&keys::ROUTE_HOME_TIMEOUT_MS, relay.home_timeout_ms),
        (
            &keys::ROUTE_FIRST_ITEM_TIMEOUT_MS,
            relay.first_item_timeout_ms,
        ),
        (
            &keys::ROUTE_INACTIVITY_TIMEOUT_MS,
            relay.inactivity_timeout_ms,
        ),
    ] {
        let instead = r#"write response = "relay", or take it out"#;
        let (place, value) = ((index, key), value.to_string());
        idle(layers, place, &value, "response = \"direct\"", instead);
    }
}

/// Warns of a key that was typed and does nothing. A default that is written down is no mistake.
pub(super) fn idle(
    layers: &mut Layers,
    (index, key): (usize, &'static keys::Key),
    value: &str,
    why: &str,
    instead: &str,
) {
    if matches!(key.fallback, keys::Fallback::Value(text) if text == value) {
        return;
    }
    if let Some(at) = typed(layers, index, key) {
        let what = format!("{} does nothing with {why}", key.name);
        layers.warn(&at, what, instead);
    }
}

/// Where a key of a route was typed, else where the route begins.
fn entry(layers: &Layers, index: usize, key: &keys::Key) -> Origin {
    typed(layers, index, key).unwrap_or_else(|| layers.header(Section::Route, index))
}

/// Where a key of a route was typed, if it was.
pub(super) fn typed(layers: &Layers, index: usize, key: &keys::Key) -> Option<Origin> {
    let table = layers.main.table(Section::Route, index)?;
    let entry = table.entries.iter().find(|entry| entry.key == key)?;
    Some(entry.at.clone())
}

/// A name that we put into discovery has three plain parts.
fn offered(layers: &mut Layers, text: &str, at: &Origin) {
    let parts = endpoint::parts(text);
    if parts.len() != 3 {
        layers.error(
            at,
            format!(
                "listen is {}, which has {}",
                quoted(text),
                count(parts.len())
            ),
            "write namespace/component/endpoint",
        );
    } else if let Some(odd) = parts.iter().find(|part| !endpoint::is_plain(part)) {
        layers.error(
            at,
            format!(
                "listen has {}, a name that not every reader understands",
                quoted(odd)
            ),
            "write a-z, 0-9, _ and - only",
        );
    }
}

/// A name that we look up may be anything, but one that is filled up or joined surprises.
fn whole(layers: &mut Layers, key: &str, text: &str, at: &Origin) {
    let parts = endpoint::parts(text);
    if parts.len() != 3 {
        let what = format!(
            "{key} is {}, which has {}",
            quoted(text),
            count(parts.len())
        );
        layers.warn(
            at,
            what,
            format!("it is read as {}", EndpointId::parse(text)),
        );
    }
}

fn count(parts: usize) -> String {
    match parts {
        1 => "1 part".to_owned(),
        n => format!("{n} parts"),
    }
}

fn duplicates(layers: &mut Layers, placed: &[Placed]) {
    for (index, this) in placed.iter().enumerate() {
        let first = placed[..index]
            .iter()
            .find(|other| other.route.listen == this.route.listen);
        if let Some(first) = first {
            layers.error(
                &this.listen_at,
                format!(
                    "{} is offered twice, first at {}",
                    this.route.listen, first.listen_at
                ),
                "write another endpoint, or remove one of the two routes",
            );
        }
    }
}

/// A target that leads over other routes back to where it began.
fn loops(layers: &mut Layers, placed: &[Placed]) {
    for this in placed {
        let mut names = vec![this.route.listen.to_string()];
        let mut target = &this.route.target;
        // A way longer than the number of routes has met one of them twice.
        for _ in 0..placed.len() {
            names.push(target.to_string());
            let Some(next) = placed.iter().find(|other| other.route.listen == *target) else {
                break;
            };
            if next.route.listen == this.route.listen {
                if names.len() > 2 {
                    let what = format!("routes form a loop: {}", names.join(" -> "));
                    layers.error(&this.target_at, what, "write the endpoint of the workers");
                }
                break;
            }
            target = &next.route.target;
        }
    }
}

fn instances(layers: &mut Layers, backend: Backend) -> Vec<StaticInstance> {
    let mut instances: Vec<StaticInstance> = Vec::new();
    for index in 0..layers.main.count(Section::Instance) {
        let of = Of::Item(index);
        let header = layers.header(Section::Instance, index);
        if backend == Backend::Etcd {
            layers.error(
                &header,
                "[[instance]] does not go with backend = \"etcd\"".to_owned(),
                r#"write backend = "memory" or "file", or remove it"#,
            );
        }
        let endpoint = layers.text(&keys::INSTANCE_ENDPOINT, of);
        let text = layers.text(&keys::INSTANCE_ADDRESS, of);
        let id = layers.text(&keys::INSTANCE_ID, of);
        if let Some((text, at)) = &endpoint {
            whole(layers, "endpoint", text, at);
        }
        let (Some((endpoint, _)), Some((text, at))) = (endpoint, text) else {
            continue;
        };
        let Some((socket, path)) = address(&text) else {
            continue;
        };
        let id = id.and_then(|(id, _)| u64::from_str_radix(&id, 16).ok());
        let instance = StaticInstance {
            endpoint: EndpointId::parse(&endpoint),
            socket,
            path: path.to_owned(),
            id: id.unwrap_or_else(|| instance_id(&text, path)),
        };
        duplicate_instance(layers, &instances, &instance, &at);
        instances.push(instance);
    }
    instances
}

fn duplicate_instance(
    layers: &mut Layers,
    before: &[StaticInstance],
    this: &StaticInstance,
    at: &Origin,
) {
    let same = |other: &&StaticInstance| other.endpoint == this.endpoint;
    let mut others = before.iter().filter(same);
    if others
        .clone()
        .any(|other| other.socket == this.socket && other.path == this.path)
    {
        let what = format!("the instance {}/{} is there twice", this.socket, this.path);
        layers.error(at, what, "remove one of the two");
    } else if others.any(|other| other.id == this.id) {
        let what = format!(
            "two instances of {} have the id {:x}",
            this.endpoint, this.id
        );
        layers.error(
            at,
            what,
            "write id = \"...\" with another number in one of them",
        );
    }
}

/// The id that Dynamo's workers put at the front of their path, else a number made from the whole
/// address, so that it is the same after every start.
fn instance_id(address: &str, path: &str) -> u64 {
    let first = path.split('/').next().unwrap_or_default();
    u64::from_str_radix(first, 16).unwrap_or_else(|_| {
        // FNV-1a.
        address.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    })
}

/// With memory discovery an instance that is not written down can never come.
fn orphans(layers: &mut Layers, placed: &[Placed], instances: &[StaticInstance]) {
    let provided = |target: &EndpointId| {
        instances
            .iter()
            .any(|instance| instance.endpoint == *target)
            || placed.iter().any(|other| other.route.listen == *target)
    };
    let by_lane = |this: &&Placed| this.route.lane.is_some();
    let rest = placed.iter().filter(|this| !by_lane(this));
    for this in rest.filter(|this| !provided(&this.route.target)) {
        layers.warn(
            &this.target_at,
            format!(
                "{} has no instance, and discovery \"memory\" finds none",
                this.route.target
            ),
            "write an [[instance]], or another [discovery] backend",
        );
    }
}
