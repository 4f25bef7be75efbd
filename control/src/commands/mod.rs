//! What the commands do once their arguments are read; `cli` reads them and `check` is its own.

use anyhow::{Result, bail};

use crate::cli::{CallArgs, EchoArgs, Exit, UpArgs};

mod serve;

pub use serve::serve;

const MISSING: &str = "this command is wired in by the engine";

/// `corelane up`: a router, discovery in memory and echo workers in this process.
///
/// # Errors
/// Whatever stops it; [`crate::cli::Stop`] in the chain chooses the exit code.
pub fn up(_: UpArgs) -> Result<Exit> {
    bail!(MISSING)
}

/// `corelane worker echo`: a worker that answers with what it was sent.
///
/// # Errors
/// Whatever stops it; [`crate::cli::Stop`] in the chain chooses the exit code.
pub fn echo(_: EchoArgs) -> Result<Exit> {
    bail!(MISSING)
}

/// `corelane call`: one call, or some.
///
/// # Errors
/// Whatever stops it; [`crate::cli::Stop`] in the chain chooses the exit code.
pub fn call(_: CallArgs) -> Result<Exit> {
    bail!(MISSING)
}
