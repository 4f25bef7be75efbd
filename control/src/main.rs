//! The program `corelane`: hands its arguments to the library and returns its exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    corelane::cli::main()
}
