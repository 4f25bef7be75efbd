//! `corelane trace extract`: request traces become one line of load for each interval, as planners
//! warm their predictors up with (`spec/gpu-memory.md` §7.2).
//!
//! ```text
//! file | glob | folder -> shards -> lines -> record -> buckets -> [{"interval_start":0,...},..]
//! ```

mod buckets;
mod record;
mod shards;

use std::io::BufRead;
use std::path::Path;

use thiserror::Error;

pub use buckets::Interval;
pub use record::Format;

use buckets::Buckets;
use record::{Found, Request};

/// Bytes of a line: a request with all its block hashes fits.
const LINE_BYTES_MAX: u64 = 64 << 20;

/// What is to be extracted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Extract {
    /// Files, globs and folders.
    pub inputs: Vec<String>,
    /// Seconds of an interval, at least 1.
    pub interval_s: u32,
    /// How records are written; none means as the first one is.
    pub format: Option<Format>,
    /// Whether intervals without requests are left out, as the first generation did.
    pub sparse: bool,
}

/// Why there is nothing.
#[derive(Debug, Error)]
pub enum TraceError {
    /// Something is wrong with the inputs as such.
    #[error("{0}")]
    Inputs(String),
    /// A file cannot be read.
    #[error("{file}: {source}")]
    File {
        /// Which.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// A line is no record, or not one of this trace.
    #[error("{file}:{line}: {what}")]
    Line {
        /// In which file.
        file: String,
        /// Where, from 1.
        line: u64,
        /// What is wrong and what to do.
        what: String,
    },
}

/// Reads all shards and adds them up; intervals in order of time.
///
/// # Errors
/// See [`TraceError`]; a trace without a single request is an error too.
pub fn extract(wanted: &Extract) -> Result<Vec<Interval>, TraceError> {
    let shards = shards::find(&wanted.inputs)?;
    let mut format = wanted.format;
    let mut buckets = Buckets::new(wanted.interval_s);
    for shard in &shards {
        read(shard, &mut format, &mut buckets)?;
    }
    let intervals = buckets
        .intervals(wanted.sparse)
        .map_err(TraceError::Inputs)?;
    if intervals.is_empty() {
        let text = format!(
            "no requests in {} file(s); a trace has lines with timestamp, input_length and \
             output_length, or Dynamo's request_end events",
            shards.len()
        );
        return Err(TraceError::Inputs(text));
    }
    Ok(intervals)
}

fn read(
    shard: &Path,
    format: &mut Option<Format>,
    buckets: &mut Buckets,
) -> Result<(), TraceError> {
    let file = shard.display().to_string();
    let failed = |source| TraceError::File {
        file: file.clone(),
        source,
    };
    let mut lines = shards::open(shard).map_err(failed)?;
    let mut bytes = Vec::new();
    for line in 1_u64.. {
        let wrong = |what: String| TraceError::Line {
            file: file.clone(),
            line,
            what,
        };
        bytes.clear();
        let mut bounded = std::io::Read::take(&mut lines, LINE_BYTES_MAX);
        if bounded.read_until(b'\n', &mut bytes).map_err(failed)? == 0 {
            return Ok(());
        }
        if bytes.len() as u64 == LINE_BYTES_MAX && !bytes.ends_with(b"\n") {
            return Err(wrong(format!("is longer than {LINE_BYTES_MAX} bytes")));
        }
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        match record::read(&bytes, *format).map_err(wrong)? {
            Found::Other(seen) => *format = Some(seen),
            Found::Request(seen, request) => {
                *format = Some(seen);
                let Request {
                    time_ms,
                    input_tokens,
                    output_tokens,
                } = request;
                let rebased = seen == Format::Dynamo;
                buckets
                    .add(time_ms, input_tokens, output_tokens, rebased)
                    .map_err(wrong)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn wanted(input: impl AsRef<Path>) -> Extract {
        Extract {
            inputs: vec![input.as_ref().display().to_string()],
            interval_s: 10,
            format: None,
            sparse: false,
        }
    }

    fn write(path: &Path, text: &str) {
        std::fs::write(path, text).unwrap();
    }

    fn zip(path: &Path, text: &str) {
        let file = std::fs::File::create(path).unwrap();
        let mut writer = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        writer.write_all(text.as_bytes()).unwrap();
        writer.finish().unwrap();
    }

    fn interval(interval_start: i64, request_count: u64, avg_isl: f64, avg_osl: f64) -> Interval {
        Interval {
            interval_start,
            request_count,
            avg_isl,
            avg_osl,
        }
    }

    const MOONCAKE: &str = concat!(
        r#"{"timestamp": 12000, "input_length": 100, "output_length": 10, "hash_ids": [1, 2]}"#,
        "\n\n",
        r#"{"timestamp": 19999.5, "input_length": 300, "output_length": 20}"#,
        "\n",
        r#"{"timestamp": 40000, "input_length": 7, "output_length": 0}"#,
    );

    #[test]
    fn mooncake_keeps_its_times_and_gaps_are_zeros_or_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        write(&path, MOONCAKE);
        let full = [
            interval(10, 2, 200.0, 15.0),
            interval(20, 0, 0.0, 0.0),
            interval(30, 0, 0.0, 0.0),
            interval(40, 1, 7.0, 0.0),
        ];
        assert_eq!(extract(&wanted(&path)).unwrap(), full);
        let sparse = Extract {
            sparse: true,
            ..wanted(&path)
        };
        let kept = [full[0].clone(), full[3].clone()];
        assert_eq!(extract(&sparse).unwrap(), kept);
        let text = serde_json::to_string(&full[0]).unwrap();
        assert_eq!(
            text,
            r#"{"interval_start":10,"request_count":2,"avg_isl":200.0,"avg_osl":15.0}"#
        );
    }

    fn dynamo(received: Option<u64>, time: u64, kind: &str, input: u64, output: u64) -> String {
        let mut event = serde_json::json!({
            "schema": "dynamo.request.trace.v1", "event_type": kind, "event_time_unix_ms": time,
            "request": {"replay": {"input_length": input}, "output_tokens": output},
        });
        if let Some(received) = received {
            event["request"]["request_received_ms"] = received.into();
        }
        event.to_string()
    }

    #[test]
    fn dynamos_shards_are_rebased_and_other_events_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let base = 1_790_000_000_123;
        let first = [
            dynamo(None, base + 999_999, "request_start", 1, 1),
            dynamo(Some(base + 11_000), base + 99_999, "request_end", 40, 4),
        ];
        let wrapped = format!(
            "{{\"event\": {}}}\n",
            dynamo(None, base, "request_end", 20, 2)
        );
        write(&dir.path().join("x-0.jsonl"), &first.join("\n"));
        zip(&dir.path().join("x-1.jsonl.gz"), &wrapped);
        write(&dir.path().join("notes.txt"), "not a shard");
        let expected = [interval(0, 1, 20.0, 2.0), interval(10, 1, 40.0, 4.0)];
        assert_eq!(extract(&wanted(dir.path())).unwrap(), expected);
        let glob = dir.path().join("x-*");
        assert_eq!(extract(&wanted(glob)).unwrap(), expected);
    }

    #[test]
    fn faults_name_their_file_and_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.jsonl");
        let mooncake = r#"{"timestamp": 1, "input_length": 1, "output_length": 1}"#;
        let event = dynamo(None, 1, "request_end", 1, 1);
        for (lines, said) in [
            (vec![mooncake, "{"], ":2: is not JSON"),
            (vec!["[1]"], ":1: is no object"),
            (
                vec![mooncake, &event],
                ":2: is a dynamo record in a mooncake trace",
            ),
            (
                vec![&event, mooncake],
                ":2: is a mooncake record in a dynamo trace",
            ),
            (
                vec![r#"{"timestamp": 1, "input_length": 1}"#],
                ":1: output_length is missing",
            ),
            (
                vec![r#"{"timestamp": 1, "input_length": -1, "output_length": 1}"#],
                ":1: input_length is -1; it must be a whole number from 0",
            ),
            (
                vec![r#"{"timestamp": "x", "input_length": 1, "output_length": 1}"#],
                ":1: timestamp is \"x\"; it must be a number",
            ),
            (
                vec![r#"{"schema": "dynamo.request.trace.v9"}"#],
                "v9\"; only",
            ),
            (vec![r#"{"a": 1}"#], ":1: is neither"),
        ] {
            write(&path, &lines.join("\n"));
            let error = extract(&wanted(&path)).unwrap_err().to_string();
            assert!(error.contains(said), "{lines:?}: {error}");
            assert!(error.starts_with(&path.display().to_string()), "{error}");
        }
        write(&path, "\n \n");
        let empty = extract(&wanted(&path)).unwrap_err().to_string();
        assert!(empty.contains("no requests in 1 file(s)"), "{empty}");
        let far = r#"{"timestamp": 1e15, "input_length": 1, "output_length": 1}"#;
        write(&path, &[mooncake, far].join("\n"));
        let gap = extract(&wanted(&path)).unwrap_err().to_string();
        assert!(gap.contains("intervals"), "{gap}");
    }

    #[test]
    fn inputs_that_are_not_there_or_there_twice() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("a.jsonl"), MOONCAKE);
        zip(&dir.path().join("a.jsonl.gz"), MOONCAKE);
        let twice = extract(&wanted(dir.path())).unwrap_err().to_string();
        assert!(twice.contains("a.jsonl.gz are the same shard"), "{twice}");
        let named = dir.path().join("a.jsonl");
        assert!(
            extract(&wanted(&named)).is_ok(),
            "one of them by name is fine"
        );
        for (name, said) in [("b.jsonl", "there is no"), ("*.nope", "matches no")] {
            let error = extract(&wanted(dir.path().join(name)))
                .unwrap_err()
                .to_string();
            assert!(error.contains(said), "{error}");
        }
        let empty = tempfile::tempdir().unwrap();
        let error = extract(&wanted(empty.path())).unwrap_err().to_string();
        assert!(error.contains("no .jsonl or .jsonl.gz"), "{error}");
        std::fs::write(dir.path().join("bad.jsonl.gz"), "no gzip").unwrap();
        let error = extract(&wanted(dir.path().join("bad.jsonl.gz"))).unwrap_err();
        assert!(error.to_string().contains("bad.jsonl.gz: "), "{error}");
    }
}
