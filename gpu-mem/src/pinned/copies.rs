//! Copies between pinned memory and the GPU: a stream per worker, in order, each known to be done
//! by an event, so that nobody waits and no byte is used again too early.

use std::collections::VecDeque;
use std::sync::Arc;

use cudarc::driver::sys;
use thiserror::Error;

use super::Pinned;
use crate::cuda::{Context, CudaError, check};

/// Names one copy of a stream. Copies of a stream are done in the order of their tickets.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Ticket(u64);

/// Why a copy was not begun.
#[derive(Debug, Error)]
pub enum CopyError {
    /// The bytes do not lie in the pinned range.
    #[error("{bytes} bytes at {offset} do not lie in the {pinned_bytes} pinned bytes")]
    OutOfRange {
        /// Where they start.
        offset: usize,
        /// How many there are.
        bytes: usize,
        /// How many are pinned.
        pinned_bytes: usize,
    },
    /// As many copies as may be are under way.
    #[error("{COPIES_MAX} copies are under way; poll the stream until some are done")]
    StreamFull,
    /// The driver refused. A copy that failed on the device poisons the context: every later call
    /// fails too, and the process must start anew.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// What a copy still needs.
struct Flight {
    event: usize,
    _pinned: Arc<Pinned>,
}

/// One worker's copies, in order.
pub struct CopyStream {
    context: Arc<Context>,
    /// The driver's pointers, as numbers: any thread may use them.
    stream: usize,
    /// Under way, the oldest first: its ticket is `done`.
    flights: VecDeque<Flight>,
    spare_events: Vec<usize>,
    /// How many copies are done.
    done: u64,
}

/// A worker fills the GPU's queue long before; a bound for one that never polls.
const COPIES_MAX: usize = 1024;

impl CopyStream {
    pub(super) fn new(context: Arc<Context>) -> Result<CopyStream, CudaError> {
        let mut stream = std::ptr::null_mut();
        {
            let _inside = context.inside()?;
            // Not ordered with the default stream, on which engines work.
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            // SAFETY: the pointer is to a live value.
            let answer = unsafe { sys::cuStreamCreate(&raw mut stream, flags) };
            check("cuStreamCreate", answer)?;
        }
        Ok(CopyStream {
            context,
            stream: stream as usize,
            flights: VecDeque::new(),
            spare_events: Vec::new(),
            done: 0,
        })
    }

    /// Begins a copy to the GPU.
    ///
    /// # Safety
    /// `to` is `bytes` bytes of the GPU's memory that this process may write, and stays so; and
    /// the pinned bytes are left as they are, until the copy is done.
    ///
    /// # Errors
    /// The bytes do not lie in the range, too many copies are under way, or the driver refused.
    pub unsafe fn upload(
        &mut self,
        from: &Arc<Pinned>,
        offset: usize,
        bytes: usize,
        to: u64,
    ) -> Result<Ticket, CopyError> {
        let host = self.admit(from, offset, bytes)?;
        let context = Arc::clone(&self.context);
        let _inside = context.inside()?;
        // SAFETY: the host's bytes lie in a pinned range that the flight keeps; the caller vouches
        // for the device's.
        let answer = unsafe { sys::cuMemcpyHtoDAsync_v2(to, host.cast(), bytes, self.stream as _) };
        check("cuMemcpyHtoDAsync", answer)?;
        self.record(from)
    }

    /// Begins a copy from the GPU.
    ///
    /// # Safety
    /// `from` is `bytes` bytes of the GPU's memory that this process may read, and stays so; and
    /// nobody touches the pinned bytes, until the copy is done.
    ///
    /// # Errors
    /// The bytes do not lie in the range, too many copies are under way, or the driver refused.
    pub unsafe fn download(
        &mut self,
        from: u64,
        bytes: usize,
        to: &Arc<Pinned>,
        offset: usize,
    ) -> Result<Ticket, CopyError> {
        let host = self.admit(to, offset, bytes)?;
        let context = Arc::clone(&self.context);
        let _inside = context.inside()?;
        // SAFETY: as for an upload, the other way round.
        let answer =
            unsafe { sys::cuMemcpyDtoHAsync_v2(host.cast(), from, bytes, self.stream as _) };
        check("cuMemcpyDtoHAsync", answer)?;
        self.record(to)
    }

