//! Requests to instances that take them over NATS (spec/request-plane.md §8).
//!
//! ```text
//! shard --request frame, path = subject--> [listener on loopback] --message--> NATS --> worker
//!       <------------- reply frame ------                         <-- reply --
//! ```
//! For a shard such an instance is one more TCP instance, whose address is ours and whose path is
//! its subject: routing, failover and acknowledgement stay what they are. The worker brings its
//! response to the caller directly, over TCP, as always.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

use async_nats::client::{Request, RequestErrorKind};
use async_nats::{HeaderMap, HeaderName, HeaderValue};
use bytes::{Bytes, BytesMut};
use corelane_codec::error::DynamoError;
use corelane_codec::request_frame::{Prefix, check_size, decode_prefix};
use corelane_codec::{Decoded, limits, reply_frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::sleep;

use super::{Nats, home};

/// Requests of one connection that wait for their replies.
const WAITING_MAX: usize = 1024;
/// A header that names the path on TCP; NATS has none.
const PATH_HEADER: &str = "x-endpoint-path";
/// A worker says that it is there a moment before it listens (spec/request-plane.md §8), so the
/// first request may find nobody: it is sent once more after this.
const AGAIN_AFTER: Duration = Duration::from_millis(50);
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The listener. Ends when it is dropped.
pub struct Egress {
    address: SocketAddr,
    too_large: Rc<Cell<u64>>,
    task: JoinHandle<()>,
}

impl Egress {
    /// Begins to listen, on any free port of loopback. Must run inside a `LocalSet`.
    ///
    /// # Errors
    /// There is no port.
    pub async fn start(nats: &Nats) -> io::Result<Egress> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        tracing::info!(%address, "requests to instances on NATS pass here");
        let too_large = Rc::default();
        let way = Way {
            nats: nats.clone(),
            too_large: Rc::clone(&too_large),
        };
        let task = spawn_local(accept(listener, way));
        Ok(Egress {
            address,
            too_large,
            task,
        })
    }

    /// Requests that were larger than the server takes (`max_payload`).
    pub fn too_large(&self) -> u64 {
        self.too_large.get()
    }

    /// Where shards dial instances on NATS.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Egress {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Where requests go.
#[derive(Clone)]
struct Way {
    nats: Nats,
    too_large: Rc<Cell<u64>>,
}

async fn accept(listener: TcpListener, way: Way) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn_local(serve(stream, way.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "no connection for requests over NATS");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

/// Serves one connection: replies go back in the order of the requests, however NATS answers.
async fn serve(stream: TcpStream, way: Way) {
    // Replies are small and awaited.
    let _ = stream.set_nodelay(true);
    let (mut read, write) = stream.into_split();
    let (replies, waiting) = mpsc::channel(WAITING_MAX);
    let writer = spawn_local(reply(write, waiting));
    let mut input = BytesMut::new();
    loop {
        match next_frame(&mut input) {
            Ok(Some((prefix, frame))) => {
                let asked = spawn_local(ask(way.clone(), prefix, frame));
                if replies.send(asked).await.is_err() {
                    break;
                }
            }
            Ok(None) => match read.read_buf(&mut input).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            },
            Err(why) => {
                tracing::warn!(why, "a request over NATS that is none");
                break;
            }
        }
    }
    drop(replies);
    // What was asked is still answered.
    let _ = writer.await;
}

/// Takes one whole frame off the front of what has come.
fn next_frame(input: &mut BytesMut) -> Result<Option<(Prefix, Bytes)>, &'static str> {
    let prefix = match decode_prefix(input) {
        Decoded::Frame(prefix) => prefix,
        Decoded::Need(_) => return Ok(None),
        Decoded::Bad(_) => return Err("no request frame"),
    };
    if check_size(&prefix, limits::MESSAGE_BYTES_MAX_DEFAULT).is_err() {
        return Err("a frame that is too large");
    }
    let end = prefix.payload().end;
    if input.len() < end {
        input.reserve(end - input.len());
        return Ok(None);
    }
    Ok(Some((prefix, input.split_to(end).freeze())))
}

async fn reply(mut write: OwnedWriteHalf, mut waiting: mpsc::Receiver<JoinHandle<String>>) {
    while let Some(asked) = waiting.recv().await {
        // A task of ours that ended by a panic counts as unavailable.
        let text = asked
            .await
            .unwrap_or_else(|_| refusal("the request was given up"));
        let mut out = Vec::new();
        reply_frame::write(&[&text], &mut out);
        if write.write_all(&out).await.is_err() {
            return;
        }
    }
}

fn refusal(why: &str) -> String {
    format!("{} {why}", reply_frame::UNAVAILABLE_PREFIX)
}

