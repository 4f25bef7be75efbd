//! One lane: frames that go out together, and frames as they come in.

use std::cell::Cell;
use std::ops::Range;
use std::time::Duration;

use corelane_codec::quic_frame::{Kind, PAYLOAD_BYTES_MAX, decode};
use corelane_codec::{Bad, Decoded};
use quinn::{ReadError, RecvStream, SendStream, TransportConfig, VarInt, WriteError};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

/// Frames that leave together at most.
const BATCH_FRAMES: usize = 512;
/// Bytes that one read takes at most.
const CHUNK_BYTES: usize = 64 * 1024;
/// A buffer larger than this is given back once it is empty.
const KEPT_BYTES_MAX: usize = 1 << 20;
/// Both sides ping this often, so that an idle connection is not taken for a dead one.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// The code with which a bundle is closed that is broken.
pub(super) const BROKEN: VarInt = VarInt::from_u32(1);

/// What connections of both sides have in common. Who was not heard for 30 s is dead, as in Dynamo.
pub(super) fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    transport
}

/// A peer that takes nothing of a lane for so long does not read: both Dynamo's sides always do.
const STALLED_MAX: Duration = Duration::from_secs(60);

/// Why a lane takes nothing more.
#[derive(Debug, Error)]
pub(super) enum SendError {
    #[error(transparent)]
    Lost(#[from] WriteError),
    #[error("the peer has not read a lane for {STALLED_MAX:?}")]
    Stalled,
}

/// Writes the frames of one lane, those together that wait together, or that come within `batch`.
/// Ends when nobody has more. `busy` counts those who have frames in their hands.
pub(super) async fn send(
    to: &mut SendStream,
    frames: &mut mpsc::Receiver<Vec<u8>>,
    batch: Duration,
    busy: &Cell<usize>,
) -> Result<(), SendError> {
    while let Some(mut bytes) = frames.recv().await {
        busy.set(busy.get() + 1);
        let until = Instant::now() + batch;
        for _ in 1..BATCH_FRAMES {
            let next = match frames.try_recv() {
                Ok(next) => Some(next),
                Err(_) if batch.is_zero() => None,
                Err(_) => timeout_at(until, frames.recv()).await.ok().flatten(),
            };
            let Some(next) = next else { break };
            bytes.extend_from_slice(&next);
        }
        let written = timeout(STALLED_MAX, to.write_all(&bytes)).await;
        busy.set(busy.get() - 1);
        written.map_err(|_| SendError::Stalled)??;
    }
    Ok(())
}

/// Why a lane brings nothing more.
#[derive(Debug, Error)]
pub(super) enum LaneError {
    #[error("the peer has ended a lane")]
    Ended,
    #[error(transparent)]
    Lost(#[from] ReadError),
    #[error("{0}")]
    Bad(Bad),
    #[error("the peer sent a {0:?}, which only its other side sends")]
    Astray(Kind),
}

/// A frame; its payload is in the lane until the next one is asked for.
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) id: [u8; 16],
    payload: Range<usize>,
}

/// Frames as they come in.
pub(super) struct Lane {
    from: RecvStream,
    bytes: Vec<u8>,
    taken: usize,
}

impl Lane {
    pub(super) fn new(from: RecvStream) -> Lane {
        Lane {
            from,
            bytes: Vec::new(),
            taken: 0,
        }
    }

    /// The next frame. Nothing is lost when this is dropped before it is ready.
    pub(super) async fn next(&mut self) -> Result<Frame, LaneError> {
        loop {
            match decode(&self.bytes[self.taken..], PAYLOAD_BYTES_MAX) {
                Decoded::Frame(frame) => {
                    let payload = self.taken + frame.payload.start..self.taken + frame.payload.end;
                    self.taken = payload.end;
                    let (kind, id) = (frame.kind, frame.id);
                    return Ok(Frame { kind, id, payload });
                }
                Decoded::Need(_) => {}
                Decoded::Bad(bad) => return Err(LaneError::Bad(bad)),
            }
            self.bytes.drain(..self.taken);
            self.taken = 0;
            if self.bytes.is_empty() && self.bytes.capacity() > KEPT_BYTES_MAX {
                self.bytes = Vec::new();
            }
            match self.from.read_chunk(CHUNK_BYTES, true).await? {
                Some(chunk) => self.bytes.extend_from_slice(&chunk.bytes),
                None => return Err(LaneError::Ended),
            }
        }
    }

    pub(super) fn payload(&self, frame: &Frame) -> &[u8] {
        &self.bytes[frame.payload.clone()]
    }
}
