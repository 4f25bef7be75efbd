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

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use corelane_codec::Decoded;
use corelane_codec::call_home::{KILL_FRAME, Prologue, SENTINEL, STOP_FRAME};
use corelane_codec::limits::TWO_PART_PREFIX_BYTES;
use corelane_codec::quic_frame::{Kind, PAYLOAD_BYTES_MAX, PREFIX_BYTES, write};
use corelane_codec::two_part::{self, Shape};
use corelane_engine::quic::QuicCaller;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::TYPED_ERROR;
use super::bundle::{Back, Bundle, BundleError};

/// How long a caller may take to answer Register.
const REGISTER_MAX: Duration = Duration::from_secs(10);
/// Bytes that one read takes at most.
const CHUNK_BYTES: usize = 16 * 1024;
/// The longest message: one whose body is the longest payload.
const MESSAGE_BYTES_MAX: u64 = PAYLOAD_BYTES_MAX + TWO_PART_PREFIX_BYTES as u64;

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
        frames: Frames::new(),
    };
    let outcome = response.run().await;
    bundle.forget(&id);
    let Response { pair, frames, .. } = response;
    if frames.stage != Stage::Over
        && let Ok(room) = bundle.room(caller.lane, Kind::Reset).await
    {
        bundle.stats().resets_sent.add();
        let mut reset = Vec::new();
        write(Kind::Reset, &id, b"", &mut reset);
        room.send(reset);
    }
    if outcome.is_err() {
        give_up(pair).await;
    }
    outcome
}

struct Response<'a> {
    bundle: &'a Bundle,
    id: [u8; 16],
    lane: usize,
    back: mpsc::Receiver<Back>,
    pair: UnixStream,
    frames: Frames,
}

impl Response<'_> {
    async fn run(&mut self) -> Result<(), BundleError> {
        self.frames.push(Kind::Register, b"");
        self.flush().await?;
        match timeout(REGISTER_MAX, self.back.recv()).await {
            Ok(Some(Back::Registered)) => {}
            Ok(Some(_)) => {
                self.bundle.stats().refused.add();
                self.frames.stage = Stage::Over;
                return Err(BundleError::Unknown);
            }
            Ok(None) => return Err(BundleError::Closed),
            Err(_) => return Err(BundleError::Slow),
        }
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let next = self.frames.next_kind();
            if next.is_none() && self.frames.stage == Stage::Over {
                return Ok(());
            }
            // While the lane is full nothing is read, and so the handler waits.
            tokio::select! {
                back = self.back.recv() => match back {
                    Some(Back::Stop) => self.tell(&STOP_FRAME).await,
                    Some(Back::Kill) => self.tell(&KILL_FRAME).await,
                    Some(Back::Registered) => {}
                    Some(Back::Reset) => {
                        self.bundle.stats().resets_received.add();
                        self.frames.stage = Stage::Over;
                        self.tell(&KILL_FRAME).await;
                        return Ok(());
                    }
                    None => return Err(BundleError::Closed),
                },
                room = self.bundle.room(self.lane, next.unwrap_or(Kind::Reset)),
                    if next.is_some() => self.frames.leave(room?, &self.id),
                read = self.pair.read(&mut chunk), if next.is_none() => match read {
                    Ok(read @ 1..) => self.frames.take(&chunk[..read])?,
                    // Cut off by its handler, stopped, or killed.
                    Ok(0) | Err(_) => return Ok(()),
                },
            }
        }
    }

    /// Sends the frames that wait.
    async fn flush(&mut self) -> Result<(), BundleError> {
        while let Some(kind) = self.frames.next_kind() {
            let room = self.bundle.room(self.lane, kind).await?;
            self.frames.leave(room, &self.id);
        }
        Ok(())
    }

    async fn tell(&mut self, message: &[u8]) {
        // A shard that has closed knows already.
        let _ = self.pair.write_all(message).await;
    }
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

/// Messages as they come, and the frames that are made of them.
struct Frames {
    stage: Stage,
    bytes: Vec<u8>,
    ready: VecDeque<(Kind, Vec<u8>)>,
}

impl Frames {
    fn new() -> Frames {
        Frames {
            stage: Stage::Handshake,
            bytes: Vec::new(),
            ready: VecDeque::new(),
        }
    }

    fn push(&mut self, kind: Kind, payload: &[u8]) {
        self.ready.push_back((kind, payload.to_vec()));
    }

    /// The kind of the frame that is to leave next.
    fn next_kind(&self) -> Option<Kind> {
        self.ready.front().map(|(kind, _)| *kind)
    }

    /// It leaves.
    fn leave(&mut self, room: mpsc::Permit<'_, Vec<u8>>, id: &[u8; 16]) {
        if let Some((kind, payload)) = self.ready.pop_front() {
            let mut frame = Vec::with_capacity(PREFIX_BYTES + payload.len());
            write(kind, id, &payload, &mut frame);
            room.send(frame);
        }
    }

