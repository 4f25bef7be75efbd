//! One response: what the shard writes as call-home messages leaves as frames, and what the caller
//! says comes back as messages.
//!
//! ```text
//! handshake            -> Register, and wait for Registered
//! prologue             -> Prologue | Error
//! item, item...        -> FirstData, Data...      the final marker is an item like others
//! sentinel             -> (PriorityEnd without items), End
//! end without sentinel -> Reset
//! stop, kill           <- Stop | Kill, Reset
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use corelane_codec::Decoded;
use corelane_codec::call_home::{KILL_FRAME, Prologue, SENTINEL, STOP_FRAME};
use corelane_codec::quic_frame::{Kind, PAYLOAD_BYTES_MAX};
use corelane_codec::two_part::{self, Shape};
use corelane_engine::quic::QuicCaller;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::bundle::{Back, Bundle, BundleError};

/// How long a caller may take to answer Register.
const REGISTER_MAX: Duration = Duration::from_secs(10);
/// Bytes that one read takes at most.
const CHUNK_BYTES: usize = 16 * 1024;

/// The end of a pair that a shard has handed out.
pub(super) fn pair(socket: OwnedFd) -> io::Result<UnixStream> {
    let socket = StdUnixStream::from(socket);
    socket.set_nonblocking(true)?;
    UnixStream::from_std(socket)
}

/// Tells the shard that nobody takes the response.
pub(super) async fn give_up(mut pair: UnixStream) {
    // The shard may have closed already.
    let _ = pair.write_all(&KILL_FRAME).await;
}

/// Carries a response to its end.
pub(super) async fn carry(
    bundle: &Bundle,
    caller: &QuicCaller,
    pair: UnixStream,
) -> Result<(), BundleError> {
    let id = caller.registration_id;
    let mut response = Response {
        bundle,
        id,
        lane: caller.lane,
        back: bundle.listen(id),
        pair,
        stage: Stage::Handshake,
    };
    let outcome = response.run().await;
    bundle.forget(&id);
    let Response { pair, stage, .. } = response;
    if stage != Stage::Over {
        let _ = bundle.say(caller.lane, Kind::Reset, &id, b"").await;
    }
    if outcome.is_err() {
        give_up(pair).await;
    }
    outcome
}

/// What comes next from the shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Handshake,
    Prologue,
    FirstItem,
    Items,
    /// An error was told: only the sentinel is left, which says nothing more.
    Refused,
    Over,
}

struct Response<'a> {
    bundle: &'a Bundle,
    id: [u8; 16],
    lane: usize,
    back: mpsc::Receiver<Back>,
    pair: UnixStream,
    stage: Stage,
}

impl Response<'_> {
    async fn run(&mut self) -> Result<(), BundleError> {
        self.say(Kind::Register, b"").await?;
        match timeout(REGISTER_MAX, self.back.recv()).await {
            Ok(Some(Back::Registered)) => {}
            Ok(Some(_)) => {
                self.stage = Stage::Over;
                return Err(BundleError::Unknown);
            }
            Ok(None) => return Err(BundleError::Closed),
            Err(_) => return Err(BundleError::Slow),
        }
        let mut bytes = Vec::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            tokio::select! {
                back = self.back.recv() => match back {
                    Some(Back::Stop) => self.tell(&STOP_FRAME).await,
                    Some(Back::Kill) => self.tell(&KILL_FRAME).await,
                    Some(Back::Registered) => {}
                    Some(Back::Reset) => {
                        self.stage = Stage::Over;
                        self.tell(&KILL_FRAME).await;
                        return Ok(());
                    }
                    None => return Err(BundleError::Closed),
                },
                read = self.pair.read(&mut chunk) => match read {
                    Ok(read @ 1..) => {
                        bytes.extend_from_slice(&chunk[..read]);
                        self.take(&mut bytes).await?;
                        if self.stage == Stage::Over {
                            return Ok(());
                        }
                    }
                    // Cut off by its handler, stopped, or killed.
                    Ok(0) | Err(_) => return Ok(()),
                },
            }
        }
    }

    async fn say(&self, kind: Kind, payload: &[u8]) -> Result<(), BundleError> {
        self.bundle.say(self.lane, kind, &self.id, payload).await
    }

    async fn tell(&mut self, message: &[u8]) {
        // A shard that has closed knows already.
        let _ = self.pair.write_all(message).await;
    }

    /// Takes the whole messages off `bytes`.
    async fn take(&mut self, bytes: &mut Vec<u8>) -> Result<(), BundleError> {
        let mut taken = 0;
        while self.stage != Stage::Over {
            let rest = &bytes[taken..];
            let message = match two_part::decode(rest, Some(PAYLOAD_BYTES_MAX)) {
                Decoded::Frame(message) => message,
                Decoded::Need(_) => break,
                Decoded::Bad(_) => return Err(BundleError::Response("an item over 32 MiB")),
            };
            let (header, body) = (&rest[message.header.clone()], &rest[message.body.clone()]);
            match (message.shape(), self.stage) {
                (Shape::Empty, _) => {}
                (Shape::Header, Stage::Handshake) => self.stage = Stage::Prologue,
                (Shape::Header, _) if header == SENTINEL => self.end().await?,
                (Shape::Header, Stage::Prologue) => self.begin(header).await?,
                (Shape::Data, Stage::FirstItem) => {
                    self.say(Kind::FirstData, body).await?;
                    self.stage = Stage::Items;
                }
                (Shape::Data, Stage::Items) => self.say(Kind::Data, body).await?,
                _ => return Err(BundleError::Response("a message out of turn")),
            }
            taken += message.frame_bytes();
        }
        bytes.drain(..taken);
        Ok(())
    }

    /// The prologue.
    async fn begin(&mut self, header: &[u8]) -> Result<(), BundleError> {
        let bad = |_| BundleError::Response("a prologue that is none");
        let prologue = Prologue::decode(header).map_err(bad)?;
        let Some(text) = prologue.error else {
            self.stage = Stage::FirstItem;
            return self.say(Kind::Prologue, b"").await;
        };
        let text = text.to_cow();
        let typed = prologue.typed_error.map(typed_error(&text));
        self.say(Kind::Error, typed.as_deref().unwrap_or(text.as_bytes()))
            .await?;
        self.stage = Stage::Refused;
        Ok(())
    }

    /// The sentinel.
    async fn end(&mut self) -> Result<(), BundleError> {
        match self.stage {
            Stage::FirstItem => {
                self.say(Kind::PriorityEnd, b"").await?;
                self.say(Kind::End, b"").await?;
            }
            Stage::Items => self.say(Kind::End, b"").await?,
            _ => {}
        }
        self.stage = Stage::Over;
        Ok(())
    }
}

/// The JSON form of an error with its type.
fn typed_error(text: &str) -> impl FnOnce(&[u8]) -> Vec<u8> {
    let mut json = br#"{"kind":"dynamo.quic.typed_error","error":"#.to_vec();
    corelane_codec::json::write_string(text, &mut json);
    |typed| {
        json.extend_from_slice(b",\"typed_error\":");
        json.extend_from_slice(typed);
        json.push(b'}');
        json
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_errors_have_the_form_that_callers_know() {
        let json = typed_error("Generate Error: \"bad\"")(br#"{"class":"Internal"}"#);
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["kind"], "dynamo.quic.typed_error");
        assert_eq!(json["error"], "Generate Error: \"bad\"");
        assert_eq!(json["typed_error"]["class"], "Internal");
    }
}
