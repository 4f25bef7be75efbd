//! `corelane-bench server`: any address of Dynamo's request plane, under loads that do not wait for
//! it, beside itself, beside other servers, and beside runs of another day.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use corelane::component::{EndpointId, MemoryStore, Options, Runtime};
use serde::Serialize;
use serde_json::Value;

use crate::arrivals::Arrivals;
use crate::cpu::CpuRange;
use crate::interrupt;
use crate::output::{ExportArgs, OutputArgs, Told};
use crate::server_report::{self, Measured};
use crate::server_scene::{Scene, Slices};
use crate::stock::Load;
use crate::usage_error;

/// Arguments of `server`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  corelane-bench server --address 127.0.0.1:36751/0/dynamo/router/generate --html report.html
  corelane-bench server --endpoint dynamo/backend/generate --rate 1000,5000 --arrivals poisson
  corelane-bench server --endpoint dynamo/backend/generate --callers 1,64 --until first
  corelane-bench server --address 127.0.0.1:36751 --endpoint dynamo/router/generate \\
      --vs worker=127.0.0.1:45471/783c287cf2518026/dynamo/backend/generate,yesterday.json
  corelane-bench server --address 10.0.0.7:7000/0/dynamo/router/generate --rate 2000 \\
      --thresholds slo.toml --json - | jq '.loads[].arms[].latency_us'

Without --rate and --callers the load is swept: a closed loop of 64 callers finds what the server
can do, then rates from 5 % to 110 % of that find the knee. Latency is from when a request was due
(open loop) or sent (closed loop) to the end of its response. target-again is target once more:
what it differs by is noise. Endpoints are looked up where Dynamo's variables say (ETCD_ENDPOINTS,
DYN_DISCOVERY_BACKEND, ...). CPU of a server on this machine is found by its port.")]
pub(crate) struct ServerArgs {
    /// Who is called: IP:PORT/PATH as a worker is registered, or HOST:PORT with --endpoint.
    #[arg(
        long,
        value_name = "HOST:PORT[/PATH]",
        required_unless_present = "endpoint"
    )]
    pub(crate) address: Option<String>,
    /// An endpoint: all its instances in discovery in turn, or the one at --address.
    #[arg(long, value_name = "NS/COMP/EP", value_parser = parse_endpoint)]
    pub(crate) endpoint: Option<EndpointId>,
    /// Others to compare with: NAME=IP:PORT/PATH, NAME=NS/COMP/EP, or a report (FILE.json) that
    /// was kept of another run.
    #[arg(long, value_delimiter = ',', value_name = "NAME=WHERE|FILE,...")]
    pub(crate) vs: Vec<Other>,
    /// Open loop: requests due per second, a load each.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "R,...",
        conflicts_with = "callers"
    )]
    pub(crate) rate: Vec<f64>,
    /// Open loop: even, poisson or burstN (so many due at the same instant).
    #[arg(long, default_value = "poisson", value_name = "A")]
    pub(crate) arrivals: Arrivals,
    /// Closed loop: so many callers with one request each at a time, a load each.
    #[arg(long, value_delimiter = ',', value_name = "N,...")]
    pub(crate) callers: Vec<u32>,
    /// What ends a request for the reported latency; all three are in the JSON.
    #[arg(long, value_enum, default_value_t = Until::End)]
    pub(crate) until: Until,
    /// Bytes of each request: a string.
    #[arg(
        long,
        default_value_t = 128,
        value_name = "BYTES",
        conflicts_with = "body"
    )]
    pub(crate) payload: usize,
    /// Each request instead: JSON, sent in the codec that the instances ask for.
    #[arg(long, value_name = "JSON")]
    pub(crate) body: Option<String>,
    /// A header of each request (may be repeated).
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_header)]
    pub(crate) header: Vec<(String, String)>,
    /// Rounds; each runs every arm once, the direction alternates. Confidence intervals want 6.
    #[arg(long, default_value_t = 6)]
    pub(crate) rounds: usize,
    /// Measured seconds of each arm in each round.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) seconds: f64,
    /// Seconds of load before, not counted.
    #[arg(long, default_value_t = 0.3)]
    pub(crate) warmup: f64,
    /// Seconds of an interval, in the plots over time and the interval log.
    #[arg(long, default_value_t = 0.25, value_name = "SECONDS")]
    pub(crate) interval: f64,
    /// Seconds that a request may take; then it has failed.
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    pub(crate) timeout: f64,
    /// Open loop: requests under way beyond which due ones are dropped, and counted as errors.
    #[arg(long, default_value_t = 4096, value_name = "N")]
    pub(crate) in_flight_max: u32,
    /// Bind the load generator to this CPU.
    #[arg(long, value_name = "CPU")]
    pub(crate) pin_client: Option<CpuRange>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(flatten)]
    export: ExportArgs,
}

