//! Layers become a [`Config`]: typed values, and the checks that look at two settings at once.
//! What concerns routes and instances is in `routes`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use corelane_engine::quic;
use corelane_engine::steering::Steering;

use super::keys;
use super::layers::{Layers, Of};
use super::problem::{Origin, quoted};
use super::value::{Value, ip};
use super::words::{Backend, Idle, RelayPlane, ResponsePlane, Switch};
use super::{
    Config, Control, Core, Discovery, Drain, Host, Inputs, Reload, Responses, Secret, Server,
    cores, events, gpu, placing, planner, routes, tls,
};

/// The configuration, if nothing is missing; the caller drops it when an error was reported.
pub(super) fn config(layers: &mut Layers, inputs: &Inputs) -> Option<Config> {
    let mut server = server(layers);
    let discovery = discovery(layers);
    let broker = events::broker(layers, inputs.purpose, server.host, &inputs.host);
    let curve = events::curve(layers, inputs.purpose, broker.as_ref());
    let routed = inputs.purpose.routes();
    let (routes, instances) = match routed {
        true => routes::routes(layers, inputs.purpose, discovery.backend, broker.is_some()),
        false => (Vec::new(), Vec::new()),
    };
    let (cores, role) = cores::cores(layers, inputs);
    let control = control(layers, inputs, &cores, role);
    if routed {
        server.steering = placing::steering(layers, &cores, &inputs.host.root);
        cores::open_files(layers, &inputs.host, &cores);
    }
    let drain = Drain {
        grace_s: layers.int(&keys::DRAIN_GRACE_S, Of::Once),
        timeout_s: layers.int(&keys::DRAIN_TIMEOUT_S, Of::Once),
    };
    let gpu = gpu::gpu(layers, inputs.purpose);
    let planner = planner::planner(layers, inputs.purpose);
    let reload = Reload {
        watch: Duration::from_millis(layers.int(&keys::RELOAD_WATCH_MS, Of::Once)),
        failures_pct: layers.int(&keys::RELOAD_FAILURES_PCT, Of::Once),
        taken_timeout: Duration::from_secs(layers.int(&keys::RELOAD_TAKEN_TIMEOUT_S, Of::Once)),
    };
    let settings = Vec::new();
    Some(Config {
        server,
        discovery,
        routes,
        instances,
        cores,
        control: control?,
        drain,
        gpu,
        planner,
        reload,
        broker,
        curve,
        settings,
    })
}

fn server(layers: &mut Layers) -> Server {
    let address = |found: Option<(String, Origin)>| found.and_then(|(text, _)| ip(&text));
    let host = address(layers.text(&keys::SERVER_HOST, Of::Once))
        .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let advertise = layers.text(&keys::SERVER_ADVERTISE_HOST, Of::Once);
    let advertise_host = address(advertise.clone());
    if let (Some((_, at)), Some(true)) = (
        &advertise,
        advertise_host.map(|address| address.is_unspecified()),
    ) {
        let what = "advertise_host is a wildcard, which nobody can dial".to_owned();
        layers.error(at, what, "write an address of this machine");
    }
    let port: u16 = layers.int(&keys::SERVER_PORT, Of::Once);
    let home_host = address(layers.text(&keys::SERVER_HOME_HOST, Of::Once)).unwrap_or(host);
    let home_port: u16 = layers.int(&keys::SERVER_HOME_PORT, Of::Once);
    let status_host = address(layers.text(&keys::SERVER_STATUS_HOST, Of::Once)).unwrap_or(host);
    let status = layers.get(&keys::SERVER_STATUS_PORT, Of::Once);
    let (status_port, status_at) = match status {
        Some((Value::Int(number), at)) => (u16::try_from(number).ok(), at),
        _ => (None, Origin::Default),
    };
    let overlap = host == status_host || host.is_unspecified() || status_host.is_unspecified();
    if port != 0 && status_port == Some(port) && overlap {
        layers.error(
            &status_at,
            format!("status_port is {port}, which is the request plane's port too"),
            "write two different ports, or status_port = -1",
        );
    }
    let message_bytes_max = layers.int(&keys::SERVER_MESSAGE_BYTES_MAX, Of::Once);
    Server {
        host,
        advertise_host,
        port,
        home_host,
        home_port,
        status_host,
        status_port,
        message_bytes_max,
        // Decided when the cores are known.
        steering: Steering::Hash,
        imbalance: placing::imbalance(layers),
        responses: responses(layers),
        tls: tls::tls(layers),
    }
}

