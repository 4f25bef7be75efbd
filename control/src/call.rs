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
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::item::write_value;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{self, Receiver};

mod caller;
mod print;

use self::caller::{Caller, End, Heard, What};
use self::print::{Item, Printer};
use crate::cli::{CallArgs, Exit, Target};
use crate::component::{Client, Options, Runtime};
use crate::config::{Backend, Drain, EndpointId};
use crate::discovery::MemoryStore;

/// Longest wait for an instance to appear in discovery.
const APPEAR_MAX: Duration = Duration::from_secs(5);
/// Slowest call that the histograms tell apart, in microseconds.
const SLOWEST_US: u64 = 86_400_000_000;
/// What callers have heard and is not printed yet, at most; then they wait.
const HEARD_MAX: usize = 1024;

/// Makes the calls.
///
/// # Errors
/// No instance is there, or this host cannot run a shard. A failed call is no error but
/// [`Exit::Failed`].
pub fn run(args: CallArgs) -> Result<Exit> {
    let nothing = Drain {
        grace_s: 0,
        timeout_s: 0,
    };
    let options = Options::of_command(args.server.clone(), args.discovery.clone(), nothing)?;
    let options = options.calls_only().calls_max(args.concurrency + 64);
    let options = options.status(None).signals(false);
    let options = match args.target {
        Target::Endpoint(_) => options,
        // Nobody is looked up.
        Target::Address { .. } => options.memory(&MemoryStore::default()),
    };
    let exit = Runtime::run(options, async |runtime| calls(&runtime, args).await)?;
    Ok(exit.unwrap_or(Exit::Failed))
}

async fn calls(runtime: &Runtime, args: CallArgs) -> Result<Exit> {
    let (client, name) = find(runtime, &args).await?;
    let bodies = Bodies::of(&args.body)?;
    let (out, heard) = mpsc::channel(HEARD_MAX);
    let mut listener = Listener {
        printer: Printer::new(args.json),
        tally: Tally::new()?,
        running: HashMap::new(),
    };
    if !args.json && args.count > 1 {
        let text = format!("{} calls of {name}", args.count);
        listener.printer.line(&text)?;
    }
    let count = args.count;
    let callers = count.min(args.concurrency.into());
    let caller = Caller {
        args: Arc::new(args),
        bodies: Arc::new(bodies),
        client: client.detect_faults(false),
        begun: Arc::new(AtomicU64::new(0)),
        out,
    };
    for _ in 0..callers {
        let caller = caller.clone();
        runtime.spawn(|shard| caller.run(shard)).await?;
    }
    drop(caller);
    listener.hear(heard, count).await?;
    if count > 1 {
        let summary = listener.tally.summary();
        listener.printer.summary(&summary)?;
    }
    listener.printer.flush()?;
    Ok(match listener.tally.failed {
        0 => Exit::Done,
        _ => Exit::Failed,
    })
}

/// Whom to call, and what he is called.
async fn find(runtime: &Runtime, args: &CallArgs) -> Result<(Client, String)> {
    match &args.target {
        Target::Address { socket, path, .. } => {
            let address = format!("{socket}/{path}");
            Ok((runtime.client_at(&address)?, address))
        }
        Target::Endpoint(endpoint) => {
            let client = runtime.client_of(std::slice::from_ref(endpoint));
            let there = client.wait_for_instances(APPEAR_MAX.min(args.timeout));
            if there.await.is_err() {
                bail!("{}", nobody(endpoint, args));
            }
            Ok((client, endpoint.to_string()))
        }
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

/// What was heard of a call that has not ended.
#[derive(Default)]
struct Running {
    items: u64,
    first_us: Option<f64>,
    last_us: Option<f64>,
    /// The first error item.
    error: Option<String>,
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

/// Prints and counts what callers hear.
struct Listener {
    printer: Printer,
    tally: Tally,
    running: HashMap<u64, Running>,
}

impl Listener {
    /// Until so many calls have ended.
    async fn hear(&mut self, mut heard: Receiver<Heard>, calls: u64) -> Result<()> {
        let mut ended = 0;
        while ended < calls {
            let next = match heard.try_recv() {
                Ok(next) => Some(next),
                Err(TryRecvError::Disconnected) => None,
                Err(TryRecvError::Empty) => {
                    // Streams are looked at while they flow.
                    self.printer.flush()?;
                    heard.recv().await
                }
            };
            let Some(next) = next else {
                bail!("the shard has ended before its calls");
            };
            ended += u64::from(matches!(next.what, What::End(_)));
            self.take(next)?;
        }
        Ok(())
    }

    fn take(&mut self, heard: Heard) -> Result<()> {
        let at_us = heard.at.as_nanos() as f64 / 1e3;
        let item = match heard.what {
            What::Item(data, codec) => Item::read(&data, codec),
            What::BadItem(error) => Item::Error(error),
            What::End(end) => return self.end(heard.call, heard.instance, at_us, end),
        };
        let running = self.running.entry(heard.call).or_default();
        running.first_us.get_or_insert(at_us);
        running.last_us = Some(at_us);
        if let Item::Error(error) = &item {
            running.error.get_or_insert_with(|| error.to_string());
        }
        let index = running.items;
        running.items += 1;
        let place = (heard.call, index);
        self.printer.item(place, heard.instance, at_us, &item)
    }

    fn end(&mut self, call: u64, instance: Option<u64>, at_us: f64, end: End) -> Result<()> {
        let mut running = self.running.remove(&call).unwrap_or_default();
        let said = match end.outcome {
            Outcome::Refused => end.error.map(|error| error.text().to_owned()),
            _ => end.error.map(|error| error.to_string()),
        };
        let (outcome, error) = match (end.outcome, running.error.take()) {
            (Outcome::Ok, Some(error)) => (Outcome::Failed, Some(error)),
            (outcome, _) => (outcome, said),
        };
        if let Some(span) = end.span {
            let failed = !matches!(outcome, Outcome::Ok | Outcome::Stopped);
            span.end(outcome.word(), failed, instance.unwrap_or_default());
        }
        let error = error.as_deref();
        self.tally.count(outcome, error, &running, at_us);
        let ended = Ended {
            call,
            instance,
            outcome,
            error,
            ack_us: end.accepted.map(|time| time.as_nanos() as f64 / 1e3),
            end_us: at_us,
        };
        self.printer.end(&running, &ended)
    }
}

/// A call that has ended.
struct Ended<'a> {
    call: u64,
    /// Who answered, or was to.
    instance: Option<u64>,
    outcome: Outcome,
    error: Option<&'a str>,
    ack_us: Option<f64>,
    end_us: f64,
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
