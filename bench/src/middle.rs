//! What stands between the load generator and the sink: corelane, HAProxy in TCP mode, nginx
//! stream. Each is configured as its users would for this job and no worse than corelane.

use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::cpu::CpuRange;
use crate::servers::{Server, find_program, free_address, http_get, version_of};
use crate::usage_error;

/// When corelane answers a request (`ack` of a route).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ack {
    /// When the worker has answered.
    OnAccept,
    /// When it has passed the request on.
    OnForward,
}

impl fmt::Display for Ack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OnAccept => "on_accept",
            Self::OnForward => "on_forward",
        })
    }
}

/// Which of them are arms of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum AckChoice {
    /// When the worker has answered.
    OnAccept,
    /// When it has passed the request on.
    OnForward,
    /// One arm of each.
    Both,
}

impl AckChoice {
    /// The arms.
    pub(crate) fn list(self) -> &'static [Ack] {
        match self {
            Self::OnAccept => &[Ack::OnAccept],
            Self::OnForward => &[Ack::OnForward],
            Self::Both => &[Ack::OnAccept, Ack::OnForward],
        }
    }
}

/// How corelane is run.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct CorelaneArgs {
    /// The program [default: `corelane` beside this one, else on PATH].
    #[arg(long, value_name = "PATH")]
    corelane: Option<PathBuf>,
    /// When corelane answers a request; `both` makes one arm of each.
    #[arg(long, value_enum, default_value = "both")]
    pub(crate) ack: AckChoice,
    /// A line for the table `[core]` of its config, such as `idle = "spin"` (may be repeated).
    #[arg(long, value_name = "LINE")]
    corelane_core: Vec<String>,
    /// Its data cores [default: 0].
    #[arg(long, value_name = "CPUS")]
    corelane_cpus: Option<CpuRange>,
}

impl CorelaneArgs {
    /// The same with more lines for the table `[core]`.
    pub(crate) fn with_core(&self, lines: &[&str]) -> Self {
        let mut args = self.clone();
        let lines = lines.iter().map(|line| (*line).to_owned());
        args.corelane_core.extend(lines);
        args
    }

    /// Where the program is; `None` if it was not named and is nowhere to be found.
    pub(crate) fn find(&self) -> Result<Option<PathBuf>> {
        if let Some(path) = &self.corelane {
            let missing = || usage_error(format!("--corelane {} is not there", path.display()));
            return find_program(path).ok_or_else(missing).map(Some);
        }
        let beside = std::env::current_exe()
            .ok()
            .map(|exe| exe.with_file_name("corelane"));
        let beside = beside.filter(|file| file.is_file());
        Ok(beside.or_else(|| find_program(Path::new("corelane"))))
    }
}

/// One route of a corelane process.
pub(crate) struct Route<'a> {
    /// The endpoint it offers.
    pub(crate) listen: &'a str,
    /// The endpoint whose instances get the requests.
    pub(crate) target: &'a str,
    /// When it answers.
    pub(crate) ack: Ack,
}