fn responses(layers: &mut Layers) -> Responses {
    let (key, tcp) = (&keys::SERVER_RESPONSE_PLANE, ResponsePlane::Tcp);
    let relay = &keys::SERVER_RELAY_PLANE;
    let batch_us: u32 = layers.int(&keys::SERVER_QUIC_BATCH_US, Of::Once);
    Responses {
        plane: match layers.word(key, ResponsePlane::parse, tcp) {
            ResponsePlane::Tcp => quic::ResponsePlane::Tcp,
            ResponsePlane::Quic => quic::ResponsePlane::Quic,
        },
        quic_batch: Duration::from_micros(batch_us.into()),
        quic_buffer_items: layers.int(&keys::SERVER_QUIC_BUFFER_ITEMS, Of::Once),
        relay_plane: match layers.word(relay, RelayPlane::parse, RelayPlane::Caller) {
            RelayPlane::Caller => None,
            RelayPlane::Tcp => Some(quic::ResponsePlane::Tcp),
            RelayPlane::Quic => Some(quic::ResponsePlane::Quic),
        },
    }
}

fn discovery(layers: &mut Layers) -> Discovery {
    let backend = layers.word(&keys::DISCOVERY_BACKEND, Backend::parse, Backend::Memory);
    let endpoints = match layers.get(&keys::DISCOVERY_ENDPOINTS, Of::Once) {
        Some((Value::List(endpoints), _)) => endpoints,
        _ => Vec::new(),
    };
    let path = match layers.text(&keys::DISCOVERY_PATH, Of::Once) {
        Some((path, _)) => PathBuf::from(path),
        None => std::env::temp_dir().join("dynamo_store_kv"),
    };
    let discovery = Discovery {
        backend,
        endpoints,
        lease_ttl_s: layers.int(&keys::DISCOVERY_LEASE_TTL_S, Of::Once),
        connect_timeout_s: layers.int(&keys::DISCOVERY_CONNECT_TIMEOUT_S, Of::Once),
        keepalive_interval_s: layers.int(&keys::DISCOVERY_KEEPALIVE_INTERVAL_S, Of::Once),
        keepalive_timeout_s: layers.int(&keys::DISCOVERY_KEEPALIVE_TIMEOUT_S, Of::Once),
        login: pair(layers, &keys::DISCOVERY_USERNAME, &keys::DISCOVERY_PASSWORD),
        ca: layers
            .text(&keys::DISCOVERY_CA, Of::Once)
            .map(|(text, _)| text),
        client_cert: pair(
            layers,
            &keys::DISCOVERY_CLIENT_CERT,
            &keys::DISCOVERY_CLIENT_KEY,
        ),
        path,
    };
    if backend == Backend::Etcd {
        keepalive(layers, &discovery);
        certificates(layers, &discovery);
    }
    discovery
}

/// Certificates towards etcd: what belongs together, and whether the files are there.
fn certificates(layers: &mut Layers, discovery: &Discovery) {
    let ca_at = origin(layers, &keys::DISCOVERY_CA);
    let cert_at = origin(layers, &keys::DISCOVERY_CLIENT_CERT);
    let key_at = origin(layers, &keys::DISCOVERY_CLIENT_KEY);
    if discovery.login.is_some() && (discovery.ca.is_some() || discovery.client_cert.is_some()) {
        let at = if discovery.ca.is_some() {
            &ca_at
        } else {
            &cert_at
        };
        let what = "certificates and a log-in do not go together; the log-in wins".to_owned();
        layers.warn(
            at,
            what,
            "remove username and password, or the certificates",
        );
    } else if discovery.client_cert.is_some() && discovery.ca.is_none() {
        let what = "client_cert without ca".to_owned();
        layers.error(&cert_at, what, "write ca too, or leave client_cert out");
    }
    let (cert, key) = match &discovery.client_cert {
        Some((cert, key)) => (Some(cert.as_str()), Some(key.reveal())),
        None => (None, None),
    };
    let pems = [
        ("ca", discovery.ca.as_deref(), ca_at),
        ("client_cert", cert, cert_at),
        ("client_key", key, key_at),
    ];
    for (name, text, at) in pems {
        let path = text.filter(|text| !text.contains("-----BEGIN"));
        if path.is_some_and(|path| std::fs::File::open(path).is_err()) {
            let what = format!("{name} is neither PEM text nor a file that can be read");
            layers.error(&at, what, "write the path of a PEM file");
        }
    }
}

/// Two settings that are of use only together.
fn pair(
    layers: &mut Layers,
    public: &'static keys::Key,
    secret: &'static keys::Key,
) -> Option<(String, Secret)> {
    let (one, other) = (layers.text(public, Of::Once), layers.text(secret, Of::Once));
    let (at, there, missing) = match (one, other) {
        (Some((public, _)), Some((secret, _))) => return Some((public, Secret(secret))),
        (None, None) => return None,
        (Some((_, at)), None) => (at, public, secret),
        (None, Some((_, at))) => (at, secret, public),
    };
    let what = format!("{} without {}", there.name, missing.name);
    layers.error(
        &at,
        what,
        format!("write {} too, or leave both out", missing.name),
    );
    None
}

