//! The options as clap reads them, and how they become the arguments of the commands.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use super::args::{Answer, CallArgs, Codec, Early, EchoArgs, Target, UpArgs};
use super::{
    Stop, check::CheckOptions, doctor::DoctorOptions, dump::DumpOptions, events::EventsOptions,
    explain::ExplainOptions, extract::TraceOptions, gms::GmsOptions, reload::ReloadOptions,
    top::TopOptions, tune::TuneOptions,
};
use crate::config::{
    Backend, Config, EndpointId, Host, Inputs, Key, Main, Origin, Override, Purpose, Section,
    Server, address, find, keys, nearest, quoted,
};
use crate::env::Env;

/// Read when no file is named.
const FILE: &str = "corelane.toml";

/// The configuration of `corelane up`: any port is fine, and nobody is to wait when it ends.
const UP: &str = r#"
[server]
status_port = 0
[drain]
grace_s = 0
timeout_s = 10
[[route]]
listen = "dynamo/router/generate"
target = "dynamo/backend/generate"
"#;

const EXAMPLES: &str = "\
Examples:
  corelane up                            try it: router and two workers in this process
  corelane serve --config corelane.toml  run the router
  corelane check                         look for mistakes in corelane.toml

Exit codes: 0 ok, 1 failed, 2 bad usage or configuration, 78 the host cannot do what was required.
The log goes to standard error; CORELANE_LOG=debug makes it say more.";

/// Thread-per-core request router for NVIDIA Dynamo clusters.
#[derive(Debug, Parser)]
#[command(name = "corelane", version, after_help = EXAMPLES, max_term_width = 100)]
pub(super) struct Options {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Up(UpOptions),
    Serve(ServeOptions),
    Check(CheckOptions),
    Env(EnvOptions),
    Worker(WorkerOptions),
    Call(CallOptions),
    Gms(Box<GmsOptions>),
    Trace(TraceOptions),
    Events(EventsOptions),
    Tune(Box<TuneOptions>),
    Doctor(Box<DoctorOptions>),
    Dump(DumpOptions),
    Top(TopOptions),
    Explain(ExplainOptions),
    Reload(ReloadOptions),
}

/// Where settings come from.
#[derive(Args, Debug)]
pub(super) struct Settings {
    /// Set one key, over environment and files; `corelane check --explain` lists them
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", value_parser = setting)]
    pub(super) set: Vec<Override>,
}

/// Where the configuration file is.
#[derive(Args, Debug)]
pub(super) struct ConfigFile {
    /// The configuration; cores.d/ is looked for beside it [default: $CORELANE_CONFIG, else
    /// corelane.toml]
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
}

impl ConfigFile {
    /// The file that was named, or would be read.
    pub(super) fn path(&self, env: &Env) -> PathBuf {
        let named = self.config.clone();
        let named = named.or_else(|| env.get("CORELANE_CONFIG").map(PathBuf::from));
        named.unwrap_or_else(|| PathBuf::from(FILE))
    }
}

/// Run a router and echo workers in one process on loopback
///
/// Nothing has to be installed. What listens where and a command to try are printed; Ctrl-C
/// drains and ends it.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane up
  corelane up --workers 4 --items 100 --delay-us 500
  corelane up --set server.port=7000 --set core.io=epoll")]
pub(super) struct UpOptions {
    /// Echo workers to start
    #[arg(long, value_name = "N", default_value_t = 2,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: u16,
    #[command(flatten)]
    answer: AnswerOptions,
    #[command(flatten)]
    settings: Settings,
}