/// Where its instances come from.
pub(crate) enum Discovery<'a> {
    /// One fixed instance at this address (`IP:PORT/PATH`).
    Memory(&'a str),
    /// Workers that attach at this socket.
    Lane(&'a Path),
    /// An etcd, whose address is in the environment.
    Etcd,
}

/// A running corelane and where it takes requests.
pub(crate) struct Corelane {
    /// The process.
    pub(crate) server: Server,
    /// Its request plane.
    pub(crate) address: SocketAddr,
    /// Its status server.
    pub(crate) status: SocketAddr,
    /// The path of the endpoint it offers.
    pub(crate) path: String,
}

impl Corelane {
    /// Starts it with one route and waits until it listens. `variables` are added to its
    /// environment.
    pub(crate) fn start(
        args: &CorelaneArgs,
        program: &Path,
        dir: &Path,
        discovery: &Discovery<'_>,
        route: &Route<'_>,
        cpus: Option<CpuRange>,
        variables: &[(String, String)],
    ) -> Result<Self> {
        let (address, status) = (free_address()?, free_address()?);
        let kind = match discovery {
            Discovery::Lane(_) => "lane",
            _ => "tcp",
        };
        let name = format!("corelane-{kind}-{}", route.ack);
        let file = dir.join(format!("{name}.toml"));
        let config = corelane_config(args, address, status, discovery, route, cpus);
        fs::write(&file, config).with_context(|| format!("cannot write {}", file.display()))?;
        let mut command = Command::new(program);
        command
            .arg("serve")
            .arg("--config")
            .arg(&file)
            .envs(variables.iter().cloned());
        // It binds its own threads: a mask from outside would only bind the control thread too.
        let mut server = Server::start(&name, command, dir, None)?;
        server.wait_listening(address)?;
        let path = http_get(status, "/health")
            .ok()
            .and_then(|health| offered_path(&health, route.listen))
            .unwrap_or_else(|| format!("0/{}", route.listen));
        Ok(Self {
            server,
            address,
            status,
            path,
        })
    }
}

fn corelane_config(
    args: &CorelaneArgs,
    address: SocketAddr,
    status: SocketAddr,
    discovery: &Discovery<'_>,
    route: &Route<'_>,
    cpus: Option<CpuRange>,
) -> String {
    let Route {
        listen,
        target,
        ack,
    } = route;
    let (port, status_port) = (address.port(), status.port());
    let cpus = cpus
        .or(args.corelane_cpus)
        .map_or_else(|| "0".to_string(), |cpus| cpus.to_string());
    let (backend, instance) = match discovery {
        Discovery::Memory(address) => (
            "memory",
            format!("[[instance]]\nendpoint = \"{target}\"\naddress = \"{address}\"\n\n"),
        ),
        Discovery::Lane(_) => ("memory", String::new()),
        Discovery::Etcd => ("etcd", String::new()),
    };
    let lane = match discovery {
        Discovery::Lane(socket) => format!("lane = \"{}\"\n", socket.display()),
        _ => String::new(),
    };
    let mut config = format!(
        "[server]\nhost = \"127.0.0.1\"\nport = {port}\nstatus_port = {status_port}\n\n\
         [discovery]\nbackend = \"{backend}\"\n\n{instance}\
         [[route]]\nlisten = \"{listen}\"\ntarget = \"{target}\"\npolicy = \"round_robin\"\n\
         ack = \"{ack}\"\n{lane}\n[drain]\ngrace_s = 0\ntimeout_s = 2\n\n\
         [core]\ncpus = \"{cpus}\"\n"
    );
    for line in &args.corelane_core {
        config.push_str(line);
        config.push('\n');
    }
    config
}

/// The path of `endpoint` (`ID/NS/COMP/EP`) anywhere in the health report.
fn offered_path(health: &str, endpoint: &str) -> Option<String> {
    fn search(value: &serde_json::Value, tail: &str) -> Option<String> {
        match value {
            serde_json::Value::String(text) => {
                // An address may stand before the path.
                let id = text.strip_suffix(tail)?.rsplit('/').next()?;
                let is_id = !id.is_empty() && id.bytes().all(|b| b.is_ascii_hexdigit());
                is_id.then(|| format!("{id}{tail}"))
            }
            serde_json::Value::Array(items) => items.iter().find_map(|item| search(item, tail)),
            serde_json::Value::Object(members) => {
                members.values().find_map(|member| search(member, tail))
            }
            _ => None,
        }
    }
    search(&serde_json::from_str(health).ok()?, &format!("/{endpoint}"))
}

/// A proxy of another make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proxy {
    /// HAProxy in TCP mode.
    Haproxy,
    /// The same, allowed to splice.
    HaproxySplice,
    /// nginx with its stream module.
    Nginx,
}

impl Proxy {
    /// Its name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Haproxy => "haproxy",
            Self::HaproxySplice => "haproxy-splice",
            Self::Nginx => "nginx",
        }
    }

    /// Its program, or why it is left out.
    pub(crate) fn find(self) -> Result<PathBuf, String> {
        let (program, package) = match self {
            Self::Haproxy | Self::HaproxySplice => ("haproxy", "haproxy"),
            Self::Nginx => ("nginx", "nginx libnginx-mod-stream"),
        };
        let missing = || format!("{program} is not on PATH (apt-get install {package})");
        let found = find_program(Path::new(program)).ok_or_else(missing)?;
        if self == Self::Nginx && stream_module(&found).is_none() {
            return Err(format!(
                "nginx has no stream module (apt-get install {package})"
            ));
        }
        Ok(found)
    }

    /// The version line of `program`.
    pub(crate) fn version(self, program: &Path) -> String {
        version_of(program, "-v")
    }

    /// Starts it in front of `sink` and waits until it listens.
    pub(crate) fn start(
        self,
        program: &Path,
        dir: &Path,
        sink: SocketAddr,
        cpus: Option<CpuRange>,
    ) -> Result<(Server, SocketAddr)> {
        let address = free_address()?;
        let file = dir.join(format!("{}.cfg", self.name()));
        let config = match self {
            Self::Haproxy => haproxy_config(address, sink, ""),
            Self::HaproxySplice => haproxy_config(address, sink, "    option splice-auto\n"),
            Self::Nginx => match stream_module(program) {
                Some(load) => nginx_config(&load, dir, address, sink),
                None => bail!("nginx has no stream module"),
            },
        };
        fs::write(&file, config).with_context(|| format!("cannot write {}", file.display()))?;
        let mut command = Command::new(program);
        match self {
            Self::Haproxy | Self::HaproxySplice => command.arg("-db").arg("-f").arg(&file),
            Self::Nginx => command.arg("-p").arg(dir).arg("-c").arg(&file),
        };
        let mut server = Server::start(self.name(), command, dir, cpus)?;
        server.wait_listening(address)?;
        Ok((server, address))
    }
}

