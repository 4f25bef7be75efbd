//! The command line: arguments become plain structs, problems become lines and exit codes.
//!
//! Results go to standard output, the log and complaints to standard error. Exit codes: 0 ok,
//! 1 failed, 2 bad usage or configuration, 78 the host cannot do what was required.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use thiserror::Error;

use crate::commands;
use crate::config::{Checked, Config, Host, Inputs};
use crate::env::{self, Env, Level};
use crate::{logging, trace};

mod args;
mod check;
mod doctor;
mod dump;
mod events;
mod explain;
mod extract;
mod gms;
mod options;
mod reload;
mod top;
mod tune;

pub use args::{
    Answer, CallArgs, Codec, Early, EchoArgs, GmsArgs, ProbeArgs, ServeArgs, Target, UpArgs,
};
pub use check::{Report, SCHEMA};

use events::EventsCommand;
use explain::ExplainCommand;
use extract::TraceCommand;
use gms::GmsTask;
use options::{Command, EnvOptions, Options, WorkerCommand};

/// How the program ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Exit {
    /// All went well.
    Done,
    /// It did not.
    Failed,
    /// The arguments or the configuration are wrong.
    Usage,
    /// The host cannot do what was required.
    HostCannot,
}

impl Exit {
    /// The number that the shell sees.
    pub const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::HostCannot => 78,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// An error that ends the program with a code of its own, wherever it stands in a chain of causes;
/// any other error ends it with 1.
#[derive(Debug, Error)]
pub enum Stop {
    /// Bad arguments or configuration: 2. Several lines are fine.
    #[error("{0}")]
    Usage(String),
    /// Something was required that this host cannot do: 78.
    #[error("{0}")]
    HostCannot(String),
}

/// Runs the program with the arguments and environment of this process.
pub fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        let payload = panic.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let place = panic
            .location()
            .map(|at| format!(" at {}:{}", at.file(), at.line()));
        complain(&format!(
            "internal error{}: {}; this is a bug in corelane, please report it",
            place.unwrap_or_default(),
            text.unwrap_or("no message"),
        ));
    }));
    // A panic of this thread has been told by the hook; it must not look like bad usage.
    let outcome =
        std::panic::catch_unwind(|| run(std::env::args_os(), &Env::current(), &Host::current()));
    outcome.unwrap_or(Exit::Failed).into()
}

/// Runs a command line.
pub fn run(args: impl IntoIterator<Item = OsString>, env: &Env, host: &Host) -> Exit {
    let options = match Options::try_parse_from(args) {
        Ok(options) => options,
        Err(error) => {
            // Help and version are no errors and go to standard output.
            let exit = if error.use_stderr() {
                Exit::Usage
            } else {
                Exit::Done
            };
            let _ = error.print();
            return exit;
        }
    };
    logging::start(env);
    trace::start(env);
    let outcome = dispatch(options.command, env, host);
    trace::finish();
    match outcome {
        Ok(exit) => exit,
        Err(error) => {
            complain(&format!("{error:#}"));
            match error.chain().find_map(|cause| cause.downcast_ref::<Stop>()) {
                Some(Stop::Usage(_)) => Exit::Usage,
                Some(Stop::HostCannot(_)) => Exit::HostCannot,
                None => Exit::Failed,
            }
        }
    }
}

fn dispatch(command: Command, env: &Env, host: &Host) -> anyhow::Result<Exit> {
    let load = |inputs: Inputs| config(&inputs);
    match command {
        Command::Up(up) => {
            report(env);
            let config = load(up.inputs(env, host)?)?;
            commands::up(up.args(config))
        }
        Command::Serve(serve) => {
            report(env);
            let inputs = serve.inputs(env, host)?;
            let config = load(inputs.clone())?;
            commands::serve(ServeArgs { config, inputs })
        }
        Command::Check(check) => Ok(check::check(&check, env, host)?),
        Command::Env(options) => environment(&options, env),
        Command::Worker(worker) => {
            let WorkerCommand::Echo(echo) = worker.command;
            report(env);
            let config = load(echo.inputs(env, host))?;
            commands::echo(echo.args(config, env)?)
        }
        Command::Call(call) => {
            let config = load(call.inputs(env, host))?;
            commands::call(call.args(config)?)
        }
        Command::Gms(gms) => match gms.task() {
            GmsTask::Serve(serve) => {
                report(env);
                let config = load(serve.inputs(env, host))?;
                commands::gms(serve.args(config)?)
            }
            GmsTask::Probe(probe) => commands::probe(probe.args(env)),
        },
        Command::Trace(trace) => {
            let TraceCommand::Extract(extract) = trace.command;
            commands::extract(&extract.args())
        }
        Command::Events(events) => match events.command {
            EventsCommand::Tail(tail) => {
                let config = load(tail.inputs(env, host))?;
                commands::tail(tail.args(config, env)?)
            }
            EventsCommand::Publish(publish) => {
                let config = load(publish.inputs(env, host))?;
                commands::publish(publish.args(config, env)?)
            }
            EventsCommand::Keys(keys) => commands::keys(&keys.args()),
        },
        Command::Dump(dump) => commands::dump(&dump.args()),
        Command::Top(top) => commands::top(&top.args()),
        Command::Explain(explain) => {
            let ExplainCommand::Route(route) = explain.command;
            commands::explain(&route.args())
        }
        Command::Reload(reload) => commands::reload(&reload.args()),
        Command::Tune(options) => tune::tune(*options, env, host),
        Command::Doctor(options) => doctor::doctor(&options, env, host),
    }
}

/// The configuration; its warnings are logged, its errors end the program.
fn config(inputs: &Inputs) -> Result<Config, Stop> {
    let checked = crate::config::load(inputs);
    for warning in checked.warnings() {
        tracing::warn!("{}", warning.line());
    }
    let failed = errors(&checked);
    checked.config.ok_or(Stop::Usage(failed))
}

fn errors(checked: &Checked) -> String {
    let lines: Vec<String> = checked.errors().map(ToString::to_string).collect();
    let head = if lines.len() == 1 {
        "1 error"
    } else {
        &format!("{} errors", lines.len())
    };
    format!("configuration has {head}\n{}", lines.join("\n"))
}

/// Prints every variable that we know.
fn environment(options: &EnvOptions, env: &Env) -> anyhow::Result<Exit> {
    if options.json {
        let text = serde_json::to_string(&env::json(env))?;
        print(&format!("{text}\n"))?;
    } else {
        print(&env::text(env, options.set))?;
    }
    Ok(Exit::Done)
}

/// Says what the environment of this process does here.
fn report(env: &Env) {
    for notice in env::report(env) {
        match notice.level {
            Level::Info => tracing::info!("{notice}"),
            Level::Warn => tracing::warn!("{notice}"),
        }
    }
}

/// Writes a complaint to standard error.
fn complain(text: &str) {
    // If nobody can read standard error, there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "corelane: {text}");
}

/// Writes a result to standard output. A reader that went away (`| head`) is no failure.
pub(crate) fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}
