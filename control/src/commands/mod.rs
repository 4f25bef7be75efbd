//! What the commands do once their arguments are read; `cli` reads them and `check` is its own.

use anyhow::Result;

use crate::cli::{CallArgs, EchoArgs, Exit};

mod dump;
mod events;
mod explain;
mod gms;
mod reload;
mod serve;
mod top;
mod up;

pub use dump::{DumpArgs, Source, dump};
pub use events::{KeysArgs, PublishArgs, TailArgs, Transport, keys, publish, tail};
pub use explain::{ExplainArgs, explain};
pub use gms::{gms, probe};
pub use reload::{ReloadArgs, reload};
pub use serve::serve;
pub use top::{TopArgs, top};
pub use up::up;

/// `corelane worker echo`: a worker that answers with what it was sent.
///
/// # Errors
/// Whatever stops it; [`crate::cli::Stop`] in the chain chooses the exit code.
pub fn echo(args: EchoArgs) -> Result<Exit> {
    crate::echo::run(args)
}

/// `corelane trace extract`: a trace added up by interval, as one JSON list.
///
/// # Errors
/// See [`crate::planner::trace::TraceError`]; or standard output cannot be written.
pub fn extract(wanted: &crate::planner::trace::Extract) -> Result<Exit> {
    let intervals = crate::planner::trace::extract(wanted)?;
    crate::cli::print(&(serde_json::to_string(&intervals)? + "\n"))?;
    Ok(Exit::Done)
}

/// `corelane call`: one call, or some.
///
/// # Errors
/// As [`echo`].
pub fn call(args: CallArgs) -> Result<Exit> {
    crate::call::run(args)
}