/// HAProxy sets TCP_NODELAY on both sides by itself in TCP mode.
fn haproxy_config(address: SocketAddr, sink: SocketAddr, option: &str) -> String {
    format!(
        "global\n    nbthread 1\n    maxconn 4096\n\ndefaults\n    mode tcp\n{option}\
         \x20   timeout connect 5s\n    timeout client 1h\n    timeout server 1h\n\n\
         frontend requests\n    bind {address}\n    default_backend sink\n\n\
         backend sink\n    server sink {sink}\n"
    )
}

fn nginx_config(load_module: &str, dir: &Path, address: SocketAddr, sink: SocketAddr) -> String {
    let dir = dir.display();
    format!(
        "{load_module}daemon off;\nworker_processes 1;\npid {dir}/nginx.pid;\n\
         error_log stderr error;\nevents {{ worker_connections 8192; }}\n\
         stream {{\n    access_log off;\n    server {{\n        listen {address};\n        \
         proxy_pass {sink};\n        proxy_timeout 1h;\n        tcp_nodelay on;\n    }}\n}}\n"
    )
}

/// The line that loads nginx's stream module: empty if it is built in, `None` if there is none.
fn stream_module(program: &Path) -> Option<String> {
    let places = [
        "/usr/lib/nginx/modules",
        "/usr/lib64/nginx/modules",
        "/etc/nginx/modules",
    ];
    let module = places
        .iter()
        .map(|dir| Path::new(dir).join("ngx_stream_module.so"))
        .find(|file| file.is_file());
    if let Some(module) = module {
        return Some(format!("load_module {};\n", module.display()));
    }
    let output = Command::new(program).arg("-V").output().ok()?;
    let flags = String::from_utf8_lossy(&output.stderr).into_owned();
    flags
        .split_ascii_whitespace()
        .any(|flag| flag == "--with-stream")
        .then(String::new)
}

/// An address of loopback for config tests and static instances.
pub(crate) fn instance_address(sink: SocketAddr, path: &str) -> String {
    format!("{}:{}/{path}", Ipv4Addr::LOCALHOST, sink.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_found_wherever_the_health_report_has_it() {
        let endpoint = "bench/router/generate";
        let listed = r#"{"paths":["7f/bench/other/generate","1a/bench/router/generate"]}"#;
        assert_eq!(
            offered_path(listed, endpoint).as_deref(),
            Some("1a/bench/router/generate")
        );
        let addressed = r#"{"routes":[{"at":{"tcp":"127.0.0.1:9/0/bench/router/generate"}}]}"#;
        assert_eq!(
            offered_path(addressed, endpoint).as_deref(),
            Some("0/bench/router/generate")
        );
        assert_eq!(
            offered_path(r#"{"endpoints":["bench/router/generate"]}"#, endpoint),
            None
        );
        assert_eq!(offered_path("not json", endpoint), None);
    }

    #[test]
    fn the_config_of_corelane_is_what_was_asked_for() {
        let args = CorelaneArgs {
            corelane: None,
            ack: AckChoice::Both,
            corelane_core: vec!["idle = \"spin\"".into()],
            corelane_cpus: None,
        };
        let route = Route {
            listen: "a/b/c",
            target: "a/s/c",
            ack: Ack::OnAccept,
        };
        let address = "127.0.0.1:7".parse().unwrap();
        let memory = Discovery::Memory("127.0.0.1:9/1/a/s/c");
        let text = corelane_config(&args, address, address, &memory, &route, None);
        for wanted in [
            "port = 7\n",
            "backend = \"memory\"\n",
            "address = \"127.0.0.1:9/1/a/s/c\"\n",
            "ack = \"on_accept\"\n",
            "cpus = \"0\"\nidle = \"spin\"\n",
        ] {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
        let pinned = "1-2".parse().ok();
        let text = corelane_config(&args, address, address, &Discovery::Etcd, &route, pinned);
        assert!(
            text.contains("backend = \"etcd\"") && !text.contains("[[instance]]"),
            "{text}"
        );
        assert!(text.contains("cpus = \"1-2\""), "{text}");
    }

    #[test]
    fn ack_choices_make_arms() {
        assert_eq!(AckChoice::Both.list(), [Ack::OnAccept, Ack::OnForward]);
        assert_eq!(AckChoice::OnForward.list()[0].to_string(), "on_forward");
    }
}
