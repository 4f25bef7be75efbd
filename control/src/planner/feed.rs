//! Where a planner says its intervals: a Unix socket that takes lines of JSON and answers each.
//!
//! ```text
//! {"interval_s":180,"prefill":{"replicas":2,"gpus":1},...}\n   ->   {"ok":true}\n
//! nonsense\n                                                   ->   {"ok":false,"error":".."}\n
//! ```

use std::cell::RefCell;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet, spawn_local};
use tokio::time::timeout;

use super::metrics::{Applied, PlannerMetrics};
use super::update::Update;
use crate::config::Planner;

/// Planners at a time; one is the rule.
const CONNECTIONS_MAX: usize = 8;
/// Bytes of a line: thousands of engines fit.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Longest wait for a planner to take its answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// A listening socket and what was said there. Dropping it removes the socket.
pub struct Feed {
    metrics: Rc<RefCell<PlannerMetrics>>,
    path: PathBuf,
    accepting: AbortHandle,
}

impl Feed {
    /// Listens from now on; needs a `LocalSet`.
    ///
    /// # Errors
    /// The socket is taken or cannot be made.
    pub fn start(planner: &Planner) -> Result<Self> {
        let path = planner.socket.clone();
        let listener = listen(&path)
            .with_context(|| format!("cannot listen for a planner on {}", path.display()))?;
        let metrics = Rc::new(RefCell::new(PlannerMetrics::new(planner.names)));
        let accepting = spawn_local(accept(listener, Rc::clone(&metrics))).abort_handle();
        tracing::info!(socket = %path.display(), "planner: taking intervals");
        Ok(Self {
            metrics,
            path,
            accepting,
        })
    }

    /// Writes the metric families, without the mark of the end.
    pub fn write(&self, out: &mut String) {
        self.metrics.borrow().write(out);
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.accepting.abort();
        let _ = fs::remove_file(&self.path);
    }
}

/// Binds for the owner only; a socket that nobody answers on is replaced.
fn listen(path: &Path) -> Result<UnixListener> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => bail!("somebody listens there already"),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            if fs::symlink_metadata(path)?.file_type().is_socket() {
                fs::remove_file(path)?;
            }
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn accept(listener: UnixListener, metrics: Rc<RefCell<PlannerMetrics>>) {
    let own = rustix::process::geteuid().as_raw();
    let mut open = JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "planner: cannot accept");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        while open.try_join_next().is_some() {}
        let allowed = stream
            .peer_cred()
            .is_ok_and(|peer| [own, 0].contains(&peer.uid()));
        if !allowed || open.len() >= CONNECTIONS_MAX {
            tracing::warn!(allowed, "planner: a connection was turned away");
            continue;
        }
        let metrics = Rc::clone(&metrics);
        open.spawn_local(async move {
            if let Err(error) = serve(stream, &metrics).await {
                tracing::debug!(%error, "planner: connection lost");
            }
        });
    }
}

async fn serve(stream: UnixStream, metrics: &RefCell<PlannerMetrics>) -> io::Result<()> {
    let (reading, mut writing) = stream.into_split();
    let mut reading = BufReader::new(reading);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut bounded = (&mut reading).take(LINE_BYTES_MAX);
        if bounded.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        let whole = line.ends_with(b"\n");
        let answer = match whole || (line.len() as u64) < LINE_BYTES_MAX {
            true => take(&line, metrics),
            false => Err(format!("a line has more than {LINE_BYTES_MAX} bytes")),
        };
        let answer = match answer {
            Ok(Applied::Whole) => json!({"ok": true}),
            Ok(Applied::Skipped) => json!({"ok": true, "skipped": true}),
            Err(error) => {
                tracing::warn!(error, "planner: a line was refused");
                json!({"ok": false, "error": error})
            }
        };
        let answer = format!("{answer}\n");
        timeout(ANSWER_MAX, writing.write_all(answer.as_bytes())).await??;
        if !whole {
            return Ok(());
        }
    }
}

fn take(line: &[u8], metrics: &RefCell<PlannerMetrics>) -> Result<Applied, String> {
    let mut metrics = metrics.borrow_mut();
    let update = serde_json::from_slice::<Update>(line).map_err(|error| {
        metrics.refuse();
        error.to_string()
    })?;
    metrics.apply(&update).map_err(str::to_owned)
}

#[cfg(test)]
mod tests {
    use tokio::task::LocalSet;

    use super::*;
    use crate::config::PlannerNames;

    #[tokio::test(flavor = "current_thread")]
    async fn lines_are_answered_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let planner = Planner {
            socket: dir.path().join("planner.sock"),
            names: PlannerNames::Both,
        };
        let test = async {
            let feed = Feed::start(&planner).unwrap();
            assert!(Feed::start(&planner).is_err(), "one at a time");
            let stream = UnixStream::connect(&planner.socket).await.unwrap();
            let (reading, mut writing) = stream.into_split();
            let mut reading = BufReader::new(reading).lines();
            let said = [
                (
                    r#"{"interval_s":60,"decode":{"replicas":3,"gpus":2}}"#,
                    r#"{"ok":true}"#,
                ),
                (
                    r#"{"interval_s":60,"observed":{}}"#,
                    r#"{"ok":true,"skipped":true}"#,
                ),
                (r#"{"interval_s":0}"#, "interval_s must be more than 0"),
                ("nonsense", "expected"),
            ];
            for (line, answer) in said {
                writing
                    .write_all(format!("{line}\n").as_bytes())
                    .await
                    .unwrap();
                let heard = reading.next_line().await.unwrap().unwrap();
                assert!(heard.contains(answer), "{line}: {heard}");
            }
            let mut text = String::new();
            feed.write(&mut text);
            assert!(text.contains("planner:num_d_workers 3.0\n"), "{text}");
            assert!(
                text.contains("corelane_planner_refused_total 2\n"),
                "{text}"
            );
            drop(feed);
            assert!(!planner.socket.exists());
        };
        LocalSet::new().run_until(test).await;
    }
}