/// What ends a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Until {
    /// Its acknowledgement.
    Ack,
    /// The first item of its response.
    First,
    /// The end of its response.
    End,
}

/// Somebody to call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Target {
    /// One instance: `IP:PORT/PATH`.
    At(String),
    /// The instances that discovery has.
    Endpoint(EndpointId),
}

/// Somebody or something to compare with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Other {
    /// Called in turns with the target.
    Server(String, Target),
    /// The JSON of a run, and what to call it.
    Saved(String, PathBuf),
}

impl FromStr for Other {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.ends_with(".json") {
            let (name, file) = text.split_once('=').unzip();
            let file = PathBuf::from(file.unwrap_or(text));
            let stem = file.file_stem().unwrap_or_default().to_string_lossy();
            return Ok(Self::Saved(name.unwrap_or(&stem).to_owned(), file));
        }
        let (name, place) = text
            .split_once('=')
            .ok_or_else(|| format!("'{text}' is neither NAME=WHERE nor FILE.json"))?;
        let host = place.split('/').next().unwrap_or_default();
        let target = match host.contains(':') {
            true => Target::At(place.to_owned()),
            false => Target::Endpoint(parse_endpoint(place)?),
        };
        Ok(Self::Server(name.to_owned(), target))
    }
}

fn parse_endpoint(text: &str) -> Result<EndpointId, String> {
    let parts: Vec<&str> = text.split('/').collect();
    match parts[..] {
        [namespace, component, name] if parts.iter().all(|part| !part.is_empty()) => {
            Ok(EndpointId::new(namespace, component, name))
        }
        _ => Err(format!("'{text}' is not NAMESPACE/COMPONENT/ENDPOINT")),
    }
}

fn parse_header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("not NAME=VALUE")?;
    Ok((name.into(), value.into()))
}

impl ServerArgs {
    fn check(&self) -> Result<()> {
        let wrong = |text: &str| Err(usage_error(text));
        if self.rounds == 0 || self.callers.contains(&0) {
            return wrong("--rounds and --callers must be at least 1");
        }
        if self.rate.iter().any(|rate| !(0.1..=1e6).contains(rate)) {
            return wrong("--rate must be between 0.1 and 1000000 requests/s");
        }
        if !(0.05..=3600.0).contains(&self.seconds) || !(0.0..=60.0).contains(&self.warmup) {
            return wrong("--seconds must be 0.05 to 3600, --warmup at most 60");
        }
        if !(0.01..=3600.0).contains(&self.interval) || !(0.01..=600.0).contains(&self.timeout) {
            return wrong("--interval must be 0.01 to 3600, --timeout 0.01 to 600");
        }
        let most = self
            .callers
            .iter()
            .copied()
            .max()
            .unwrap_or(1)
            .max(self.in_flight_max);
        if self.in_flight_max == 0 || most > 50_000 {
            return wrong("--in-flight-max and --callers must be 1 to 50000");
        }
        let loads = match self.rate.len() + self.callers.len() {
            0 => SWEEP.len(),
            asked => asked,
        };
        let slices = self.rounds as f64 * (loads * (2 + self.vs.len())) as f64;
        if slices * (self.seconds / self.interval).ceil() > INTERVALS_MAX {
            return wrong("too many intervals are kept: take a longer --interval");
        }
        if self.payload > 16 << 20 {
            return wrong("--payload must be at most 16 MiB");
        }
        if self
            .body
            .as_deref()
            .is_some_and(|body| serde_json::from_str::<Value>(body).is_err())
        {
            return wrong("--body is not JSON; a string wants quotes of its own");
        }
        self.output.check()
    }

    /// What each request is.
    pub(crate) fn value(&self) -> Value {
        let given = self
            .body
            .as_deref()
            .and_then(|body| serde_json::from_str(body).ok());
        given.unwrap_or_else(|| Value::String("x".repeat(self.payload)))
    }

