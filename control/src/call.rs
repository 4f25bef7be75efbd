//! `corelane call`: calls an endpoint, prints items and times.
//!
//! With `--json` each line of standard output is one object:
//!
//! ```text
//! {"type":"item","call":1,"index":0,"at_us":412.7,"instance":"1a","data":VALUE}
//! {"type":"note","call":1,"index":1,"at_us":..,"instance":"1a","event":TEXT,"comment":[TEXT..]}
//! {"type":"error","call":1,"index":2,"at_us":..,"instance":"1a","error":{"class","reason","text"}}
//! {"type":"end","call":1,"instance":"1a","outcome":"ok"|"stopped"|"refused"|"failed",
//!  "error":TEXT|null,"items":3,"ack_us":..|null,"first_us":..|null,"last_us":..|null,"end_us":..}
//! {"type":"summary","calls":..,"ok":..,"stopped":..,"failed":..,"items":..,"errors":{TEXT:COUNT},
//!  "seconds":..,"calls_per_second":..,"first_us":SPREAD|null,"end_us":SPREAD|null}
//! ```
//!
//! Times are microseconds since the shard began the call; SPREAD is `{"p50","p90","p99","max"}`.
//! The summary comes with more than one call. A call with an error item has failed.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::headers::TRACEPARENT;
use corelane_codec::item::write_value;
use corelane_codec::path::parse_instance_path;
use corelane_codec::trace_context::TraceContext;
use corelane_engine::client::{CallEvent, Deadlines, NewCall, What};
use corelane_engine::ends::{Ends, HomeAddress};
use corelane_engine::shard::Command;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tokio::runtime::Builder;
use tokio::task::LocalSet;
use tokio::time::timeout;

mod print;

use self::print::{Item, Printer};
use crate::cli::{CallArgs, Early, Exit, Target};
use crate::config::{self, Backend, EndpointId};
use crate::discovery::{Discovery, EtcdDiscovery, EtcdOptions, FileDiscovery, FileOptions};
use crate::env::Env;
use crate::nats::Requests;
use crate::peer::Peer;
use crate::trace::{self, CallSpan};
use crate::watch::{Instance, InstanceWatch};

/// Longest wait for an instance to appear in discovery.
const APPEAR_MAX: Duration = Duration::from_secs(5);
/// How long a worker has for its acknowledgement, unless the whole call has less.
const ACK_MAX: Duration = Duration::from_secs(5);
/// Slowest call that the histograms tell apart, in microseconds.
const SLOWEST_US: u64 = 86_400_000_000;

/// Makes the calls.
///
/// # Errors
/// No instance is there, or this host cannot run a shard. A failed call is no error but
/// [`Exit::Failed`].
pub fn run(args: CallArgs) -> Result<Exit> {
    trace::export();
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot make the control runtime")?;
    let local = LocalSet::new();
    let outcome = local.block_on(&runtime, calls(args));
    drop(local);
    runtime.shutdown_background();
    outcome
}

/// Nothing of ours is offered, so nobody dials this.
const ANYWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