    /// Takes more bytes, and makes frames of the whole messages.
    fn take(&mut self, more: &[u8]) -> Result<(), BundleError> {
        self.bytes.extend_from_slice(more);
        let bytes = std::mem::take(&mut self.bytes);
        let mut taken = 0;
        while self.stage != Stage::Over {
            let rest = &bytes[taken..];
            let message = match two_part::decode(rest, Some(MESSAGE_BYTES_MAX)) {
                Decoded::Frame(message) => message,
                Decoded::Need(_) => break,
                Decoded::Bad(_) => return Err(BundleError::Response("an item over 32 MiB")),
            };
            let (header, body) = (&rest[message.header.clone()], &rest[message.body.clone()]);
            if body.len() as u64 > PAYLOAD_BYTES_MAX {
                return Err(BundleError::Response("an item over 32 MiB"));
            }
            match (message.shape(), self.stage) {
                (Shape::Empty, _) => {}
                (Shape::Header, Stage::Handshake) => self.stage = Stage::Prologue,
                (Shape::Header, _) if header == SENTINEL => self.end(),
                (Shape::Header, Stage::Prologue) => self.begin(header)?,
                (Shape::Data, Stage::FirstItem) => {
                    self.push(Kind::FirstData, body);
                    self.stage = Stage::Items;
                }
                (Shape::Data, Stage::Items) => self.push(Kind::Data, body),
                _ => return Err(BundleError::Response("a message out of turn")),
            }
            taken += message.frame_bytes();
        }
        self.bytes = bytes;
        self.bytes.drain(..taken);
        Ok(())
    }

    /// The prologue.
    fn begin(&mut self, header: &[u8]) -> Result<(), BundleError> {
        let bad = |_| BundleError::Response("a prologue that is none");
        let prologue = Prologue::decode(header).map_err(bad)?;
        let Some(text) = prologue.error else {
            self.stage = Stage::FirstItem;
            self.push(Kind::Prologue, b"");
            return Ok(());
        };
        let text = text.to_cow();
        let typed = prologue.typed_error.map(typed_error(&text));
        self.push(Kind::Error, typed.as_deref().unwrap_or(text.as_bytes()));
        self.stage = Stage::Refused;
        Ok(())
    }

    /// The sentinel.
    fn end(&mut self) {
        match self.stage {
            Stage::FirstItem => {
                self.push(Kind::PriorityEnd, b"");
                self.push(Kind::End, b"");
            }
            Stage::Items => self.push(Kind::End, b""),
            _ => {}
        }
        self.stage = Stage::Over;
    }
}

/// The JSON form of an error with its type.
fn typed_error(text: &str) -> impl FnOnce(&[u8]) -> Vec<u8> {
    let mut json = format!(r#"{{"kind":"{TYPED_ERROR}","error":"#).into_bytes();
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
    use corelane_codec::call_home::{
        FINAL_MARKER_JSON_FRAME, PROLOGUE_OK_FRAME, SENTINEL_FRAME, write_handshake,
        write_prologue_error,
    };
    use corelane_codec::control_message::StreamType;

    use super::*;

    #[test]
    fn typed_errors_have_the_form_that_callers_know() {
        let json = typed_error("Generate Error: \"bad\"")(br#"{"class":"Internal"}"#);
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["kind"], "dynamo.quic.typed_error");
        assert_eq!(json["error"], "Generate Error: \"bad\"");
        assert_eq!(json["typed_error"]["class"], "Internal");
    }

    fn kinds(frames: &mut Frames) -> Vec<Kind> {
        frames.ready.drain(..).map(|(kind, _)| kind).collect()
    }

    #[test]
    fn messages_become_frames_however_they_are_cut() {
        let mut bytes = Vec::new();
        write_handshake("s", StreamType::Response, &mut bytes);
        bytes.extend_from_slice(&PROLOGUE_OK_FRAME);
        for _ in 0..2 {
            bytes.extend_from_slice(&FINAL_MARKER_JSON_FRAME);
        }
        bytes.extend_from_slice(&SENTINEL_FRAME);
        for size in [1, 7, bytes.len()] {
            let mut frames = Frames::new();
            for chunk in bytes.chunks(size) {
                frames.take(chunk).unwrap();
            }
            let want = [Kind::Prologue, Kind::FirstData, Kind::Data, Kind::End];
            assert_eq!(kinds(&mut frames), want);
            assert_eq!(frames.stage, Stage::Over);
        }
    }

    #[test]
    fn no_items_and_no_stream_are_told_apart() {
        let mut none = Frames::new();
        let mut bytes = Vec::new();
        write_handshake("s", StreamType::Response, &mut bytes);
        let handshake = bytes.len();
        bytes.extend_from_slice(&PROLOGUE_OK_FRAME);
        bytes.extend_from_slice(&SENTINEL_FRAME);
        none.take(&bytes).unwrap();
        let want = [Kind::Prologue, Kind::PriorityEnd, Kind::End];
        assert_eq!(kinds(&mut none), want);
        let mut refused = Frames::new();
        bytes.truncate(handshake);
        write_prologue_error("no", None, &mut bytes);
        bytes.extend_from_slice(&SENTINEL_FRAME);
        refused.take(&bytes).unwrap();
        assert_eq!(kinds(&mut refused), [Kind::Error]);
        let mut early = Frames::new();
        assert!(early.take(&FINAL_MARKER_JSON_FRAME).is_err());
    }
}
