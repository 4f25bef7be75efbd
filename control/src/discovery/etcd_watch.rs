//! One watched prefix in etcd: list, follow from the next revision, list again after any gap
//! (`spec/events-discovery.md` §4.9).

use std::rc::Rc;
use std::time::Duration;

use etcd_client::{Client, GetOptions, GetResponse, KvClient, WatchOptions, WatchStream};
use tokio::time::{Instant, sleep, timeout};

use super::shared::Sink;
use super::watched::{Gap, KEYS_MAX, TOTAL_BYTES_MAX};
use super::{DiscoveryStats, Entry};
use crate::lease::{Backoff, jittered};

/// Keys in one answer; model cards can be large and an answer is decoded in one piece.
const PAGE_KEYS: i64 = 512;
/// Longest answer that is decoded, in bytes: a page of cards of 128 KiB each.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Pauses between attempts after the first: §4.9.
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_LONGEST: Duration = Duration::from_secs(5);
/// A watch that lived this long was a success: the next one starts without a pause.
const LIVED: Duration = Duration::from_secs(5);

/// Feeds `sink` until the task is ended.
pub(super) async fn follow(
    client: Client,
    prefix: String,
    rpc_timeout: Duration,
    sink: Rc<dyn Sink>,
    stats: Rc<DiscoveryStats>,
) {
    let mut backoff = Backoff::new(PAUSE_FIRST, PAUSE_LONGEST);
    loop {
        sleep(jittered(backoff.pause())).await;
        let began = Instant::now();
        let (gap, cause) =
            match list_then_watch(&client, &prefix, rpc_timeout, &*sink, &stats).await {
                Ok(compacted) => (Gap::Missed, compacted),
                Err(cause) => (Gap::Outage, cause),
            };
        if gap == Gap::Outage {
            stats.add(&stats.reconnects, 1);
        }
        tracing::debug!(prefix, cause, ?gap, "watch ended");
        sink.gap(gap, &cause);
        if began.elapsed() >= LIVED {
            backoff.reset();
        }
    }
}

/// `Ok` when the store, in service, told us that the revision is compacted; else the failure.
async fn list_then_watch(
    client: &Client,
    prefix: &str,
    rpc_timeout: Duration,
    sink: &dyn Sink,
    stats: &DiscoveryStats,
) -> Result<String, String> {
    let kv = client
        .kv_client()
        .max_decoding_message_size(ANSWER_BYTES_MAX);
    let (listed, revision) = list(kv, prefix, rpc_timeout).await?;
    let options = WatchOptions::new()
        .with_prefix()
        .with_fragment()
        .with_start_revision(revision + 1);
    let mut watches = client
        .watch_client()
        .max_decoding_message_size(ANSWER_BYTES_MAX);
    let opened = timeout(rpc_timeout, watches.watch(prefix, Some(options))).await;
    let mut stream = opened
        .map_err(|_| format!("no answer to the watch request within {rpc_timeout:?}"))?
        .map_err(|error| error.to_string())?;
    // Only now: a list without a watch behind it would be called fresh and not be.
    sink.snapshot(&listed);
    stats.add(&stats.resyncs, 1);
    drop(listed);
    deliver(&mut stream, sink).await
}

async fn deliver(stream: &mut WatchStream, sink: &dyn Sink) -> Result<String, String> {
    loop {
        // No deadline: silence is normal here; HTTP/2 pings find a dead connection.
        let answer = match stream.message().await {
            Ok(Some(answer)) => answer,
            Ok(None) => return Err("the watch stream ended".to_owned()),
            Err(error) => return Err(error.to_string()),
        };
        for event in answer.events() {
            let Some(kv) = event.kv() else { continue };
            let Ok(key) = std::str::from_utf8(kv.key()) else {
                continue;
            };
            // Deleted keys have version 0. The event's own type is not asked: the library
            // panics over a type that it does not know.
            if kv.version() == 0 {
                sink.delete(key);
            } else {
                sink.put(key, kv.value());
            }
        }
        if answer.compact_revision() > 0 {
            return Ok(format!(
                "compacted up to revision {}",
                answer.compact_revision()
            ));
        }
        if answer.canceled() {
            return Err(format!(
                "the store ended the watch: {}",
                answer.cancel_reason()
            ));
        }
    }
}

/// All keys under `prefix` at one revision, and that revision.
async fn list(
    mut kv: KvClient,
    prefix: &str,
    rpc_timeout: Duration,
) -> Result<(Vec<Entry>, i64), String> {
    let (mut start, end) = (prefix.as_bytes().to_vec(), prefix_end(prefix.as_bytes()));
    let mut entries = Vec::new();
    let (mut revision, mut bytes) = (0, 0);
    loop {
        let options = GetOptions::new()
            .with_range(end.clone())
            .with_limit(PAGE_KEYS)
            .with_revision(revision);
        let page = timeout(rpc_timeout, kv.get(start, Some(options)))
            .await
            .map_err(|_| format!("no answer to the list request within {rpc_timeout:?}"))?
            .map_err(|error| error.to_string())?;
        if revision == 0 {
            revision = page.header().map_or(0, |header| header.revision());
        }
        bytes += collect(&page, &mut entries);
        if bytes > TOTAL_BYTES_MAX {
            return Err(format!(
                "more than {TOTAL_BYTES_MAX} bytes lie under this prefix"
            ));
        }
        let last = page
            .kvs()
            .last()
            .filter(|_| page.more() && entries.len() < KEYS_MAX);
        match last {
            Some(last) => start = [last.key(), b"\0"].concat(),
            None => return Ok((entries, revision)),
        }
    }
}

/// Answers how many bytes of values there were.
fn collect(page: &GetResponse, entries: &mut Vec<Entry>) -> usize {
    for kv in page.kvs() {
        match std::str::from_utf8(kv.key()) {
            Ok(key) => entries.push(Entry {
                key: key.to_owned(),
                value: kv.value().to_vec(),
            }),
            Err(_) => tracing::debug!(key = ?kv.key(), "key is not UTF-8, skipped"),
        }
    }
    page.kvs().iter().map(|kv| kv.value().len()).sum()
}

/// The smallest key above all keys that begin with `prefix`; one zero byte means no end.
fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix_is_above_all_its_keys() {
        assert_eq!(prefix_end(b"v1/a/"), b"v1/a0");
        assert_eq!(prefix_end(b"a\xff\xff"), b"b");
        assert_eq!(prefix_end(b"\xff"), [0]);
    }
}
