//! The files of a trace: named, matched by a glob, or all shards of a folder; plain or gzip.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use super::TraceError;

const ENDINGS: [&str; 2] = [".jsonl", ".jsonl.gz"];

/// All shards, sorted, each once.
pub(super) fn find(inputs: &[String]) -> Result<Vec<PathBuf>, TraceError> {
    let mut shards = BTreeSet::new();
    for input in inputs {
        let path = Path::new(input);
        if path.is_dir() {
            shards.extend(of_folder(path)?);
        } else if path.exists() {
            shards.insert(path.to_owned());
        } else if input.contains(['*', '?', '[']) {
            shards.extend(of_glob(input)?);
        } else {
            return Err(TraceError::Inputs(format!("there is no {input}")));
        }
    }
    twice(&shards)?;
    Ok(shards.into_iter().collect())
}

fn is_shard(path: &Path) -> bool {
    let name = path.to_string_lossy();
    path.is_file() && ENDINGS.iter().any(|ending| name.ends_with(ending))
}

fn of_folder(folder: &Path) -> Result<Vec<PathBuf>, TraceError> {
    let failed = |source| TraceError::File {
        file: folder.display().to_string(),
        source,
    };
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if is_shard(&path) {
            shards.push(path);
        }
    }
    if shards.is_empty() {
        let text = format!("{} has no .jsonl or .jsonl.gz file", folder.display());
        return Err(TraceError::Inputs(text));
    }
    Ok(shards)
}

fn of_glob(pattern: &str) -> Result<Vec<PathBuf>, TraceError> {
    let paths = glob::glob(pattern)
        .map_err(|error| TraceError::Inputs(format!("{pattern} is no pattern: {error}")))?;
    let shards: Vec<PathBuf> = paths.flatten().filter(|path| is_shard(path)).collect();
    if shards.is_empty() {
        let text = format!("{pattern} matches no .jsonl or .jsonl.gz file");
        return Err(TraceError::Inputs(text));
    }
    Ok(shards)
}

/// A plain file beside its own compressed copy would count every request twice.
fn twice(shards: &BTreeSet<PathBuf>) -> Result<(), TraceError> {
    for shard in shards {
        let mut zipped = shard.clone().into_os_string();
        zipped.push(".gz");
        let zipped = PathBuf::from(zipped);
        if shards.contains(&zipped) {
            let (plain, zipped) = (shard.display(), zipped.display());
            let text = format!("{plain} and {zipped} are the same shard; remove one of them");
            return Err(TraceError::Inputs(text));
        }
    }
    Ok(())
}

/// Opens a shard; gzip by its ending.
pub(super) fn open(shard: &Path) -> io::Result<Box<dyn BufRead>> {
    let file = BufReader::with_capacity(1 << 16, File::open(shard)?);
    Ok(
        match shard.extension().is_some_and(|ending| ending == "gz") {
            true => Box::new(BufReader::with_capacity(1 << 16, MultiGzDecoder::new(file))),
            false => Box::new(file),
        },
    )
}