/// etcd answers too frequent pings with an error, and pings slower than the lease find a dead
/// connection too late (`spec/events-discovery.md` §4.7).
fn keepalive(layers: &mut Layers, discovery: &Discovery) {
    let interval = discovery.keepalive_interval_s;
    if interval == 0 {
        return;
    }
    let at = origin(layers, &keys::DISCOVERY_KEEPALIVE_INTERVAL_S);
    if interval < 5 {
        let what = format!("keepalive_interval_s is {interval}, which etcd may refuse");
        layers.warn(&at, what, "write 5 or more");
    }
    let total = interval + discovery.keepalive_timeout_s;
    if total >= discovery.lease_ttl_s {
        let ttl_at = origin(layers, &keys::DISCOVERY_LEASE_TTL_S);
        let what = format!(
            "a dead connection to etcd is seen after {total} s, the lease ends after {}",
            discovery.lease_ttl_s
        );
        let instead = "write a longer lease_ttl_s, or a shorter keepalive_interval_s";
        layers.warn(&ttl_at, what, instead);
    }
}

/// Where the value came from that was used for a key.
pub(super) fn origin(layers: &Layers, key: &keys::Key) -> Origin {
    let path = key.path();
    let found = layers
        .settings
        .iter()
        .rev()
        .find(|setting| setting.path == path);
    found.map_or(Origin::Default, |setting| setting.origin.clone())
}

/// A CPU by its number or as the last one, of those that are `free` if there are any.
pub(super) fn cpu(
    layers: &mut Layers,
    host: &Host,
    key: &'static keys::Key,
    free: impl Fn(usize) -> bool,
) -> Option<(usize, Origin)> {
    let (value, at) = layers.get(key, Of::Once)?;
    let cpu = match value {
        Value::Int(number) => usize::try_from(number).ok()?,
        _ => {
            let free = host.cpus.iter().rev().find(|&&cpu| free(cpu));
            *free.or(host.cpus.last())?
        }
    };
    if !host.cpus.contains(&cpu) {
        let what = format!(
            "cpu is {cpu}, which this process may not use ({})",
            host.cpu_list()
        );
        layers.error(&at, what, r#"write one of these, or "last""#);
        return None;
    }
    Some((cpu, at))
}

fn control(
    layers: &mut Layers,
    inputs: &Inputs,
    cores: &[Core],
    role: cores::ByRole,
) -> Option<Control> {
    let host = &inputs.host;
    let is_data = |cpu: usize| cores.iter().find(|core| core.cpu == cpu);
    let (mut cpu, at) = cpu(layers, host, &keys::CONTROL_CPU, |cpu| {
        is_data(cpu).is_none()
    })?;
    if let Some((by_role, role_at)) = role {
        if at != Origin::Default && by_role != cpu {
            let what = format!("role = \"control\" on CPU {by_role}, and [control] cpu is {cpu}");
            layers.error(&role_at, what, "write only one of the two");
        }
        cpu = by_role;
    }
    if is_data(cpu).is_some_and(|core| core.idle == Idle::Spin) {
        let what = format!("the control core shares CPU {cpu} with a data core that spins");
        layers.warn(
            &at,
            what,
            r#"write idle = "block", or keep a CPU out of cpus"#,
        );
    }
    let share = layers.word(&keys::CONTROL_SHARE, Switch::parse, Switch::Off);
    let flight_dir = layers.text(&keys::CONTROL_FLIGHT_DIR, Of::Once);
    Some(Control {
        cpu,
        share: share == Switch::On,
        flight_dir: flight_dir.map(|(dir, _)| PathBuf::from(dir)),
        log: log(layers, inputs),
    })
}

/// The filter of the log. Variables have one for all commands, and win.
fn log(layers: &mut Layers, inputs: &Inputs) -> Option<String> {
    let (filter, at) = layers.text(&keys::CONTROL_LOG, Of::Once)?;
    if !crate::logging::is_filter(&filter) {
        let what = format!("log is {}, not a filter of the log", quoted(&filter));
        let instead = "write a level or target=level, with commas between";
        layers.error(&at, what, instead);
        return None;
    }
    let Some(name) = crate::logging::wins(&inputs.env) else {
        return Some(filter);
    };
    let what = format!("log does nothing: {name} is set and wins");
    layers.warn(&at, what, format!("unset {name}, or take log out"));
    None
}