    /// The loads that were asked for; none where they are to be found.
    fn loads(&self) -> Vec<Load> {
        let open = self
            .rate
            .iter()
            .map(|rate| Load::Open(self.arrivals, *rate));
        open.chain(self.callers.iter().map(|callers| Load::Closed(*callers)))
            .collect()
    }

    /// Who is called first.
    pub(crate) fn target(&self) -> Result<Target> {
        let Some(address) = &self.address else {
            let endpoint = self.endpoint.clone();
            let endpoint = endpoint.ok_or_else(|| usage_error("--address or --endpoint"))?;
            return Ok(Target::Endpoint(endpoint));
        };
        let (socket, path) = match (address.split_once('/'), &self.endpoint) {
            (Some((socket, path)), None) => (socket, path.to_owned()),
            (None, Some(endpoint)) => (address.as_str(), format!("0/{endpoint}")),
            (Some(_), Some(_)) => {
                return Err(usage_error(
                    "--address has a path, so --endpoint says nothing",
                ));
            }
            (None, None) => {
                let text =
                    "--address HOST:PORT needs a path (HOST:PORT/0/NS/COMP/EP), or --endpoint";
                return Err(usage_error(text));
            }
        };
        Ok(Target::At(format!("{}/{path}", resolve(socket)?)))
    }
}

fn resolve(socket: &str) -> Result<SocketAddr> {
    let found = socket.to_socket_addrs().map(|mut found| found.next());
    match found {
        Ok(Some(address)) => Ok(address),
        Ok(None) => Err(usage_error(format!("{socket} has no address"))),
        Err(error) => Err(usage_error(format!("--address {socket}: {error}"))),
    }
}

/// Runs the whole comparison.
pub(crate) fn run(args: &ServerArgs) -> Result<()> {
    args.check()?;
    let target = args.target()?;
    let saved = server_report::read_saved(&args.vs)?;
    interrupt::install();
    let others = args.vs.iter().filter_map(|other| match other {
        Other::Server(_, target) => Some(target),
        Other::Saved(..) => None,
    });
    let is_looked_up = |target: &Target| matches!(target, Target::Endpoint(_));
    let looks_up = is_looked_up(&target) || others.into_iter().any(is_looked_up);
    let options = match looks_up {
        true => Options::from_env()?,
        false => Options::local()?.memory(&MemoryStore::default()),
    };
    let most = args
        .callers
        .iter()
        .copied()
        .max()
        .unwrap_or(1)
        .max(args.in_flight_max);
    let options = options
        .shards(1)
        .calls_only()
        .calls_max(most.saturating_add(64));
    let options = options.status(None).signals(false);
    let options = match args.pin_client {
        Some(cpus) => options.cpus(cpus.cpus()),
        None => options,
    };
    let began = SystemTime::now();
    let measured = Runtime::run(options, async |runtime| {
        measure(&runtime, args, target).await
    })?;
    let measured = measured.context("stopped")?;
    let report = server_report::report(args, &measured, &saved);
    let tables = server_report::text(&measured, &report);
    let panels = measured.panels();
    args.output.print_table(&tables)?;
    args.export.write(&panels, began)?;
    args.output.finish(&Told {
        kind: "server",
        report: &report,
        tables: &tables,
        panels: &panels,
    })?;
    match measured.errors() {
        // Beyond the knee errors are what was looked for.
        (0, _) => Ok(()),
        _ if measured.is_sweep => Ok(()),
        (count, why) => bail!("{count} requests failed: {}", why.unwrap_or_default()),
    }
}

async fn measure(runtime: &Runtime, args: &ServerArgs, target: Target) -> Result<Measured> {
    let scene = Scene::open(runtime, args, target).await?;
    let (mut loads, is_sweep) = (
        args.loads(),
        args.rate.is_empty() && args.callers.is_empty(),
    );
    if is_sweep {
        let capacity = scene.capacity(SWEEP_CALLERS).await?;
        loads = sweep(capacity, args.arrivals);
    }
    let mut records = Vec::new();
    for load in &loads {
        records.push(
            scene
                .measure(Slices {
                    load: *load,
                    rounds: args.rounds,
                })
                .await?,
        );
    }
    Ok(Measured {
        loads,
        records,
        targets: scene.told(),
        is_sweep,
    })
}