    fn admit(&self, pinned: &Pinned, offset: usize, bytes: usize) -> Result<*mut u8, CopyError> {
        if self.flights.len() >= COPIES_MAX {
            return Err(CopyError::StreamFull);
        }
        pinned.at(offset, bytes).ok_or(CopyError::OutOfRange {
            offset,
            bytes,
            pinned_bytes: pinned.bytes(),
        })
    }

    /// Puts an event behind the copy that was just begun.
    fn record(&mut self, pinned: &Arc<Pinned>) -> Result<Ticket, CopyError> {
        let event = self.event();
        let recorded = event.and_then(|event| {
            // SAFETY: both are the driver's and ours.
            let answer = unsafe { sys::cuEventRecord(event as _, self.stream as _) };
            check("cuEventRecord", answer).map(|()| event)
        });
        let event = match recorded {
            Ok(event) => event,
            Err(error) => {
                // The copy runs and nobody would know when it is done: wait for it here.
                // SAFETY: the stream is ours.
                unsafe { sys::cuStreamSynchronize(self.stream as _) };
                return Err(error.into());
            }
        };
        self.flights.push_back(Flight {
            event,
            _pinned: Arc::clone(pinned),
        });
        Ok(Ticket(self.done + self.flights.len() as u64 - 1))
    }

    fn event(&mut self) -> Result<usize, CudaError> {
        if let Some(event) = self.spare_events.pop() {
            return Ok(event);
        }
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the pointer is to a live value.
        let answer = unsafe { sys::cuEventCreate(&raw mut event, flags) };
        check("cuEventCreate", answer).map(|()| event as usize)
    }

    /// Looks which copies are done, without waiting, and lets go of what they needed.
    ///
    /// # Errors
    /// The driver reports that work failed.
    pub fn poll(&mut self) -> Result<(), CudaError> {
        if self.flights.is_empty() {
            return Ok(());
        }
        let context = Arc::clone(&self.context);
        let _inside = context.inside()?;
        while let Some(flight) = self.flights.front() {
            // SAFETY: the event is ours.
            let answer = unsafe { sys::cuEventQuery(flight.event as _) };
            if answer == sys::CUresult::CUDA_ERROR_NOT_READY {
                break;
            }
            check("cuEventQuery", answer)?;
            self.land();
        }
        Ok(())
    }

    fn land(&mut self) {
        if let Some(flight) = self.flights.pop_front() {
            self.done += 1;
            self.spare_events.push(flight.event);
        }
    }

    /// Whether a copy is done, as of the last [`CopyStream::poll`].
    pub fn is_done(&self, ticket: Ticket) -> bool {
        ticket.0 < self.done
    }

    /// How many copies are under way, as of the last [`CopyStream::poll`].
    pub fn under_way(&self) -> usize {
        self.flights.len()
    }

    /// Waits until all copies are done.
    ///
    /// # Errors
    /// The driver reports that work failed.
    pub fn finish(&mut self) -> Result<(), CudaError> {
        let context = Arc::clone(&self.context);
        let _inside = context.inside()?;
        // SAFETY: the stream is ours.
        let answer = unsafe { sys::cuStreamSynchronize(self.stream as _) };
        check("cuStreamSynchronize", answer)?;
        while !self.flights.is_empty() {
            self.land();
        }
        Ok(())
    }
}

impl Drop for CopyStream {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::error!(%error, "copies of a stream did not end well");
        }
        let Ok(_inside) = self.context.inside() else {
            return;
        };
        let flying = self.flights.drain(..).map(|flight| flight.event);
        // SAFETY: stream and events are ours; the stream's work is done, or the context is broken.
        unsafe {
            for event in flying.chain(self.spare_events.drain(..)) {
                sys::cuEventDestroy_v2(event as _);
            }
            sys::cuStreamDestroy_v2(self.stream as _);
        }
    }
}
