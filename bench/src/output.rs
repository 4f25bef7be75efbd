//! Where the results of a run go: tables, JSON, HTML, files for plotters; and whether they keep
//! their thresholds.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::curves::Panel;
use crate::html::Page;
use crate::thresholds::{Thresholds, Verdict};
use crate::{hdr_files, plots};

/// Where the results of a run go.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct OutputArgs {
    /// Write the report as JSON to this file; `-` is standard output (the table then goes to
    /// standard error).
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Keep the report as a dated JSON file in this directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Write the report as one HTML page that needs nothing else.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Bounds (TOML) that the report must keep; it fails, by name, where it does not.
    #[arg(long, value_name = "FILE")]
    pub(crate) thresholds: Option<PathBuf>,
}

/// Where whole distributions go.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct ExportArgs {
    /// Write the distributions as an HdrHistogram interval log (V2), one tag per load and arm;
    /// values are nanoseconds, the printed maxima microseconds.
    #[arg(long, value_name = "FILE")]
    hlog: Option<PathBuf>,
    /// Write a table of percentiles (`.hgrm`, in microseconds) for each load and arm here.
    #[arg(long, value_name = "DIR")]
    percentiles: Option<PathBuf>,
    /// Draw the plots as one SVG.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// A report in all its forms.
pub(crate) struct Told<'a> {
    /// The subcommand.
    pub(crate) kind: &'a str,
    /// The JSON.
    pub(crate) report: &'a Value,
    /// Tables, printed already.
    pub(crate) tables: &'a str,
    /// Distributions, where there are any.
    pub(crate) panels: &'a [Panel],
}

impl OutputArgs {
    fn json_on_stdout(&self) -> bool {
        self.json.as_deref() == Some(Path::new("-"))
    }

    /// Prints the tables where they do not mix with the JSON.
    pub(crate) fn print_table(&self, text: &str) -> Result<()> {
        if cfg!(debug_assertions) {
            eprintln!("this is a debug build: its numbers are for trying, not for telling");
        }
        match self.json_on_stdout() {
            true => eprintln!("{text}"),
            false => writeln!(std::io::stdout(), "{text}").context("cannot print")?,
        }
        Ok(())
    }

    /// Reads the thresholds, so that mistakes in them are told before the run.
    pub(crate) fn check(&self) -> Result<()> {
        self.thresholds
            .as_deref()
            .map_or(Ok(()), |file| Thresholds::read(file).map(drop))
    }

    /// Writes what was asked for; an error says which thresholds are broken.
    pub(crate) fn finish(&self, told: &Told<'_>) -> Result<()> {
        self.write_json(told)?;
        let thresholds = self
            .thresholds
            .as_deref()
            .map(Thresholds::read)
            .transpose()?;
        let verdict = thresholds.map(|all| all.judge(told.report));
        if let Some(file) = &self.html {
            let plots = plots::all(told.panels)?;
            let page = Page {
                kind: told.kind,
                report: told.report,
                tables: told.tables,
                panels: told.panels,
                plots: &plots,
                verdict: verdict.as_ref(),
            };
            write_file(file, page.html().as_bytes())?;
        }
        match verdict {
            Some(Verdict { bounds, broken }) if !broken.is_empty() => {
                let list = broken.join("\n  ");
                bail!("broken: {} of {bounds} thresholds:\n  {list}", broken.len())
            }
            _ => Ok(()),
        }
    }

    fn write_json(&self, told: &Told<'_>) -> Result<()> {
        let text = format!("{:#}\n", told.report);
        if self.json_on_stdout() {
            std::io::stdout()
                .write_all(text.as_bytes())
                .context("cannot print")?;
        } else if let Some(file) = &self.json {
            write_file(file, text.as_bytes())?;
        }
        if let Some(dir) = &self.out {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
            let when = told.report["when"].as_str().unwrap_or("undated");
            let stamp = when.replace([':', '-'], "");
            let file = dir.join(format!("{}-{stamp}.json", told.kind));
            write_file(&file, format!("{}\n", told.report).as_bytes())?;
            eprintln!("kept {}", file.display());
        }
        Ok(())
    }
}

impl ExportArgs {
    /// Writes what was asked for; `began` is when the run did.
    pub(crate) fn write(&self, panels: &[Panel], began: SystemTime) -> Result<()> {
        if let Some(file) = &self.hlog {
            write_file(file, &hdr_files::interval_log(panels, began)?)?;
        }
        if let Some(dir) = &self.percentiles {
            hdr_files::write_percentiles(panels, dir)?;
        }
        if let Some(file) = &self.svg {
            write_file(file, plots::stacked(&plots::all(panels)?).as_bytes())?;
        }
        Ok(())
    }
}

fn write_file(file: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(file, bytes).with_context(|| format!("cannot write {}", file.display()))
}