/// Callers whose closed loop finds what a server can do.
const SWEEP_CALLERS: u32 = 64;
/// Parts of that in a sweep.
const SWEEP: [f64; 8] = [0.05, 0.2, 0.4, 0.6, 0.75, 0.9, 1.0, 1.1];

/// Intervals of a run; each takes 230 KB, as long as it is told.
const INTERVALS_MAX: f64 = 2048.0;

/// The loads of a sweep, rates of two digits.
fn sweep(capacity: f64, arrivals: Arrivals) -> Vec<Load> {
    let two_digits = |rate: f64| {
        let unit = 10_f64.powf(rate.max(1.0).log10().floor() - 1.0);
        ((rate / unit).round() * unit).max(1.0)
    };
    let mut rates = SWEEP.map(|part| two_digits(part * capacity)).to_vec();
    rates.dedup();
    rates
        .into_iter()
        .map(|rate| Load::Open(arrivals, rate))
        .collect()
}

/// Seconds, which have been checked.
pub(crate) fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ServerArgs,
    }

    fn args(words: &[&str]) -> ServerArgs {
        Line::try_parse_from([&["x"], words].concat()).unwrap().args
    }

    #[test]
    fn targets_are_addresses_or_endpoints() {
        let at = |text: &str| Target::At(text.into());
        let path = args(&["--address", "127.0.0.1:7/0/a/b/c"])
            .target()
            .unwrap();
        assert_eq!(path, at("127.0.0.1:7/0/a/b/c"));
        let both = args(&["--address", "127.0.0.1:7", "--endpoint", "a/b/c"])
            .target()
            .unwrap();
        assert_eq!(both, at("127.0.0.1:7/0/a/b/c"));
        let named = args(&["--endpoint", "a/b/c"]).target().unwrap();
        assert_eq!(named, Target::Endpoint(EndpointId::new("a", "b", "c")));
        for bad in [
            &["--address", "127.0.0.1:7"][..],
            &["--address", "127.0.0.1:7/0/a/b/c", "--endpoint", "a/b/c"],
            &["--address", "127.0.0.1/0/a/b/c"],
        ] {
            assert!(args(bad).target().is_err(), "{bad:?}");
        }
        assert!(Line::try_parse_from(["x"]).is_err());
        assert!(Line::try_parse_from(["x", "--endpoint", "a//c"]).is_err());
    }

    #[test]
    fn others_are_servers_or_files() {
        let other = |text: &str| text.parse::<Other>();
        let at = Target::At("1.2.3.4:5/0/a/b/c".into());
        assert_eq!(
            other("w=1.2.3.4:5/0/a/b/c"),
            Ok(Other::Server("w".into(), at))
        );
        let endpoint = Target::Endpoint(EndpointId::new("a", "b", "c"));
        assert_eq!(other("e=a/b/c"), Ok(Other::Server("e".into(), endpoint)));
        let saved = |name: &str, file: &str| Ok(Other::Saved(name.into(), file.into()));
        assert_eq!(other("runs/old.json"), saved("old", "runs/old.json"));
        assert_eq!(other("may=runs/old.json"), saved("may", "runs/old.json"));
        assert!(other("1.2.3.4:5/0/a/b/c").is_err() && other("n=a/b").is_err());
    }

    #[test]
    fn a_sweep_rises_to_beyond_what_the_server_can_do() {
        let rates: Vec<f64> = sweep(12_345.0, Arrivals::Even)
            .into_iter()
            .map(|load| match load {
                Load::Open(_, rate) => rate,
                Load::Closed(_) => 0.0,
            })
            .collect();
        assert_eq!(
            rates,
            [620.0, 2500.0, 4900.0, 7400.0, 9300.0, 11e3, 12e3, 14e3]
        );
        assert_eq!(sweep(0.0, Arrivals::Even).len(), 1);
    }

    #[test]
    fn bad_numbers_are_refused() {
        let base = ["--endpoint", "a/b/c"];
        for bad in [
            &["--rounds", "0"][..],
            &["--rate", "0"],
            &["--callers", "0"],
            &["--seconds", "0"],
            &["--interval", "0"],
            &["--seconds", "60"],
            &["--in-flight-max", "0"],
            &["--body", "nothing"],
            &["--thresholds", "/no/such"],
        ] {
            assert!(args(&[&base, bad].concat()).check().is_err(), "{bad:?}");
        }
        assert!(args(&base).check().is_ok());
    }
}