async fn calls(args: CallArgs) -> Result<Exit> {
    let requests = Requests::from_env(&Env::current(), ANYWHERE).await?;
    let gateway = requests.as_ref().map(Requests::gateway);
    let mut targets = Targets::find(&args, gateway).await?;
    let home = HomeAddress {
        bind: SocketAddr::new(args.server.host, 0),
        advertise: args.server.advertised(),
    };
    let calls_max = args.concurrency + 64;
    let peer = Peer::start(&args.server, None, || Ends::client(home, calls_max)).await?;
    let mut caller = Caller {
        bodies: Bodies::of(&args.body)?,
        peer: &peer,
        running: HashMap::new(),
        printer: Printer::new(args.json),
        tally: Tally::new()?,
        args: &args,
    };
    let outcome = caller.all(&mut targets).await;
    peer.stop().await;
    outcome?;
    let failed = caller.tally.failed > 0;
    if args.count > 1 {
        let summary = caller.tally.summary();
        caller.printer.summary(&summary)?;
    }
    caller.printer.flush()?;
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

/// The instances to call, in turn.
struct Targets {
    watch: Option<(Discovery, InstanceWatch)>,
    instances: Vec<Instance>,
    next: usize,
    name: String,
}

impl Targets {
    async fn find(args: &CallArgs, gateway: Option<SocketAddr>) -> Result<Targets> {
        let endpoint = match &args.target {
            Target::Endpoint(endpoint) => endpoint.clone(),
            Target::Address { socket, path, .. } => {
                let id = parse_instance_path(path).map_or(0, |(id, _)| id);
                let instance = Instance {
                    id,
                    address: *socket,
                    path: path.clone().into_bytes(),
                    codec: PayloadCodec::Json,
                    device: None,
                };
                return Ok(Targets {
                    watch: None,
                    instances: vec![instance],
                    next: 0,
                    name: format!("{socket}/{path}"),
                });
            }
        };
        let discovery = open(&args.discovery).await?;
        let mut watch = InstanceWatch::new(&discovery, &endpoint).over_nats(gateway);
        let mut instances = Vec::new();
        let appear = async {
            watch.listed().await;
            loop {
                instances = watch.instances();
                if !instances.is_empty() {
                    return;
                }
                watch.changed().await;
            }
        };
        if timeout(APPEAR_MAX.min(args.timeout), appear).await.is_err() {
            bail!("{}", nobody(&endpoint, args));
        }
        Ok(Targets {
            watch: Some((discovery, watch)),
            instances,
            next: 0,
            name: endpoint.to_string(),
        })
    }

    /// The next one in turn. Instances that have left are not called; when all have left, the
    /// last known ones are tried.
    fn next(&mut self) -> Instance {
        if let Some((_, watch)) = &mut self.watch {
            let now = watch.instances();
            if !now.is_empty() {
                self.instances = now;
            }
        }
        let instance = self.instances[self.next % self.instances.len()].clone();
        self.next += 1;
        instance
    }
}

fn nobody(endpoint: &EndpointId, args: &CallArgs) -> String {
    let place = match args.discovery.backend {
        Backend::Etcd => format!("etcd at {}", args.discovery.endpoints.join(",")),
        Backend::File => args.discovery.path.display().to_string(),
        Backend::Memory => "memory".into(),
    };
    format!(
        "no instance of {endpoint} in {place}; check the name and that its worker runs, or name \
         an instance with --address IP:PORT/PATH"
    )
}

/// The store of a command that looks others up.
///
/// # Errors
/// It cannot be reached, or it is our own memory.
pub(crate) async fn open(discovery: &config::Discovery) -> Result<Discovery> {
    let lookup = |name: &str| discovery.variable(name);
    Ok(match discovery.backend {
        Backend::Etcd => {
            Discovery::Etcd(EtcdDiscovery::connect(EtcdOptions::from_env(lookup)?).await?)
        }
        Backend::File => Discovery::File(FileDiscovery::open(FileOptions::from_env(lookup)).await?),
        // The command line has refused this; a name cannot be looked up in our own memory.
        Backend::Memory => bail!("discovery in memory knows only its own process"),
    })
}

/// Takes out the trace that the user has named: a span of ours comes between.
fn take_trace(headers: &mut Vec<(String, String)>) -> Option<TraceContext> {
    let at = headers.iter().position(|(name, _)| name == TRACEPARENT)?;
    TraceContext::parse(&headers.remove(at).1)
}

/// The body in both codecs.
struct Bodies {
    json: Vec<u8>,
    packed: Vec<u8>,
}

impl Bodies {
    fn of(json: &str) -> Result<Bodies> {
        let value: Value = serde_json::from_str(json).context("the body is not JSON")?;
        let mut packed = Vec::new();
        write_value(&value, PayloadCodec::MessagePack, &mut packed)?;
        let json = json.as_bytes().to_vec();
        Ok(Bodies { json, packed })
    }

    fn in_codec(&self, codec: PayloadCodec) -> Vec<u8> {
        match codec {
            PayloadCodec::Json => self.json.clone(),
            PayloadCodec::MessagePack => self.packed.clone(),
        }
    }
}

/// A call under way.
struct Running {
    instance: Instance,
    span: Option<CallSpan>,
    items: u64,
    ack_us: Option<f64>,
    first_us: Option<f64>,
    last_us: Option<f64>,
    /// The first error item.
    error: Option<String>,
    ended_early: bool,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Ok,
    Stopped,
    Refused,
    Failed,
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Stopped => "stopped",
            Outcome::Refused => "refused",
            Outcome::Failed => "failed",
        }
    }
}

