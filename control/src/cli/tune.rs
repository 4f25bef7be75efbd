//! `corelane tune` as clap reads it.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::options::{ConfigFile, Settings};
use super::{Exit, Stop};
use crate::config::{self, Config, Core, Host, Inputs, Main, Purpose};
use crate::env::Env;
use crate::tune::{self, Goal, Outcome, Plan, View};

/// What is assumed where there is no configuration.
const NONE: &str = r#"
[[route]]
listen = "dynamo/router/generate"
target = "dynamo/backend/generate"
"#;

/// And besides where discovery finds nobody by itself.
const INSTANCE: &str = r#"
[[instance]]
endpoint = "dynamo/backend/generate"
address = "127.0.0.1:9001/1/dynamo/backend/generate"
"#;

/// Find and change settings of this host that cost latency
///
/// Interrupts, queues and rings of network devices, sysctls, clock and sleep of the CPUs, huge
/// pages and limits, each with its value, what it should be, why, and the way back. Without a
/// subcommand the plan is shown and nothing is changed.
#[derive(Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  corelane tune                                what should be changed (nothing is)
  corelane tune list                           all settings, those that are fine too
  corelane tune plan --script tune.sh --systemd corelane.service.d/tune.conf
  corelane tune apply --config /etc/corelane/corelane.toml --device eth0
  corelane tune undo                           back to what was before"
)]
pub(super) struct TuneOptions {
    #[command(subcommand)]
    command: Option<TuneCommand>,
    #[command(flatten)]
    plan: PlanOptions,
}

#[derive(Debug, Subcommand)]
enum TuneCommand {
    List(LookOptions),
    Plan(PlanOptions),
    Apply(ApplyOptions),
    Undo(UndoOptions),
}

/// List every setting that is looked at
#[derive(Args, Debug)]
struct LookOptions {
    #[command(flatten)]
    file: ConfigFile,
    #[command(flatten)]
    settings: Settings,
    /// Network devices; may be given again [default: those with hardware that are up]
    #[arg(long = "device", value_name = "NAME", value_delimiter = ',')]
    devices: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Show what should be changed; changes nothing
#[derive(Args, Debug)]
struct PlanOptions {
    #[command(flatten)]
    look: LookOptions,
    /// Write a shell script that makes the changes, and with `undo` takes them back
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Write a drop-in for the unit of systemd
    #[arg(long, value_name = "FILE")]
    systemd: Option<PathBuf>,
}

/// Change what should be changed; what was is recorded first
#[derive(Args, Debug)]
struct ApplyOptions {
    #[command(flatten)]
    look: LookOptions,
    /// Where what was is recorded
    #[arg(long, value_name = "FILE", default_value = tune::RECORD)]
    record: PathBuf,
}

/// Take back what was changed, but for what somebody else has changed since
#[derive(Args, Debug)]
struct UndoOptions {
    /// Where what was is recorded
    #[arg(long, value_name = "FILE", default_value = tune::RECORD)]
    record: PathBuf,
}

/// The configuration that a host is looked at for.
pub(super) fn inputs(file: &ConfigFile, settings: &Settings, env: &Env, host: &Host) -> Inputs {
    let path = file.path(env);
    // Whoever named a file wants that one; else a host can be looked at without any.
    let named = file.config.is_some() || env.get("CORELANE_CONFIG").is_some();
    let of = |main| Inputs {
        purpose: Purpose::Serve,
        main,
        overrides: settings.set.clone(),
        env: env.clone(),
        host: host.clone(),
    };
    if named || path.exists() {
        return of(Main::File(path));
    }
    let text = |text: String| Main::Text {
        name: "no configuration".into(),
        text,
    };
    let with = of(text(format!("{NONE}{INSTANCE}")));
    // etcd, which a variable may ask for, does not go with instances.
    match config::load(&with).config {
        Some(_) => with,
        None => of(text(NONE.to_owned())),
    }
}

impl LookOptions {
    fn make(&self, env: &Env, host: &Host) -> Result<(View, Plan), Stop> {
        let config = super::config(&inputs(&self.file, &self.settings, env, host))?;
        let view = View::host();
        let plan = Plan::make(&view, &goal(&config, &self.devices));
        Ok((view, plan))
    }
}

/// What it asks of the host.
pub(super) fn goal(config: &Config, devices: &[String]) -> Goal {
    let connections = config
        .cores
        .iter()
        .map(|core| u64::from(core.connections_max));
    let queue = |core: &Core| Some((core.nic_queue.clone()?, core.cpu));
    Goal {
        cpus: config.cores.iter().map(|core| core.cpu).collect(),
        devices: (!devices.is_empty()).then(|| devices.to_vec()),
        connections: connections.sum(),
        queues: config.cores.iter().filter_map(queue).collect(),
        polls: config.cores.iter().any(|core| core.busy_poll_us > 0),
    }
}

/// Does what was asked for.
///
/// # Errors
/// The configuration is wrong, or a file cannot be written.
pub(super) fn tune(options: TuneOptions, env: &Env, host: &Host) -> anyhow::Result<Exit> {
    match options.command {
        None => plan(&options.plan, env, host),
        Some(TuneCommand::Plan(options)) => plan(&options, env, host),
        Some(TuneCommand::List(look)) => {
            let (_, plan) = look.make(env, host)?;
            show(&plan, look.json, true)
        }
        Some(TuneCommand::Apply(options)) => {
            let (view, plan) = options.look.make(env, host)?;
            told(tune::apply(&view, &plan, &options.record)?)
        }
        Some(TuneCommand::Undo(options)) => told(tune::undo(&View::host(), &options.record)?),
    }
}

fn plan(options: &PlanOptions, env: &Env, host: &Host) -> anyhow::Result<Exit> {
    let (_, plan) = options.look.make(env, host)?;
    let files = [
        (&options.script, tune::script(&plan)),
        (&options.systemd, tune::drop_in(&plan)),
    ];
    for (path, text) in files {
        let Some(path) = path else { continue };
        std::fs::write(path, text)
            .map_err(|error| anyhow::anyhow!("cannot write {}: {error}", path.display()))?;
    }
    show(&plan, options.look.json, false)
}

fn show(plan: &Plan, json: bool, all: bool) -> anyhow::Result<Exit> {
    if json {
        super::print(&(serde_json::to_string(plan)? + "\n"))?;
    } else {
        super::print(&tune::text(plan, all))?;
    }
    Ok(Exit::Done)
}

fn told(outcomes: Vec<(String, Outcome)>) -> anyhow::Result<Exit> {
    let mut exit = Exit::Done;
    let mut out = String::new();
    for (name, outcome) in &outcomes {
        out += &match outcome {
            Outcome::Changed => format!("changed  {name}\n"),
            Outcome::Left(why) => format!("left     {name}: {why}\n"),
            Outcome::Refused(why) => {
                exit = Exit::Failed;
                format!("refused  {name}: {why}\n")
            }
        };
    }
    if outcomes.is_empty() {
        out += "nothing to do\n";
    }
    super::print(&out)?;
    Ok(exit)
}
