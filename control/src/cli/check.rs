//! `corelane check`: reads what `serve` would read, opens nothing, and says what it found.
//!
//! With `--json` one object is printed, whose keys are stable ([`Report`]):
//!
//! ```json
//! {"schema":"corelane.check/1","file":"corelane.toml","ok":false,
//!  "errors":[{"origin":"file","file":"corelane.toml","line":3,"column":8,"name":null,
//!             "what":"port is 70000, outside 0 to 65535 (port)","instead":"write 65535"}],
//!  "warnings":[],
//!  "environment":[{"name":"ETCD_LEASE_TTL","level":"info","text":"sets lease_ttl_s of ..."}],
//!  "settings":[{"key":"server.port","value":"0","origin":"default","file":null,"line":null,
//!               "column":null,"name":null}]}
//! ```
//! `origin` is `file` (with `file`, `line`, `column`), `env` or `flag` (with `name`), `host` (with
//! `name`: what of this host it follows from), or `default`. `value` is null for a key that is
//! unset; secrets are `(hidden)`.

use std::fmt::Write;

use clap::Args;
use serde::Serialize;

use super::options::{ConfigFile, Settings};
use super::{Exit, print};
use crate::config::{
    Checked, Config, Fallback, Host, Inputs, Main, Origin, Problem, Purpose, Section, Setting,
    cpu_list, keys, load,
};
use crate::env::{self, Env, Level, Notice};
use crate::tls::kernel as tls;

/// Name and version of the JSON form.
pub const SCHEMA: &str = "corelane.check/1";

/// Longer values move what stands behind them.
const COLUMN_MAX: usize = 30;

/// Look for mistakes in the configuration
///
/// Reads what `serve` would read, opens no socket and writes nothing. Each finding is a line
/// file:line:column: what is wrong; what to write instead. Exit code 0, or 2 with errors.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane check
  corelane check --config /etc/corelane/corelane.toml --json
  corelane check --explain               every key with its value and where it came from")]
pub(super) struct CheckOptions {
    #[command(flatten)]
    file: ConfigFile,
    #[command(flatten)]
    settings: Settings,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// List every key: type, default, variables, and the value in use
    #[arg(long, conflicts_with = "json")]
    explain: bool,
}

/// What `--json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Always [`SCHEMA`].
    pub schema: &'static str,
    /// The main file.
    pub file: String,
    /// Whether `serve` would start with it.
    pub ok: bool,
    /// What stops it.
    pub errors: Vec<Finding>,
    /// What does not.
    pub warnings: Vec<Finding>,
    /// What the variables of our and Dynamo's families do.
    pub environment: Vec<Variable>,
    /// Every value that was looked at.
    pub settings: Vec<Used>,
}

/// A place.
#[derive(Clone, Debug, Serialize)]
pub struct Place {
    /// `file`, `env`, `flag`, `host` or `default`.
    pub origin: &'static str,
    /// Of `file`: its path.
    pub file: Option<String>,
    /// Of `file`: from 1.
    pub line: Option<u32>,
    /// Of `file`: in characters, from 1.
    pub column: Option<u32>,
    /// Of `env` and `flag`: its name. Of `host`: what of it the value follows from.
    pub name: Option<String>,
}

/// An error or a warning.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// What is wrong.
    pub what: String,
    /// What to write.
    pub instead: String,
}

/// A variable that is set.
#[derive(Clone, Debug, Serialize)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// `info` when it takes effect, else `warn`.
    pub level: &'static str,
    /// What it does.
    pub text: String,
}

/// A value in use.
#[derive(Clone, Debug, Serialize)]
pub struct Used {
    /// `server.port`, `route[0].listen`, `core[3].io`.
    pub key: String,
    /// As it would be typed.
    pub value: Option<String>,
    /// Where it came from.
    #[serde(flatten)]
    pub place: Place,
}