impl UpOptions {
    pub(super) fn inputs(&self, env: &Env, host: &Host) -> Result<Inputs, Stop> {
        let mut overrides = self.settings.set.clone();
        let backend = overrides
            .iter()
            .find(|set| set.key.path() == "discovery.backend");
        if backend.is_some_and(|set| set.text != "memory") {
            let text = "up keeps discovery in memory; use serve for another [discovery] backend";
            return Err(Stop::Usage(text.into()));
        }
        if overrides.iter().any(|set| set.key.section == Section::Gpu) {
            let text = "up serves no GPU memory; use corelane gms, or serve with [gpu]";
            return Err(Stop::Usage(text.into()));
        }
        push(
            &mut overrides,
            "discovery.backend",
            "corelane up",
            Some("memory".into()),
        );
        let main = Main::Text {
            name: "corelane up".into(),
            text: UP.into(),
        };
        let (env, host) = (env.clone(), host.clone());
        Ok(Inputs {
            purpose: Purpose::Up,
            main,
            overrides,
            env,
            host,
        })
    }

    pub(super) fn args(&self, config: Config) -> UpArgs {
        UpArgs {
            config,
            workers: self.workers,
            answer: self.answer.answer(),
        }
    }
}

/// Run the router until SIGTERM, then drain
///
/// Takes requests for each [[route]] on all data cores and sends them on to the instances that
/// discovery knows. SIGTERM leaves discovery and lets running requests finish; a second one ends
/// it at once.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane serve
  corelane serve --config /etc/corelane/corelane.toml
  ETCD_ENDPOINTS=http://etcd:2379 corelane serve --set discovery.backend=etcd")]
pub(super) struct ServeOptions {
    #[command(flatten)]
    file: ConfigFile,
    #[command(flatten)]
    settings: Settings,
}

impl ServeOptions {
    pub(super) fn inputs(&self, env: &Env, host: &Host) -> Result<Inputs, Stop> {
        Ok(Inputs {
            purpose: Purpose::Serve,
            main: Main::File(self.file.path(env)),
            overrides: self.settings.set.clone(),
            env: env.clone(),
            host: host.clone(),
        })
    }
}

/// List every environment variable of ours and of Dynamo's
///
/// What it does, its default and unit, whether it is honoured here and why not, and its value where
/// it is set. Passwords, tokens and keys are hidden.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane env
  corelane env --set                     only those that are set
  corelane env --json")]
pub(super) struct EnvOptions {
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    /// Only those that are set
    #[arg(long, conflicts_with = "json")]
    pub(super) set: bool,
}

/// Run a worker that is made for trying and testing
#[derive(Args, Debug)]
pub(super) struct WorkerOptions {
    #[command(subcommand)]
    pub(super) command: WorkerCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum WorkerCommand {
    Echo(EchoOptions),
}

#[derive(Args, Debug)]
struct AnswerOptions {
    /// Items of each response
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(..=10_000_000))]
    items: u32,
    /// Size of each item in bytes [default: the request's body is sent back]
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    item_bytes: Option<u32>,
    /// Pause before each item in microseconds
    #[arg(long, value_name = "D", default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(..=3_600_000_000))]
    delay_us: u64,
}

impl AnswerOptions {
    fn answer(&self) -> Answer {
        Answer {
            items: self.items,
            item_bytes: self.item_bytes,
            delay: Duration::from_micros(self.delay_us),
        }
    }
}

/// Which store.
#[derive(Args, Debug)]
pub(super) struct StoreOptions {
    /// memory, file or etcd [default: $CORELANE_DISCOVERY_BACKEND, $DYN_DISCOVERY_BACKEND, else
    /// memory; for events etcd]
    #[arg(long, value_name = "BACKEND")]
    discovery: Option<String>,
    /// etcd servers, with commas between [default: $ETCD_ENDPOINTS, else http://localhost:2379]
    #[arg(long, value_name = "URLS")]
    etcd: Option<String>,
    /// Folder of the file backend [default: $DYN_FILE_KV, else dynamo_store_kv in the temp folder]
    #[arg(long, value_name = "DIR")]
    file_kv: Option<String>,
}

