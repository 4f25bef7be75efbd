//! `corelane doctor` as clap reads it, and its JSON form.
//!
//! With `--json` one object is printed, whose keys are stable ([`Report`]):
//!
//! ```json
//! {"schema":"corelane.doctor/1","config":"corelane.toml","ok":false,
//!  "findings":[{"check":"steering","weight":"cost","required":false,
//!               "what":"RPS hands packets of 1 of 2 receive queues to other cores",
//!               "evidence":[{"value":"eth0 rx-0 RPS: f",
//!                            "at":"/sys/class/net/eth0/queues/rx-0/rps_cpus"}],
//!               "cause":"The device has chosen ...","remedy":"`corelane tune apply`, or ..."}],
//!  "well":[{"check":"swap","what":"there is none"}],
//!  "unseen":[{"check":"frequency","why":"no cpufreq here: ..."}],"took_ms":1012}
//! ```
//! `weight` is `fault` (something fails or is refused), `cost` (latency or CPU time is lost) or
//! `hint`; findings come worst first. `required` is true where the configuration demands what the
//! host refuses. `ok` is false with a fault or a cost. `config` is null where there is no file.
//! Names of checks are stable: [`doctor::CHECKS`].

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use corelane_engine::placement::parse_cpu_list;
use corelane_engine::preflight;
use serde::Serialize;

use super::options::{ConfigFile, Settings};
use super::tune::{self, goal};
use super::{Exit, Stop};
use crate::config::{self, Backend, Config, Host, Inputs, Main, Origin};
use crate::discovery::EtcdOptions;
use crate::doctor::{self, Diagnosis, Sight, Wish};
use crate::env::Env;
use crate::tune::View;

/// Name and version of the JSON form.
const SCHEMA: &str = "corelane.doctor/1";

/// Time between two looks at counters.
const WINDOW: Duration = Duration::from_secs(1);

/// Find what is wrong with this host, and what to do about it
///
/// Looks for the host problems that cost requests or latency, each with the values that show it,
/// its cause and a remedy. Needs no root, changes nothing, and takes 5 s at most. What cannot be
/// seen is said so. Exit code: 0 nothing found but hints, 1 something found, 2 bad usage or
/// configuration, 78 the host refuses what the configuration demands (io = "uring").
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane doctor
  corelane doctor --config /etc/corelane/corelane.toml
  corelane doctor --peer 10.0.0.7:9000         ask this worker too
  corelane doctor --json")]
pub(super) struct DoctorOptions {
    #[command(flatten)]
    file: ConfigFile,
    #[command(flatten)]
    settings: Settings,
    /// Network devices; may be given again [default: those with hardware that are up]
    #[arg(long = "device", value_name = "NAME", value_delimiter = ',')]
    devices: Vec<String>,
    /// A worker to ask, for an endpoint that it does not have; may be given again [default: each
    /// [[instance]]]
    #[arg(long = "peer", value_name = "IP:PORT", value_delimiter = ',')]
    peers: Vec<SocketAddr>,
    /// How long all checks may take, in seconds
    #[arg(long, value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u64).range(2..=600))]
    timeout_s: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    /// Always [`SCHEMA`].
    pub schema: &'static str,
    /// The file that the host was judged for.
    pub config: Option<String>,
    /// Whether there is neither fault nor cost.
    pub ok: bool,
    /// What was seen.
    #[serde(flatten)]
    pub diagnosis: &'a Diagnosis,
}

/// Runs `corelane doctor`.
///
/// # Errors
/// The configuration is wrong, or standard output cannot be written.
pub(super) fn doctor(options: &DoctorOptions, env: &Env, host: &Host) -> anyhow::Result<Exit> {
    let (inputs, config) = options.read(env, host)?;
    // As `serve` does; what is left is what the host does not allow.
    preflight::raise_limits();
    let wish = options.wish(&inputs, &config)?;
    let sight = Sight::new(View::host(), wish, preflight::probe(), WINDOW);
    let diagnosis = Diagnosis::make(&Arc::new(sight));
    let text = match options.json {
        false => doctor::text(&diagnosis),
        true => {
            let file = match &inputs.main {
                Main::File(path) => Some(path.display().to_string()),
                Main::Nothing | Main::Text { .. } => None,
            };
            let report = Report {
                schema: SCHEMA,
                config: file,
                ok: diagnosis.is_well(),
                diagnosis: &diagnosis,
            };
            serde_json::to_string(&report)? + "\n"
        }
    };
    super::print(&text)?;
    Ok(match (diagnosis.refuses(), diagnosis.is_well()) {
        (true, _) => Exit::HostCannot,
        (false, true) => Exit::Done,
        (false, false) => Exit::Failed,
    })
}

impl DoctorOptions {
    /// The configuration, with all CPUs that it names: whether they are to be had is for a check
    /// to say.
    fn read(&self, env: &Env, host: &Host) -> Result<(Inputs, Config), Stop> {
        let mut inputs = tune::inputs(&self.file, &self.settings, env, host);
        let settings = config::load(&inputs).settings;
        let named = settings
            .iter()
            .find(|setting| setting.path == "core.cpus" && setting.origin != Origin::Default);
        let named = named.and_then(|setting| setting.value.as_deref());
        let named = named.and_then(|list| parse_cpu_list(list).ok());
        let mut cpus = named.unwrap_or_default();
        cpus.extend(&host.cpus);
        cpus.sort_unstable();
        cpus.dedup();
        inputs.host.cpus = cpus;
        let config = super::config(&inputs)?;
        Ok((inputs, config))
    }

    fn wish(&self, inputs: &Inputs, config: &Config) -> Result<Wish, Stop> {
        let most = config.cores.iter().map(|core| core.connections_max).max();
        let etcd = match config.discovery.backend {
            Backend::Etcd => {
                let options = EtcdOptions::from_env(|name| config.discovery.variable(name));
                let options = options.map_err(|error| Stop::Usage(error.to_string()))?;
                Some((options.endpoints, options.auth))
            }
            _ => None,
        };
        // What stands in for a file that is not there names nobody's worker.
        let file = matches!(inputs.main, Main::File(_));
        let instances = config.instances.iter().filter(|_| file);
        Ok(Wish {
            goal: goal(config, &self.devices),
            control: config.control.placed(),
            connections_max: u64::from(most.unwrap_or(0)),
            io: config.cores.iter().map(|core| core.io).collect(),
            etcd,
            peers: match self.peers.is_empty() {
                true => instances.map(|instance| instance.socket).collect(),
                false => self.peers.clone(),
            },
            patience: Duration::from_secs(self.timeout_s),
        })
    }
}