struct Caller<'a> {
    args: &'a CallArgs,
    peer: &'a Peer,
    bodies: Bodies,
    running: HashMap<u64, Running>,
    printer: Printer,
    tally: Tally,
}

impl Caller<'_> {
    async fn all(&mut self, targets: &mut Targets) -> Result<()> {
        let mut begun = 0;
        if !self.args.json && self.args.count > 1 {
            self.printer
                .line(&format!("{} calls of {}", self.args.count, targets.name))?;
        }
        while begun < self.args.count || !self.running.is_empty() {
            let room = self.running.len() < self.args.concurrency as usize;
            if begun < self.args.count && room {
                begun += 1;
                self.begin(begun, targets.next()).await?;
                continue;
            }
            let event = match self.peer.next_event() {
                Some(event) => event,
                None => {
                    // Streams are looked at while they flow.
                    self.printer.flush()?;
                    tokio::select! {
                        event = self.peer.event() => event,
                        why = self.peer.ended() => bail!("the shard has ended: {why}"),
                    }
                }
            };
            self.take(event).await?;
        }
        Ok(())
    }

    async fn begin(&mut self, number: u64, instance: Instance) -> Result<()> {
        let total = self.args.timeout;
        let mut headers = self.args.headers.clone();
        let span = CallSpan::begin(take_trace(&mut headers));
        if let Some(span) = &span {
            headers.push((TRACEPARENT.to_owned(), span.context().to_string()));
        } else {
            headers.clone_from(&self.args.headers);
        }
        let call = NewCall {
            number,
            address: instance.address,
            path: instance.path.clone(),
            id: String::new(),
            headers,
            body: self.bodies.in_codec(instance.codec),
            codec: instance.codec,
            deadlines: Deadlines {
                ack: ACK_MAX.min(total),
                first_item: total,
                total,
            },
        };
        let running = Running {
            instance,
            span,
            items: 0,
            ack_us: None,
            first_us: None,
            last_us: None,
            error: None,
            ended_early: false,
        };
        self.running.insert(number, running);
        self.peer.command(Command::Call(Box::new(call))).await
    }

    async fn take(&mut self, event: CallEvent) -> Result<()> {
        let Some(running) = self.running.get_mut(&event.call) else {
            return Ok(());
        };
        let at_us = (event.at_ns - event.began_ns) as f64 / 1e3;
        let item = match event.what {
            What::Acked => {
                running.ack_us = Some(at_us);
                return Ok(());
            }
            What::Item(data) => Item::read(&data, running.instance.codec),
            What::BadItem(error) => Item::Error(error),
            end => return self.end(event.call, at_us, end),
        };
        running.first_us.get_or_insert(at_us);
        running.last_us = Some(at_us);
        if let Item::Error(error) = &item {
            running.error.get_or_insert_with(|| error.to_string());
        }
        self.printer.item(event.call, running, at_us, &item)?;
        running.items += 1;
        let kill = match self.args.early {
            Some(Early::Stop(items)) if running.items >= items => false,
            Some(Early::Kill(items)) if running.items >= items => true,
            _ => return Ok(()),
        };
        if !std::mem::replace(&mut running.ended_early, true) {
            let number = event.call;
            self.peer.command(Command::EndCall { number, kill }).await?;
        }
        Ok(())
    }

    fn end(&mut self, number: u64, at_us: f64, end: What) -> Result<()> {
        let Some(mut running) = self.running.remove(&number) else {
            return Ok(());
        };
        let (outcome, error) = match end {
            What::Refused(text) => (Outcome::Refused, Some(text)),
            What::Failed(error) => (Outcome::Failed, Some(error.to_string())),
            What::Stopped => (Outcome::Stopped, None),
            _ => (Outcome::Ok, None),
        };
        let (outcome, error) = match (outcome, running.error.take()) {
            (Outcome::Ok, Some(error)) => (Outcome::Failed, Some(error)),
            _ => (outcome, error),
        };
        if let Some(span) = running.span {
            let failed = !matches!(outcome, Outcome::Ok | Outcome::Stopped);
            span.end(outcome.word(), failed, running.instance.id);
        }
        let error = error.as_deref();
        self.tally.count(outcome, error, &running, at_us);
        self.printer.end(number, &running, at_us, outcome, error)?;
        Ok(())
    }
}