impl StoreOptions {
    /// Whether a store was named, here or by a variable.
    pub(super) fn is_said(&self, env: &Env) -> bool {
        let names = ["CORELANE_DISCOVERY_BACKEND", "DYN_DISCOVERY_BACKEND"];
        self.discovery.is_some() || names.iter().any(|name| env.get(name).is_some())
    }

    pub(super) fn inputs(&self, env: &Env, host: &Host) -> Inputs {
        let mut overrides = Vec::new();
        let mut flag = |name, path, text: Option<String>| push(&mut overrides, path, name, text);
        flag("--discovery", "discovery.backend", self.discovery.clone());
        flag("--etcd", "discovery.endpoints", self.etcd.clone());
        flag("--file-kv", "discovery.path", self.file_kv.clone());
        let (env, host) = (env.clone(), host.clone());
        Inputs {
            purpose: Purpose::Peer,
            main: Main::Nothing,
            overrides,
            env,
            host,
        }
    }
}

#[derive(Args, Debug)]
struct DiscoveryOptions {
    #[command(flatten)]
    store: StoreOptions,
    /// Address to listen on and to advertise [default: $DYN_TCP_RPC_HOST, else 127.0.0.1]
    #[arg(long, value_name = "IP")]
    host: Option<String>,
}

impl DiscoveryOptions {
    fn inputs(&self, port: Option<u16>, env: &Env, host: &Host) -> Inputs {
        let mut inputs = self.store.inputs(env, host);
        let mut flag =
            |name, path, text: Option<String>| push(&mut inputs.overrides, path, name, text);
        flag("--host", "server.host", self.host.clone());
        flag("--port", "server.port", port.map(|port| port.to_string()));
        inputs
    }
}

pub(super) fn push(overrides: &mut Vec<Override>, path: &str, flag: &str, text: Option<String>) {
    if let (Some(key), Some(text)) = (find(path), text) {
        overrides.push(Override {
            flag: flag.to_owned(),
            key,
            text,
        });
    }
}

/// A worker that answers each request with items
///
/// It listens, registers in discovery and answers until SIGTERM, then drains. With discovery in
/// memory nobody finds it by name: its address is printed, for `corelane call --address` and for
/// [[instance]].
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane worker echo --endpoint dynamo/backend/generate
  corelane worker echo --endpoint dynamo/backend/generate --items 50 --delay-us 2000
  corelane worker echo --endpoint dyn://dynamo.backend.generate --discovery etcd")]
pub(super) struct EchoOptions {
    /// The endpoint that it serves, in any form: a/b/c, a.b.c, dyn://a.b.c
    #[arg(long, value_name = "NS/COMP/EP")]
    endpoint: EndpointId,
    #[command(flatten)]
    answer: AnswerOptions,
    /// Codec to offer [default: $DYN_REQUEST_PLANE_CODEC, else msgpack]
    #[arg(long, value_enum)]
    codec: Option<Codec>,
    /// Port to listen on; 0 takes any free one [default: $DYN_TCP_RPC_PORT, else 0]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    #[command(flatten)]
    discovery: DiscoveryOptions,
}

impl EchoOptions {
    pub(super) fn inputs(&self, env: &Env, host: &Host) -> Inputs {
        self.discovery.inputs(self.port, env, host)
    }

    pub(super) fn args(self, config: Config, env: &Env) -> Result<EchoArgs, Stop> {
        let from_env = match env.get("DYN_REQUEST_PLANE_CODEC").map(str::trim) {
            None | Some("msgpack") => Codec::Msgpack,
            Some("json") => Codec::Json,
            Some(other) => {
                let what = "environment DYN_REQUEST_PLANE_CODEC";
                let text = format!(
                    "{what}: unknown codec {}; write json or msgpack",
                    quoted(other)
                );
                return Err(Stop::Usage(text));
            }
        };
        // A worker has a status server only where somebody asks for one, as Dynamo's.
        let asked = config.settings.iter().any(|setting| {
            setting.path == "server.status_port" && setting.origin != Origin::Default
        });
        let server = Server {
            status_port: config.server.status_port.filter(|_| asked),
            ..config.server
        };
        Ok(EchoArgs {
            endpoint: self.endpoint,
            answer: self.answer.answer(),
            codec: self.codec.unwrap_or(from_env),
            server,
            discovery: config.discovery,
            drain: config.drain,
        })
    }
}

