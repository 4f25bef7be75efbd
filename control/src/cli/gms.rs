//! `corelane gms` and `corelane gms probe` as clap reads them.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::Stop;
use super::args::{GmsArgs, ProbeArgs};
use super::options::{Settings, push};
use crate::config::{Config, Host, Inputs, Main, Purpose};
use crate::env::Env;
use crate::gpu_memory::Names;

/// The configuration of `corelane gms` without a file: one device, and no port.
const GMS: &str = "[server]\nstatus_port = -1\n[gpu]\ndevices = \"0\"\n";

/// Lend GPU memory to engines: the GPU memory service alone, until SIGTERM
///
/// It owns the memory, decides who may write and who may read each pool, and outlives the engines
/// that use it. SIGTERM tells waiting engines, closes all sessions, gives up the memory and removes
/// the sockets. Each pool that listens is printed.
#[derive(Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  corelane gms                                  device 0, pools weights and kv_cache
  corelane gms --device 0-7 --backend cuda      eight GPUs; without a driver it ends with 78
  corelane gms --backend host --capacity-bytes 8589934592 --status-port 9091
  corelane gms --socket-dir /gms-intrapod-control --uid 0,1000
  corelane gms probe                            how the pools of this machine stand"
)]
pub(super) struct GmsOptions {
    #[command(subcommand)]
    command: Option<GmsCommand>,
    #[command(flatten)]
    serve: ServeGmsOptions,
}

#[derive(Debug, Subcommand)]
enum GmsCommand {
    Probe(ProbeOptions),
}

/// What `corelane gms` is to do.
pub(super) enum GmsTask {
    /// Serve.
    Serve(Box<ServeGmsOptions>),
    /// Ask.
    Probe(ProbeOptions),
}

impl GmsOptions {
    pub(super) fn task(self) -> GmsTask {
        match self.command {
            Some(GmsCommand::Probe(probe)) => GmsTask::Probe(probe),
            None => GmsTask::Serve(Box::new(self.serve)),
        }
    }
}

#[derive(Args, Debug)]
pub(super) struct ServeGmsOptions {
    /// Read [gpu] and the status port of [server] from this file [default: no file]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// GPUs by CUDA ordinal, such as 0 or 0-7; may be given again [default: 0]
    #[arg(long = "device", value_name = "N", value_delimiter = ',')]
    devices: Vec<String>,
    /// Pools of each device; may be given again [default: weights and kv_cache]
    #[arg(long = "tag", value_name = "TAG", value_delimiter = ',')]
    tags: Vec<String>,
    /// auto, host or cuda [default: auto, which serves host memory where there is no driver]
    #[arg(long, value_name = "BACKEND")]
    backend: Option<String>,
    /// Protocol: first, second (what Dynamo's --use-v1 speaks) or both [default: first]
    #[arg(long, value_name = "GENERATION")]
    generation: Option<String>,
    /// Folder of the sockets [default: $GMS_SOCKET_DIR, else the temp folder]
    #[arg(long, value_name = "DIR")]
    socket_dir: Option<String>,
    /// The socket itself, where there is only one
    #[arg(long, value_name = "PATH", conflicts_with = "socket_dir")]
    socket_path: Option<PathBuf>,
    /// What clients call the device, where there is only one [default: as the driver says]
    #[arg(long, value_name = "UUID")]
    gpu_uuid: Option<String>,
    /// Users that may connect, by number; may be given again [default: this one]
    #[arg(long = "uid", value_name = "UID", value_delimiter = ',')]
    uids: Vec<String>,
    /// Most host memory of one device in bytes [default: as much as there is]
    #[arg(long, value_name = "N")]
    capacity_bytes: Option<u64>,
    /// How often memory that is short is asked for again, in seconds [default: 0.5]
    #[arg(long, value_name = "S", value_parser = seconds)]
    alloc_retry_interval: Option<Duration>,
    /// How long a writer waits for memory, in seconds; 0 is as long as it lives [default: 60]
    #[arg(long, value_name = "S", value_parser = seconds)]
    alloc_retry_timeout: Option<Duration>,
    /// How long it looks for the next request before it sleeps, in microseconds; 0 sleeps at
    /// once, which saves its CPU and answers later [default: 50]
    #[arg(long, value_name = "US")]
    spin_us: Option<u32>,
    /// Port of /health, /live and /metrics; 0 takes any free one [default: none]
    #[arg(long, value_name = "PORT")]
    status_port: Option<u16>,
    #[command(flatten)]
    settings: Settings,
}

impl ServeGmsOptions {
    pub(super) fn inputs(&self, env: &Env, host: &Host) -> Inputs {
        let mut overrides = self.settings.set.clone();
        let list = |items: &[String]| (!items.is_empty()).then(|| items.join(","));
        let millis = |time: Duration| time.as_millis().to_string();
        let flags = [
            ("--device", "gpu.devices", list(&self.devices)),
            ("--tag", "gpu.tags", list(&self.tags)),
            ("--backend", "gpu.backend", self.backend.clone()),
            ("--generation", "gpu.generation", self.generation.clone()),
            ("--socket-dir", "gpu.socket_dir", self.socket_dir.clone()),
            ("--uid", "gpu.uids", list(&self.uids)),
            (
                "--capacity-bytes",
                "gpu.capacity_bytes",
                self.capacity_bytes.map(|bytes| bytes.to_string()),
            ),
            (
                "--alloc-retry-interval",
                "gpu.alloc_retry_interval_ms",
                self.alloc_retry_interval.map(millis),
            ),
            (
                "--alloc-retry-timeout",
                "gpu.alloc_retry_timeout_ms",
                self.alloc_retry_timeout.map(millis),
            ),
            (
                "--spin-us",
                "gpu.spin_us",
                self.spin_us.map(|time| time.to_string()),
            ),
            (
                "--status-port",
                "server.status_port",
                self.status_port.map(|port| port.to_string()),
            ),
        ];
        for (flag, path, text) in flags {
            push(&mut overrides, path, flag, text);
        }
        let main = match &self.config {
            Some(path) => Main::File(path.clone()),
            None => Main::Text {
                name: "corelane gms".into(),
                text: GMS.into(),
            },
        };
        let (env, host) = (env.clone(), host.clone());
        Inputs {
            purpose: Purpose::Gms,
            main,
            overrides,
            env,
            host,
        }
    }

