//! The queue of a session whose frames leave in boxes: what departs is sealed into a block of its
//! own, so that what waits is still shared with all others, and may still be dropped.

use corelane_codec::Decoded;
use corelane_codec::curve::{CurveFault, Seal};
use corelane_codec::zmtp;

use super::{Bounds, Queue, Run, SEND_BYTES, SPANS_MAX};
use crate::events::memory::{Memory, Slice};

impl Queue {
    /// What is queued from now on leaves in boxes; what is there leaves as it is.
    pub(in crate::events) fn begin_to_seal(&mut self) {
        self.flight.extend(self.runs.drain(..));
        self.boxed_control = match self.flight.is_empty() {
            true => 0,
            false => self.control_bytes,
        };
    }

    /// Seals runs, up to what one send takes, and moves them into the flight. A quarter of the
    /// bounds at most, as without boxes.
    pub(in crate::events) fn seal(
        &mut self,
        memory: &mut Memory,
        seal: &mut Seal,
        bounds: Bounds,
    ) -> Result<(), CurveFault> {
        let bytes_max = SEND_BYTES.min(bounds.bytes / 4);
        let messages_max = bounds.messages / 4;
        let mut flown = 0;
        let mut batch = Batch::default();
        for run in &self.flight {
            flown += run.slice.bytes();
            batch.before += run.messages as usize;
        }
        while self.flight.len() < SPANS_MAX
            && let Some(run) = self.runs.front()
        {
            let messages = batch.before + (batch.messages + run.messages) as usize;
            let fits = flown + batch.out.len() + run.slice.bytes() <= bytes_max
                && messages <= messages_max;
            if !fits && (flown > 0 || !batch.out.is_empty()) {
                break;
            }
            self.seal_front(memory, seal, &mut batch)?;
        }
        if batch.out.is_empty() {
            return Ok(());
        }
        let end = batch.out.len() as u32;
        self.bytes += batch.out.len();
        let block = memory.block(batch.out);
        let (start, messages, open) = (0, batch.messages, false);
        let slice = Slice { block, start, end };
        self.flight.push_back(Run {
            slice,
            messages,
            open,
        });
        Ok(())
    }

    /// Seals the first run, or all runs of the message that begins with it.
    fn seal_front(
        &mut self,
        memory: &mut Memory,
        seal: &mut Seal,
        batch: &mut Batch,
    ) -> Result<(), CurveFault> {
        batch.joined.clear();
        while let Some(run) = self.runs.pop_front() {
            let (slice, bytes) = (run.slice, run.slice.bytes());
            self.bytes -= bytes;
            batch.messages += run.messages;
            let is_piece = run.open || !batch.joined.is_empty();
            if run.messages == 0 && !is_piece {
                self.boxed_control += bytes;
            }
            let sealed = if is_piece {
                // Its frames may be cut anywhere.
                batch.joined.extend_from_slice(memory.bytes(slice));
                match run.open {
                    true => Ok(()),
                    false => seal_frames(seal, &batch.joined, &mut batch.out),
                }
            } else {
                seal_frames(seal, memory.bytes(slice), &mut batch.out)
            };
            memory.release(slice.block);
            sealed?;
            if !run.open {
                break;
            }
        }
        Ok(())
    }
}

/// What is being sealed for one send.
#[derive(Default)]
struct Batch {
    out: Vec<u8>,
    messages: u32,
    /// Messages that are in the flight already.
    before: usize,
    joined: Vec<u8>,
}

/// Seals whole frames that follow each other.
fn seal_frames(seal: &mut Seal, mut frames: &[u8], out: &mut Vec<u8>) -> Result<(), CurveFault> {
    while !frames.is_empty() {
        // They were looked at when they came, or are our own.
        let unexpected = CurveFault::Unexpected("MESSAGE");
        let Decoded::Frame(head) = zmtp::decode_head(frames, usize::MAX) else {
            return Err(unexpected);
        };
        let (frame, rest) = frames
            .split_at_checked(head.frame_bytes())
            .ok_or(unexpected)?;
        seal.seal(&head, &frame[head.head_bytes..], out)?;
        frames = rest;
    }
    Ok(())
}