/// Call an endpoint and print each item with its times
///
/// Looks the endpoint up in discovery, or takes an address as `corelane up` and `corelane worker
/// echo` print it. Fails with 1 when a call fails.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane call --endpoint dynamo/router/generate --discovery etcd --body '{\"prompt\":\"hi\"}'
  corelane call --address 127.0.0.1:7000/1a/dynamo/router/generate
  corelane call --endpoint a/b/c --discovery file --count 1000 --concurrency 16 --json")]
pub(super) struct CallOptions {
    /// The endpoint, in any form: a/b/c, a.b.c, dyn://a.b.c
    #[arg(long, value_name = "NS/COMP/EP", required_unless_present = "address")]
    endpoint: Option<EndpointId>,
    /// Call this instance, without discovery
    #[arg(long, value_name = "IP:PORT/PATH", value_parser = whole_address)]
    address: Option<String>,
    /// The body of the request
    #[arg(long, value_name = "JSON", default_value = r#"{"prompt":"hello"}"#, value_parser = json)]
    body: String,
    /// Calls to make
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    count: u64,
    /// Calls at once
    #[arg(long, value_name = "C", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=4_096))]
    concurrency: u32,
    /// Longest time of one call in milliseconds
    #[arg(long, value_name = "T", default_value_t = 30_000,
          value_parser = clap::value_parser!(u64).range(1..=86_400_000))]
    timeout_ms: u64,
    /// Ask the worker to stop after so many items
    #[arg(long, value_name = "N", conflicts_with = "kill_after")]
    stop_after: Option<u64>,
    /// Kill the response after so many items
    #[arg(long, value_name = "N")]
    kill_after: Option<u64>,
    /// A header of the request frame; may be given again
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    discovery: DiscoveryOptions,
}

impl CallOptions {
    pub(super) fn inputs(&self, env: &Env, host: &Host) -> Inputs {
        self.discovery.inputs(None, env, host)
    }

    pub(super) fn args(self, config: Config) -> Result<CallArgs, Stop> {
        let target = match (self.address.as_deref().and_then(address), self.endpoint) {
            (Some((socket, path)), endpoint) => Target::Address {
                socket,
                path: path.to_owned(),
                endpoint,
            },
            (None, Some(_)) if config.discovery.backend == Backend::Memory => {
                let text = "discovery in memory knows only its own process; add --discovery etcd \
                            or file, or name an instance with --address IP:PORT/PATH";
                return Err(Stop::Usage(text.into()));
            }
            (None, Some(endpoint)) => Target::Endpoint(endpoint),
            (None, None) => return Err(Stop::Usage("write --endpoint or --address".into())),
        };
        let mut seen = std::collections::HashSet::new();
        if let Some((name, _)) = self.headers.iter().find(|(name, _)| !seen.insert(name)) {
            return Err(Stop::Usage(format!(
                "header {} is given twice",
                quoted(name)
            )));
        }
        Ok(CallArgs {
            target,
            body: self.body,
            headers: self.headers,
            count: self.count,
            concurrency: self.concurrency,
            timeout: Duration::from_millis(self.timeout_ms),
            early: (self.stop_after.map(Early::Stop)).or(self.kill_after.map(Early::Kill)),
            json: self.json,
            server: config.server,
            discovery: config.discovery,
        })
    }
}