impl From<&Origin> for Place {
    fn from(origin: &Origin) -> Self {
        let none = Self {
            origin: "default",
            file: None,
            line: None,
            column: None,
            name: None,
        };
        match origin.clone() {
            Origin::Default => none,
            Origin::Env { name } => Self {
                origin: "env",
                name: Some(name),
                ..none
            },
            Origin::Flag { name } => Self {
                origin: "flag",
                name: Some(name),
                ..none
            },
            Origin::Host { why } => Self {
                origin: "host",
                name: Some(why),
                ..none
            },
            Origin::File { path, line, column } => Self {
                origin: "file",
                file: Some(path.to_string()),
                line: Some(line),
                column: Some(column),
                ..none
            },
        }
    }
}

impl From<&Problem> for Finding {
    fn from(problem: &Problem) -> Self {
        let (what, instead) = (problem.what.clone(), problem.instead.clone());
        Self {
            place: Place::from(&problem.at),
            what,
            instead,
        }
    }
}

impl Report {
    fn new(file: String, checked: &Checked, notices: &[Notice]) -> Self {
        let level = |level| if level == Level::Info { "info" } else { "warn" };
        Self {
            schema: SCHEMA,
            file,
            ok: checked.config.is_some(),
            errors: checked.errors().map(Finding::from).collect(),
            warnings: checked.warnings().map(Finding::from).collect(),
            environment: (notices.iter())
                .map(|notice| Variable {
                    name: notice.name.clone(),
                    level: level(notice.level),
                    text: notice.text.clone(),
                })
                .collect(),
            settings: (checked.settings.iter())
                .map(|setting| Used {
                    key: setting.path.clone(),
                    value: setting.value.clone(),
                    place: Place::from(&setting.origin),
                })
                .collect(),
        }
    }
}

/// Runs `corelane check`.
///
/// # Errors
/// When standard output cannot be written.
pub(super) fn check(options: &CheckOptions, env: &Env, host: &Host) -> anyhow::Result<Exit> {
    let path = options.file.path(env);
    let file = path.display().to_string();
    let checked = load(&Inputs {
        purpose: Purpose::Serve,
        main: Main::File(path),
        overrides: options.settings.set.clone(),
        env: env.clone(),
        host: host.clone(),
    });
    let notices = env::report(env);
    let text = if options.json {
        let report = Report::new(file, &checked, &notices);
        format!("{}\n", serde_json::to_string(&report)?)
    } else {
        let mut text = findings(&checked, &notices);
        if options.explain {
            text.push_str(&explain(&checked.settings));
            text.push_str(&cores(&checked));
        }
        text.push_str(&summary(&file, &checked));
        text
    };
    print(&text)?;
    Ok(if checked.config.is_some() {
        Exit::Done
    } else {
        Exit::Usage
    })
}

fn findings(checked: &Checked, notices: &[Notice]) -> String {
    let problems = checked
        .problems
        .iter()
        .map(|problem| format!("{problem}\n"));
    // A variable that stops us is among the problems already.
    let told = |notice: &&Notice| {
        let at = Origin::Env {
            name: notice.name.clone(),
        };
        notice.level == Level::Warn && checked.errors().all(|problem| problem.at != at)
    };
    let notices = notices.iter().filter(told);
    let notices = notices.map(|n| format!("environment {}: warning: {}\n", n.name, n.text));
    problems.chain(notices).collect()
}

fn summary(file: &str, checked: &Checked) -> String {
    let count = |count: usize, noun: &str| match count {
        1 => format!("1 {noun}"),
        _ => format!("{count} {noun}s"),
    };
    let errors = checked.errors().count();
    let warnings = checked.warnings().count();
    match &checked.config {
        None => format!(
            "{file}: {}, {}\n",
            count(errors, "error"),
            count(warnings, "warning")
        ),
        Some(config) if warnings == 0 => format!("{file}: ok\n{}", contents(config)),
        Some(config) => {
            format!(
                "{file}: ok, {}\n{}",
                count(warnings, "warning"),
                contents(config)
            )
        }
    }
}