/// Sends a request and waits for the worker's acknowledgement; the answer is the text of the
/// reply, empty if the request was accepted.
async fn ask(Way { nats, too_large }: Way, prefix: Prefix, frame: Bytes) -> String {
    let Ok(subject) = std::str::from_utf8(&frame[prefix.path.clone()]) else {
        return refusal("the subject is not UTF-8");
    };
    let payload = frame.slice(prefix.payload());
    let max_bytes = nats.message_bytes_max();
    if payload.len() > max_bytes {
        too_large.set(too_large.get() + 1);
        return refuse_size(subject, payload, max_bytes);
    }
    let headers = headers(&frame[prefix.headers.clone()]);
    let mut tries = 0;
    loop {
        tries += 1;
        let request = Request::new()
            .payload(payload.clone())
            .headers(headers.clone());
        let sent = nats.client().send_request(subject.to_owned(), request);
        let error = match sent.await {
            // Dynamo's workers acknowledge with nothing; other words are passed on.
            Ok(message) => return String::from_utf8_lossy(&message.payload).into_owned(),
            Err(error) => error,
        };
        match error.kind() {
            RequestErrorKind::NoResponders if tries == 1 => sleep(AGAIN_AFTER).await,
            RequestErrorKind::NoResponders => {
                return refusal(&format!("nobody listens to {subject} on NATS"));
            }
            RequestErrorKind::TimedOut => {
                let waited = nats.request_max();
                return refusal(&format!("no answer over NATS in {waited:?}"));
            }
            _ => return refusal(&format!("NATS: {error}")),
        }
    }
}

/// A request that NATS does not take: accepted, and its caller called home with the error that
/// Dynamo's own caller raises (spec/request-plane.md §8). Where he cannot be called, the refusal
/// is one that keeps no other request away from the instance.
fn refuse_size(subject: &str, payload: Bytes, max_bytes: usize) -> String {
    let bytes = payload.len();
    let why = format!("a request of {bytes} bytes; NATS takes {max_bytes} (max_payload)");
    tracing::warn!(subject, bytes, max_bytes, "a request is too large for NATS");
    if home::is_reached(&payload) {
        let error = DynamoError::invalid_argument(why);
        spawn_local(async move { home::tell(&payload, &error).await });
        return String::new();
    }
    format!("{} {why}", reply_frame::OVERLOADED_PREFIX)
}

/// The headers of a frame as those of a message. What NATS cannot carry is left out.
fn headers(map: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let members: BTreeMap<String, String> = serde_json::from_slice(map).unwrap_or_default();
    for (name, value) in members {
        if name == PATH_HEADER {
            continue;
        }
        if let (Ok(name), Ok(value)) = (HeaderName::from_str(&name), HeaderValue::from_str(&value))
        {
            headers.insert(name, value);
        }
    }
    headers
}

#[cfg(test)]
mod tests {
    use corelane_codec::request_frame::write_frame;

    use super::*;

    #[test]
    fn frames_are_taken_whole_and_in_order() {
        let mut bytes = Vec::new();
        write_frame(b"a.b-1", b"{}", b"first", &mut bytes).unwrap();
        write_frame(b"a.b-2", b"{}", b"", &mut bytes).unwrap();
        let mut input = BytesMut::new();
        let mut seen = Vec::new();
        for byte in bytes {
            input.extend_from_slice(&[byte]);
            if let Some((prefix, frame)) = next_frame(&mut input).unwrap() {
                seen.push((
                    frame.slice(prefix.path.clone()),
                    frame.slice(prefix.payload()),
                ));
            }
        }
        let want: [(&[u8], &[u8]); 2] = [(b"a.b-1", b"first"), (b"a.b-2", b"")];
        assert_eq!(seen.len(), 2);
        for ((subject, payload), want) in seen.iter().zip(want) {
            assert_eq!((&subject[..], &payload[..]), want);
        }
        // A frame that merely says that it is huge makes nobody set memory aside.
        let mut huge = BytesMut::from(&b"\0\x01a\0\x02{}\xff\xff\xff\xff"[..]);
        assert!(next_frame(&mut huge).is_err());
        assert!(huge.capacity() < 1 << 20);
    }

    #[test]
    fn headers_lose_the_path_and_what_cannot_be_said() {
        let map = br#"{"request-id":"r","x-endpoint-path":"p","bad\nname":"x","v":"a\r\nb"}"#;
        let found = headers(map);
        assert_eq!(found.get("request-id").map(HeaderValue::as_str), Some("r"));
        assert_eq!(found.len(), 1);
        assert!(headers(b"not json").is_empty());
    }
}