/// Reads `section.key=value`.
fn setting(text: &str) -> Result<Override, String> {
    let Some((path, value)) = text.split_once('=') else {
        return Err("write SECTION.KEY=VALUE, such as server.port=7000".into());
    };
    let settable = |key: &&&'static Key| !key.section.repeats();
    let found = find(path).filter(|key| settable(&key));
    let Some(key) = found else {
        let paths: Vec<String> = keys()
            .iter()
            .filter(settable)
            .map(|key| key.path())
            .collect();
        return Err(match nearest(path, paths.iter().map(String::as_str)) {
            Some(near) => format!("unknown key {}; did you mean {near}?", quoted(path)),
            None => format!(
                "unknown key {}; `corelane check --explain` lists them",
                quoted(path)
            ),
        });
    };
    Ok(Override {
        flag: format!("--set {path}"),
        key,
        text: value.to_owned(),
    })
}

fn whole_address(text: &str) -> Result<String, String> {
    match address(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err("write it like 127.0.0.1:9000/1a/dynamo/backend/generate".into()),
    }
}

fn json(text: &str) -> Result<String, String> {
    match serde_json::from_str::<&serde_json::value::RawValue>(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!(
            "not JSON: {error}; text needs double quotes inside"
        )),
    }
}

pub(super) fn header(text: &str) -> Result<(String, String), String> {
    let plain = |name: &str| {
        !name.is_empty()
            && name
                .bytes()
                .all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\')
    };
    match text.split_once('=') {
        Some((name, value)) if plain(name) => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE, such as x-session-id=42".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::config;

    fn parse(line: &str) -> Result<Command, String> {
        let words = line.split_whitespace().map(str::to_owned);
        let words = ["corelane".to_owned()].into_iter().chain(words);
        let options = Options::try_parse_from(words);
        options
            .map(|options| options.command)
            .map_err(|error| error.to_string())
    }

    fn env(pairs: &[(&str, &str)]) -> Env {
        Env::of(
            pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        )
    }

    fn host() -> Host {
        Host {
            cpus: vec![0, 1],
            ..Host::default()
        }
    }

    fn echo(line: &str, env: &Env) -> Result<EchoArgs, String> {
        match parse(&format!("worker echo {line}"))? {
            Command::Worker(WorkerOptions {
                command: WorkerCommand::Echo(echo),
            }) => {
                let config = config(&echo.inputs(env, &host())).map_err(|stop| stop.to_string())?;
                echo.args(config, env).map_err(|stop| stop.to_string())
            }
            other => Err(format!("{other:?}")),
        }
    }

    fn call(line: &str) -> Result<CallArgs, String> {
        match parse(&format!("call {line}"))? {
            Command::Call(call) => {
                let inputs = call.inputs(&Env::default(), &host());
                let config = config(&inputs).map_err(|stop| stop.to_string())?;
                call.args(config).map_err(|stop| stop.to_string())
            }
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn clap_finds_no_fault_in_the_table() {
        Options::command().debug_assert();
    }

    #[test]
    fn echo_takes_every_form_of_a_name_and_its_variables() {
        let env = env(&[
            ("DYN_TCP_RPC_PORT", "7001"),
            ("DYN_REQUEST_PLANE_CODEC", "json"),
        ]);
        for form in ["a/b/c", "a.b.c", "dyn://a.b.c"] {
            let echo = echo(&format!("--endpoint {form} --items 3 --delay-us 5"), &env).unwrap();
            assert_eq!(echo.endpoint, EndpointId::new("a", "b", "c"));
            assert_eq!((echo.server.port, echo.codec), (7_001, Codec::Json));
            let delay = Duration::from_micros(5);
            assert_eq!(
                echo.answer,
                Answer {
                    items: 3,
                    item_bytes: None,
                    delay
                }
            );
        }
        let echo = echo(
            "--endpoint a/b/c --port 1 --codec msgpack --discovery file --file-kv /x",
            &env,
        );
        let echo = echo.unwrap();
        assert_eq!((echo.server.port, echo.codec), (1, Codec::Msgpack));
        assert_eq!(echo.discovery.backend, Backend::File);
        assert_eq!(echo.discovery.path, PathBuf::from("/x"));
    }

    #[test]
    fn faults_of_echo_are_said() {
        let bad_codec = env(&[("DYN_REQUEST_PLANE_CODEC", "xml")]);
        let said = echo("--endpoint a/b/c", &bad_codec).unwrap_err();
        assert!(
            said.ends_with("unknown codec \"xml\"; write json or msgpack"),
            "{said}"
        );
        let said = echo("--endpoint a/b/c --discovery nats", &Env::default()).unwrap_err();
        assert!(
            said.contains("flag --discovery: unknown backend \"nats\"; write"),
            "{said}"
        );
        assert!(
            echo("--items 1", &Env::default())
                .unwrap_err()
                .contains("--endpoint")
        );
    }

    #[test]
    fn call_knows_whom() {
        let args = call("--address tcp://127.0.0.1:7/1a/x --header a=b --header c=d=e").unwrap();
        let Target::Address {
            socket,
            path,
            endpoint: None,
        } = args.target
        else {
            panic!("{:?}", args.target)
        };
        assert_eq!((socket.port(), path.as_str()), (7, "1a/x"));
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(args.headers, [header("a", "b"), header("c", "d=e")]);
        assert_eq!((args.count, args.concurrency, args.early), (1, 1, None));
        assert_eq!(args.timeout, Duration::from_secs(30));
        let args = call("--endpoint a.b.c --discovery etcd --stop-after 2").unwrap();
        assert_eq!(
            args.target,
            Target::Endpoint(EndpointId::new("a", "b", "c"))
        );
        assert_eq!(args.early, Some(Early::Stop(2)));
    }

    #[test]
    fn faults_of_call_are_said() {
        for (line, said) in [
            ("", "--endpoint <NS/COMP/EP>"),
            (
                "--endpoint a/b/c",
                "discovery in memory knows only its own process",
            ),
            ("--address localhost:1/x", "write it like 127.0.0.1:9000/"),
            ("--address 127.0.0.1:1/x --body {a:1}", "not JSON"),
            ("--address 127.0.0.1:1/x --header ab", "write NAME=VALUE"),
            (
                "--address 127.0.0.1:1/x --header a=1 --header a=2",
                "header \"a\" is given twice",
            ),
            (
                "--address 127.0.0.1:1/x --stop-after 1 --kill-after 1",
                "cannot be used with",
            ),
            ("--address 127.0.0.1:1/x --count 0", "0 is not in 1.."),
        ] {
            let error = call(line).unwrap_err();
            assert!(error.contains(said), "{line}: {error}");
        }
    }

    #[test]
    fn up_is_complete_by_itself() {
        let Ok(Command::Up(up)) = parse("up --workers 3 --set server.port=7000") else {
            panic!()
        };
        // What the cluster's variables say about discovery does not concern it.
        let env = env(&[("DYN_DISCOVERY_BACKEND", "etcd")]);
        let config = config(&up.inputs(&env, &host()).unwrap()).unwrap();
        let up = up.args(config);
        assert_eq!((up.workers, up.config.server.port), (3, 7_000));
        assert_eq!(up.config.discovery.backend, Backend::Memory);
        assert_eq!(
            up.config.routes[0].listen.to_string(),
            "dynamo/router/generate"
        );
        let Ok(Command::Up(up)) = parse("up --set discovery.backend=etcd") else {
            panic!()
        };
        assert!(up.inputs(&env, &host()).is_err());
    }

    #[test]
    fn set_knows_its_keys() {
        let said = |text| setting(text).unwrap_err();
        assert_eq!(setting("core.io=a=b").unwrap().text, "a=b");
        assert_eq!(
            said("core.ios=x"),
            "unknown key \"core.ios\"; did you mean core.io?"
        );
        assert!(
            said("route.listen=a/b/c").contains("unknown key"),
            "routes stand in files"
        );
        assert!(said("core.io").starts_with("write SECTION.KEY=VALUE"));
    }
}