/// What the router would be, in a few lines.
fn contents(config: &Config) -> String {
    let mut text = String::new();
    for route in &config.routes {
        let _ = writeln!(
            text,
            "  route {} -> {} ({}, ack {})",
            route.listen, route.target, route.policy, route.ack
        );
    }
    let cpus: Vec<usize> = config.cores.iter().map(|core| core.cpu).collect();
    let bytes: u64 = (config.cores.iter())
        .map(|core| u64::from(core.buffers) * u64::from(core.buffer_bytes))
        .sum();
    let _ = writeln!(
        text,
        "  data cores {}, control core {}, {} MiB of receive buffers",
        cpu_list(&cpus),
        config.control.cpu,
        bytes.div_ceil(1 << 20)
    );
    let _ = writeln!(
        text,
        "  discovery {}, {} written down",
        config.discovery.backend,
        match config.instances.len() {
            1 => "1 instance".to_owned(),
            n => format!("{n} instances"),
        }
    );
    if !config.server.tls.is_off() {
        let _ = writeln!(
            text,
            "  TLS: {}",
            tls::who_encrypts(config.server.tls.kernel)
        );
    }
    if let Some(gpu) = &config.gpu {
        let devices: Vec<usize> = gpu.devices.iter().map(|n| *n as usize).collect();
        let _ = writeln!(
            text,
            "  GPU memory of devices {} ({}), pools {}, sockets in {}{}",
            cpu_list(&devices),
            gpu.backend,
            gpu.tags.join(" and "),
            gpu.socket_dir.display(),
            match gpu.spin_us {
                0 => ", asleep between requests".to_owned(),
                us => format!(", awake for {us} us after each request"),
            }
        );
    }
    text
}

/// The table of keys, and beside each the values that are in use.
fn explain(settings: &[Setting]) -> String {
    let mut text = String::new();
    for section in Section::ALL {
        let _ = writeln!(text, "{}", section.header());
        for key in keys().iter().filter(|key| key.section == section) {
            let _ = writeln!(text, "  {}: {}", key.name, key.doc);
            let default = match key.fallback {
                Fallback::Value(value) => format!("default {value}"),
                Fallback::Unset(means) => format!("default: {means}"),
                Fallback::Required => "required".to_owned(),
            };
            let live = if key.is_live() {
                "live"
            } else {
                "needs a restart"
            };
            let _ = writeln!(text, "    {}; {default}; {live}", key.kind.describe());
            let aliases = key.aliases.iter().map(|alias| alias.name.to_owned());
            let names: Vec<String> = key.env().into_iter().chain(aliases).collect();
            if !names.is_empty() {
                let _ = writeln!(text, "    variables: {}", names.join(", "));
            }
            let used = settings.iter().filter(|setting| setting.key == *key);
            for setting in used.filter(|setting| setting.origin != Origin::Default) {
                let value = setting.value.as_deref().unwrap_or("unset");
                let _ = writeln!(text, "    {} = {value} ({})", setting.path, setting.origin);
            }
        }
        text.push('\n');
    }
    text
}

/// What each core is told in the end, and who said so: one table for each, one key a line.
fn cores(checked: &Checked) -> String {
    let mut text = String::new();
    let Some(config) = &checked.config else {
        return text;
    };
    for core in &config.cores {
        let _ = writeln!(text, "core {} on CPU {}", core.number, core.cpu);
        let begin = format!("core[{}].", core.number);
        let of_core = |setting: &&Setting| setting.path.starts_with(&begin);
        let settings: Vec<&Setting> = checked.settings.iter().filter(of_core).collect();
        let shown = |setting: &Setting| match (&setting.value, setting.key.fallback) {
            (Some(value), _) => value.clone(),
            (None, Fallback::Unset(means)) => means.to_owned(),
            (None, _) => "unset".to_owned(),
        };
        let longest = settings.iter().map(|setting| shown(setting).len());
        let width = longest.max().unwrap_or(0).min(COLUMN_MAX);
        for setting in settings {
            let (name, value) = (setting.key.name, shown(setting));
            let _ = writeln!(text, "  {name:<21} {value:<width$}  {}", setting.origin);
        }
        text.push('\n');
    }
    text
}
