//! The corelane client of `pair`: so many callers on one shard, each with one call at a time. It
//! prints what Dynamo's load generator prints, as far as `pair` reads it.

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::item;
use corelane_engine::call::{Deadlines, NewCall};
use corelane_engine::config::{ANY_CPU, RingKind, ShardConfig};
use corelane_engine::ends::{Ends, HomeAddress};
use corelane_engine::executor::spawn_with;
use corelane_engine::host::Host;
use corelane_engine::local::{Ending, Run};
use corelane_engine::preflight;
use corelane_engine::shard::Command;
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::cpu::Usage;
use crate::usage_error;

/// Arguments of `pair-client`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ClientArgs {
    /// The worker: IP:PORT/PATH.
    #[arg(long)]
    address: String,
    /// Callers.
    #[arg(short = 'c', long, default_value_t = 1)]
    callers: u32,
    /// Bytes of each request.
    #[arg(short = 'p', long, default_value_t = 128)]
    payload: usize,
    /// Items that each request must bring.
    #[arg(short = 'n', long, default_value_t = 1)]
    items: u64,
    /// Measured seconds.
    #[arg(short = 'd', long, default_value_t = 3.0)]
    seconds: f64,
    /// Seconds of load before.
    #[arg(short = 'w', long, default_value_t = 1.0)]
    warmup: f64,
}

/// Slowest call that the histograms tell apart, in nanoseconds.
const SLOWEST_NS: u64 = 600_000_000_000;
/// What the last calls may take.
const END_LIMIT: Duration = Duration::from_secs(30);

/// What the callers find out together.
struct Tally {
    first: Histogram<u64>,
    end: Histogram<u64>,
    errors: u64,
    error: Option<String>,
}

/// How far the run is, told by the main thread, and how many calls have ended.
#[derive(Default)]
struct Clock {
    /// 0 warm-up, 1 measured, 2 over.
    phase: AtomicU64,
    calls: AtomicU64,
}

/// Runs the load and prints its report.
pub(crate) fn run(args: &ClientArgs) -> Result<()> {
    let call = call(args)?;
    preflight::raise_limits();
    let choice = preflight::choose(preflight::Io::Auto, &preflight::probe());
    let ring = choice.map_or(RingKind::Epoll, |choice| choice.ring);
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let home = HomeAddress {
        bind: SocketAddr::new(loopback, 0),
        advertise: loopback,
    };
    let config = ShardConfig::new(0, ANY_CPU, ring, None);
    let mut shard = spawn_with(config, Ends::client(home, 2 * args.callers + 64))?;
    let clock = Arc::new(Clock::default());
    let (sender, receiver) = mpsc::channel();
    let (shared, callers, items) = (Arc::clone(&clock), args.callers, args.items);
    let run = Run::new(move |host| load(host, shared, call, (callers, items), sender));
    if shard.command(Command::Run(run)).is_err() {
        bail!("the shard takes no command");
    }
    std::thread::sleep(Duration::from_secs_f64(args.warmup));
    let me = std::process::id();
    let (began, before) = (Instant::now(), Usage::of_tree(me));
    let first = clock.calls.load(Ordering::Relaxed);
    clock.phase.store(1, Ordering::Relaxed);
    std::thread::sleep(Duration::from_secs_f64(args.seconds));
    clock.phase.store(2, Ordering::Relaxed);
    let calls = clock.calls.load(Ordering::Relaxed) - first;
    let (used, elapsed) = (Usage::of_tree(me).since(before), began.elapsed());
    let tally = receiver
        .recv_timeout(END_LIMIT)
        .context("calls do not end")?;
    shard.stop();
    if let Some(error) = &tally.error {
        eprintln!("corelane-bench: the first error: {error}");
    }
    let report = json!({
        "calls_with_warmup": clock.calls.load(Ordering::Relaxed),
        "throughput_rps": calls as f64 / elapsed.as_secs_f64(),
        "errors": tally.errors,
        "first_item_us": summary(&tally.first),
        "last_item_us": summary(&tally.end),
        "cpu": { "client": { "us_per_request": used.cpu_us() / calls.max(1) as f64 } },
    });
    println!("{report}");
    Ok(())
}

fn call(args: &ClientArgs) -> Result<NewCall> {
    let wrong = || usage_error("--address is IP:PORT/PATH");
    let address = args.address.trim_start_matches("tcp://");
    let (address, path) = address.split_once('/').ok_or_else(wrong)?;
    let mut body = Vec::new();
    item::write_value(
        &"x".repeat(args.payload),
        PayloadCodec::MessagePack,
        &mut body,
    )?;
    Ok(NewCall {
        address: address.parse().map_err(|_| wrong())?,
        path: path.into(),
        id: String::new(),
        headers: Vec::new(),
        body,
        codec: PayloadCodec::MessagePack,
        deadlines: Deadlines::default(),
    })
}

async fn load(
    host: Host,
    clock: Arc<Clock>,
    call: NewCall,
    (callers, items): (u32, u64),
    sender: mpsc::Sender<Tally>,
) {
    // Three significant digits of any time up to ten minutes always have a histogram.
    let (Ok(first), Ok(end)) = (
        Histogram::new_with_max(SLOWEST_NS, 3),
        Histogram::new_with_max(SLOWEST_NS, 3),
    ) else {
        return;
    };
    let tally = Rc::new(RefCell::new(Some(Tally {
        first,
        end,
        errors: 0,
        error: None,
    })));
    let left = Rc::new(RefCell::new(callers));
    for _ in 0..callers {
        let (own, clock, call) = (host.clone(), Arc::clone(&clock), call.clone());
        let (tally, left, sender) = (Rc::clone(&tally), Rc::clone(&left), sender.clone());
        host.spawn(async move {
            while clock.phase.load(Ordering::Relaxed) < 2 {
                one(&own, &clock, call.clone(), items, &tally).await;
            }
            *left.borrow_mut() -= 1;
            if *left.borrow() == 0
                && let Some(tally) = tally.borrow_mut().take()
            {
                let _ = sender.send(tally);
            }
        });
    }
}

async fn one(
    host: &Host,
    clock: &Clock,
    call: NewCall,
    items: u64,
    tally: &Rc<RefCell<Option<Tally>>>,
) {
    let began = Instant::now();
    let (mut first, mut count, mut error) = (None, 0, None);
    let mut reply = host.caller().call(call);
    while let Some(item) = reply.next().await {
        first.get_or_insert_with(|| began.elapsed());
        match item {
            Ok(_) => count += 1,
            Err(failed) => error = Some(failed.to_string()),
        }
    }
    let end = began.elapsed();
    // One writer: the shard's thread.
    clock
        .calls
        .store(clock.calls.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    if let Some(tally) = tally.borrow_mut().as_mut() {
        if reply.ending() != Some(Ending::Complete) || count != items {
            tally.errors += 1;
            let text = error.unwrap_or_else(|| format!("{count} items instead of {items}"));
            tally.error.get_or_insert(text);
        } else if clock.phase.load(Ordering::Relaxed) == 1 {
            let ns = |time: Duration| time.as_nanos() as u64;
            tally.first.saturating_record(ns(first.unwrap_or(end)));
            tally.end.saturating_record(ns(end));
        }
    }
}

fn summary(times: &Histogram<u64>) -> Value {
    let at = |quantile| times.value_at_quantile(quantile) as f64 / 1e3;
    json!({
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "p99.9": at(0.999),
        "max": times.max() as f64 / 1e3,
    })
}