    pub(super) fn args(self, config: Config) -> Result<GmsArgs, Stop> {
        let Some(gpu) = config.gpu else {
            let text = "the configuration has no [gpu]; write devices = \"0\" below it";
            return Err(Stop::Usage(text.into()));
        };
        if self.gpu_uuid.is_some() && gpu.devices.len() > 1 {
            let text = "--gpu-uuid names one device; choose one --device";
            return Err(Stop::Usage(text.into()));
        }
        Ok(GmsArgs {
            gpu,
            names: Names {
                socket_path: self.socket_path,
                gpu_uuid: self.gpu_uuid,
            },
            server: config.server,
        })
    }
}

/// Ask pools how they stand, without taking part
///
/// Asks the sockets that are named, or all of the first generation in the folder of sockets. Fails
/// with 1 when one does not answer, and with --ready when one has nothing published.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane gms probe
  corelane gms probe --history
  corelane gms probe --ready /tmp/gms_GPU-00000000-0000-0000-0000-000000000000_weights.sock
  corelane gms probe --json")]
pub(super) struct ProbeOptions {
    /// Sockets to ask [default: gms_GPU-*.sock in $GMS_SOCKET_DIR, else in the temp folder]
    #[arg(value_name = "SOCKET")]
    sockets: Vec<PathBuf>,
    /// Add the last 256 events of each pool
    #[arg(long)]
    history: bool,
    /// Fail unless every pool is published and not being rewritten
    #[arg(long)]
    ready: bool,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
    /// Longest wait for one answer in milliseconds
    #[arg(long, value_name = "T", default_value_t = 2_000,
          value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    timeout_ms: u64,
}

impl ProbeOptions {
    pub(super) fn args(self, env: &Env) -> ProbeArgs {
        let folder = env.get("GMS_SOCKET_DIR").map(PathBuf::from);
        ProbeArgs {
            sockets: self.sockets,
            folder: folder.unwrap_or_else(std::env::temp_dir),
            history: self.history,
            ready: self.ready,
            json: self.json,
            timeout: Duration::from_millis(self.timeout_ms),
        }
    }
}

/// Seconds with a fraction, as upstream's options have them.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok();
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "write seconds, such as 0.5".into())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::config;
    use super::super::options::{Command, Options};
    use super::*;
    use crate::config::{Generation, GpuBackend};

    fn args(line: &str, env: &[(&str, &str)]) -> Result<GmsArgs, String> {
        let words = line.split_whitespace().map(str::to_owned);
        let words = ["corelane".to_owned(), "gms".to_owned()]
            .into_iter()
            .chain(words);
        let options = Options::try_parse_from(words).map_err(|error| error.to_string())?;
        let Command::Gms(gms) = options.command else {
            panic!()
        };
        let GmsTask::Serve(serve) = gms.task() else {
            panic!()
        };
        let pairs = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let host = Host {
            cpus: vec![0],
            ..Host::default()
        };
        let inputs = serve.inputs(&Env::of(pairs), &host);
        let config = config(&inputs).map_err(|stop| stop.to_string())?;
        serve.args(config).map_err(|stop| stop.to_string())
    }

    #[test]
    fn flags_environment_and_defaults() {
        let plain = args("", &[]).unwrap();
        assert_eq!(
            (plain.gpu.devices, plain.server.status_port),
            (vec![0], None)
        );
        assert_eq!(plain.gpu.tags, ["weights", "kv_cache"]);
        let line = "--device 1 --device 4-5 --tag a,b --backend host --generation both --uid 0,7 \
                    --alloc-retry-interval 0.25 --status-port 0 --spin-us 0 \
                    --set gpu.allocations_max=5";
        let set = args(line, &[("GMS_SOCKET_DIR", "/run/x")]).unwrap();
        assert_eq!((set.gpu.devices, set.gpu.uids), (vec![1, 4, 5], vec![0, 7]));
        assert_eq!(set.gpu.socket_dir, PathBuf::from("/run/x"));
        assert_eq!(
            (set.gpu.backend, set.gpu.generation),
            (GpuBackend::Host, Generation::Both)
        );
        assert_eq!(
            (set.gpu.alloc_retry_interval_ms, set.gpu.allocations_max),
            (250, 5)
        );
        assert_eq!(set.server.status_port, Some(0));
        assert_eq!((plain.gpu.spin_us, set.gpu.spin_us), (50, 0));
    }

    #[test]
    fn faults_are_said() {
        for (line, said) in [
            ("--backend rocm", "flag --backend: unknown backend \"rocm\""),
            ("--device 64", "flag --device: devices has \"64\""),
            ("--tag a/b", "no plain name"),
            (
                "--device 0,1 --gpu-uuid GPU-x",
                "--gpu-uuid names one device",
            ),
            ("--alloc-retry-interval soon", "write seconds"),
            ("--spin-us 1000001", "flag --spin-us: spin_us"),
            ("--socket-path /a --socket-dir /b", "cannot be used with"),
        ] {
            let error = args(line, &[]).unwrap_err();
            assert!(error.contains(said), "{line}: {error}");
        }
    }
}
