//! Reads a socket record by record, so that a handshake takes nothing of what follows it: that is
//! the kernel's to decrypt.
//!
//! ```text
//! socket --> [gate: the rest of one record] --> handshake     done: nothing more is read
//!                                                not done: one record more
//! ```

use std::cell::Cell;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Type, version, and the length of what follows.
const PREFIX_BYTES: usize = 5;
const CHUNK_BYTES: usize = 4096;

/// How far a [`Corked`] may be read.
#[derive(Default)]
pub(super) struct Gate {
    /// As far as one likes.
    open: Cell<bool>,
    /// Another record may be begun.
    permitted: Cell<bool>,
    /// Somebody wanted to begin one and was not permitted to.
    stopped: Cell<bool>,
    prefix: Cell<[u8; PREFIX_BYTES]>,
    /// Bytes of the prefix that were read.
    begun: Cell<usize>,
    /// Bytes after it that were not.
    left: Cell<usize>,
}

impl Gate {
    /// Ends all limits.
    pub(super) fn open(&self) {
        self.open.set(true);
    }

    /// Bytes that may be read now; 0: none until another record is permitted.
    fn limit(&self) -> usize {
        match (self.begun.get(), self.left.get()) {
            (0, _) if !self.permitted.get() => 0,
            (PREFIX_BYTES, left) => left,
            (begun, _) => PREFIX_BYTES - begun,
        }
    }

    fn has_read(&self, bytes: &[u8]) {
        let begun = self.begun.get();
        self.permitted.set(false);
        if begun < PREFIX_BYTES {
            let mut prefix = self.prefix.get();
            prefix[begun..begun + bytes.len()].copy_from_slice(bytes);
            self.prefix.set(prefix);
            self.begun.set(begun + bytes.len());
            self.left
                .set(u16::from_be_bytes([prefix[3], prefix[4]]).into());
        } else {
            self.left.set(self.left.get() - bytes.len());
        }
        if self.begun.get() == PREFIX_BYTES && self.left.get() == 0 {
            self.begun.set(0);
        }
    }
}

/// A socket behind a gate.
pub(super) struct Corked<S> {
    stream: S,
    gate: Rc<Gate>,
}

impl<S> Corked<S> {
    pub(super) fn new(stream: S, gate: Rc<Gate>) -> Corked<S> {
        Corked { stream, gate }
    }

    /// The socket. None: the gate stands within a record.
    pub(super) fn into_inner(self) -> Option<S> {
        (self.gate.begun.get() == 0).then_some(self.stream)
    }

    pub(super) fn get_ref(&self) -> &S {
        &self.stream
    }
}

/// Runs a handshake that reads through `gate`, without reading past its end.
pub(super) async fn exactly<F: Future>(gate: &Gate, handshake: F) -> F::Output {
    let mut handshake = pin!(handshake);
    std::future::poll_fn(|context| {
        loop {
            // The record that is under way may be the last.
            gate.permitted.set(gate.begun.get() == 0);
            gate.stopped.set(false);
            match handshake.as_mut().poll(context) {
                Poll::Pending if gate.stopped.get() => {}
                polled => return polled,
            }
        }
    })
    .await
}

impl<S: AsyncRead + Unpin> AsyncRead for Corked<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.gate.open.get() {
            return Pin::new(&mut this.stream).poll_read(context, into);
        }
        let limit = this.gate.limit().min(into.remaining()).min(CHUNK_BYTES);
        if limit == 0 {
            // Whoever drives the handshake asks again at once, if it is not over.
            this.gate.stopped.set(true);
            return Poll::Pending;
        }
        let mut chunk = [0; CHUNK_BYTES];
        let mut chunk = ReadBuf::new(&mut chunk[..limit]);
        ready!(Pin::new(&mut this.stream).poll_read(context, &mut chunk))?;
        if !chunk.filled().is_empty() {
            this.gate.has_read(chunk.filled());
        }
        into.put_slice(chunk.filled());
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Corked<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        spans: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, spans)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.build().unwrap();
        runtime.block_on(future)
    }

    /// Takes so many bytes and then, greedily, whatever it is given.
    struct Greedy {
        corked: Corked<tokio::io::DuplexStream>,
        wanted: usize,
        taken: Vec<u8>,
    }

    impl Future for Greedy {
        type Output = Vec<u8>;
        fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Vec<u8>> {
            let this = self.get_mut();
            loop {
                let mut chunk = [0; 64];
                let mut into = ReadBuf::new(&mut chunk);
                let read = Pin::new(&mut this.corked).poll_read(context, &mut into);
                if read.is_pending() {
                    break;
                }
                this.taken.extend(into.filled());
            }
            match this.taken.len() >= this.wanted {
                true => Poll::Ready(std::mem::take(&mut this.taken)),
                false => Poll::Pending,
            }
        }
    }

    #[test]
    fn a_greedy_reader_gets_whole_records_and_no_byte_more() {
        let first = b"\x16\x03\x01\x00\x03abc";
        let empty = b"\x14\x03\x03\x00\x00";
        let last = b"\x17\x03\x03\x00\x04last";
        let all = [&first[..], empty, last, b"\x17\x03\x03\x00\x02da"].concat();
        let wanted = first.len() + empty.len() + last.len();
        for piece in [1, 2, 7, all.len()] {
            run(async {
                let (mut peer, ours) = duplex(1024);
                let gate = Rc::new(Gate::default());
                let corked = Corked::new(ours, Rc::clone(&gate));
                let greedy = Greedy {
                    corked,
                    wanted,
                    taken: Vec::new(),
                };
                let send = async {
                    for piece in all.chunks(piece) {
                        peer.write_all(piece).await.unwrap();
                        tokio::task::yield_now().await;
                    }
                };
                let mut greedy = pin!(greedy);
                let (taken, ()) = tokio::join!(exactly(&gate, greedy.as_mut()), send);
                assert_eq!(taken, all[..wanted], "in pieces of {piece}");
                assert_eq!((gate.begun.get(), gate.limit()), (0, 0));
                gate.open();
                let mut rest = [0; 7];
                greedy.corked.read_exact(&mut rest).await.unwrap();
                assert_eq!(rest, all[wanted..]);
            });
        }
    }

    #[test]
    fn the_end_of_the_stream_is_passed_on() {
        run(async {
            let (peer, ours) = duplex(64);
            let gate = Rc::new(Gate::default());
            let mut corked = Corked::new(ours, Rc::clone(&gate));
            drop(peer);
            let mut byte = [0];
            let read = exactly(&gate, corked.read(&mut byte)).await;
            assert_eq!(read.unwrap(), 0);
            assert!(corked.into_inner().is_some());
        });
    }
}