/// Counts and times of all calls.
struct Tally {
    began: Instant,
    ok: u64,
    stopped: u64,
    failed: u64,
    items: u64,
    errors: BTreeMap<String, u64>,
    first_us: Histogram<u64>,
    end_us: Histogram<u64>,
}

impl Tally {
    fn new() -> Result<Tally> {
        Ok(Tally {
            began: Instant::now(),
            ok: 0,
            stopped: 0,
            failed: 0,
            items: 0,
            errors: BTreeMap::new(),
            first_us: Histogram::new_with_bounds(1, SLOWEST_US, 3)?,
            end_us: Histogram::new_with_bounds(1, SLOWEST_US, 3)?,
        })
    }

    fn count(&mut self, outcome: Outcome, error: Option<&str>, running: &Running, end_us: f64) {
        /// Different texts that are told apart.
        const TEXTS_MAX: usize = 64;
        match outcome {
            Outcome::Ok => self.ok += 1,
            Outcome::Stopped => self.stopped += 1,
            Outcome::Refused | Outcome::Failed => self.failed += 1,
        }
        self.items += running.items;
        if let Some(error) = error {
            let known = self.errors.len() < TEXTS_MAX || self.errors.contains_key(error);
            let text = if known { error } else { "others" };
            *self.errors.entry(text.to_owned()).or_default() += 1;
        }
        if let Some(first_us) = running.first_us {
            self.first_us.saturating_record(first_us as u64);
        }
        if outcome == Outcome::Ok {
            self.end_us.saturating_record(end_us as u64);
        }
    }

    fn summary(&self) -> Value {
        let seconds = self.began.elapsed().as_secs_f64();
        let calls = self.ok + self.stopped + self.failed;
        json!({
            "type": "summary",
            "calls": calls,
            "ok": self.ok,
            "stopped": self.stopped,
            "failed": self.failed,
            "items": self.items,
            "errors": self.errors,
            "seconds": seconds,
            "calls_per_second": calls as f64 / seconds.max(1e-9),
            "first_us": spread(&self.first_us),
            "end_us": spread(&self.end_us),
        })
    }
}

fn spread(times: &Histogram<u64>) -> Option<Value> {
    (!times.is_empty()).then(|| {
        json!({
            "p50": times.value_at_quantile(0.5),
            "p90": times.value_at_quantile(0.9),
            "p99": times.value_at_quantile(0.99),
            "max": times.max(),
        })
    })
}

#[cfg(test)]
mod tests {
    use corelane_codec::item;

    use super::*;

    #[test]
    fn bodies_are_the_same_value_in_both_codecs() {
        let bodies = Bodies::of(r#" {"a": [1, "é"]} "#).unwrap();
        let json: Value = item::from_bytes(&bodies.json, PayloadCodec::Json).unwrap();
        let packed = bodies.in_codec(PayloadCodec::MessagePack);
        let packed: Value = item::from_bytes(&packed, PayloadCodec::MessagePack).unwrap();
        assert_eq!(json, packed);
    }
}
