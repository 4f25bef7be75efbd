//! Carries the bytes of one connection between its TLS socket and the pair of sockets whose other
//! end a shard has.
//!
//! ```text
//! peer ==TLS== [decrypt] --> pair --> shard      the peer's end of stream is passed on; a reset
//!      ==TLS== [encrypt] <-- pair <-- shard      is told by its errno
//! ```
//!
//! A shard never closes only one direction, so its end of stream ends the connection once all that
//! it had sent is on its way.

use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::ReadHalf;
use tokio::time::timeout;

/// What one read takes at most: a record of TLS.
const CHUNK_BYTES: usize = 16 * 1024;
/// How long the last bytes and the farewell may take.
const FAREWELL_MAX: Duration = Duration::from_secs(10);

/// Runs until the connection is over. Answers the errno when the peer has reset it.
pub(super) async fn pump(tls: impl AsyncRead + AsyncWrite, mut pair: UnixStream) -> Option<i32> {
    let (from_peer, to_peer) = tokio::io::split(tls);
    let (from_shard, to_shard) = pair.split();
    let inward = inward(from_peer, to_shard);
    let outward = outward(from_shard, to_peer);
    tokio::pin!(inward, outward);
    let sent = tokio::select! {
        ended = &mut inward => match ended {
            Inward::Reset(errno) => return Some(errno),
            // What the shard still has to say goes on.
            Inward::PeerEnded | Inward::ShardClosed => outward.await,
        },
        sent = &mut outward => match sent {
            Ok(()) => Ok(()),
            // The connection is dead. What has arrived is passed on first.
            Err(errno) => {
                inward.await;
                Err(errno)
            }
        },
    };
    sent.err()
}

/// Why nothing comes in any more.
enum Inward {
    PeerEnded,
    ShardClosed,
    Reset(i32),
}

/// Decrypted bytes to the shard, until the peer's end of stream.
async fn inward(
    mut from_peer: impl AsyncRead + Unpin,
    mut to_shard: impl AsyncWrite + Unpin,
) -> Inward {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let read = match from_peer.read(&mut chunk).await {
            Ok(0) => break,
            Ok(read) => read,
            // Closed without TLS's own farewell: our units say themselves whether they are whole.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Inward::Reset(errno(&error)),
        };
        if to_shard.write_all(&chunk[..read]).await.is_err() {
            return Inward::ShardClosed;
        }
    }
    let _ = to_shard.shutdown().await;
    Inward::PeerEnded
}

/// The shard's bytes, encrypted, to the peer, until the shard closes. The errno of a peer that
/// takes no more: once the shard has closed, nobody else looks after one that stands still.
async fn outward(
    mut from_shard: ReadHalf<'_>,
    mut to_peer: impl AsyncWrite + Unpin,
) -> Result<(), i32> {
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(read @ 1..) = from_shard.read(&mut chunk).await {
        let sent = async {
            to_peer.write_all(&chunk[..read]).await?;
            to_peer.flush().await
        };
        tokio::pin!(sent);
        loop {
            match timeout(FAREWELL_MAX, &mut sent).await {
                Ok(sent) => break sent.map_err(|error| errno(&error))?,
                Err(_) if has_closed(from_shard.as_ref()) => {
                    return Err(Errno::TIMEDOUT.raw_os_error());
                }
                Err(_) => {}
            }
        }
    }
    let _ = timeout(FAREWELL_MAX, to_peer.shutdown()).await;
    Ok(())
}

/// Whether the shard has closed its end, although not all has been read that it wrote.
fn has_closed(pair: &UnixStream) -> bool {
    let mut polled = [PollFd::new(pair, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut polled, Some(&now)), Ok(1..))
}

fn errno(error: &io::Error) -> i32 {
    error
        .raw_os_error()
        .unwrap_or(Errno::CONNRESET.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(future)
    }

    #[test]
    fn a_closed_end_is_seen_before_all_is_read() {
        run(async {
            let (mut shard, pair) = UnixStream::pair().unwrap();
            shard.write_all(b"unread").await.unwrap();
            assert!(!has_closed(&pair));
            drop(shard);
            assert!(has_closed(&pair));
        });
    }

    #[test]
    fn what_the_shard_says_after_the_peers_end_still_leaves() {
        run(async {
            let (mut peer, tls) = duplex(64);
            let (mut shard, pair) = UnixStream::pair().unwrap();
            let pumped = async { pump(tls, pair).await };
            let talk = async {
                peer.write_all(b"request").await.unwrap();
                peer.shutdown().await.unwrap();
                let mut request = Vec::new();
                shard.read_to_end(&mut request).await.unwrap();
                assert_eq!(request, b"request");
                shard.write_all(b"the answer").await.unwrap();
                drop(shard);
                let mut answer = Vec::new();
                peer.read_to_end(&mut answer).await.unwrap();
                assert_eq!(answer, b"the answer");
            };
            assert_eq!(tokio::join!(pumped, talk).0, None);
        });
    }

    #[test]
    fn the_last_word_of_the_shard_leaves_although_it_reads_no_more() {
        run(async {
            let (peer, tls) = duplex(16);
            let (mut shard, pair) = UnixStream::pair().unwrap();
            let pumped = async { pump(tls, pair).await };
            let talk = async {
                shard.write_all(b"kill").await.unwrap();
                drop(shard);
                let (mut from, mut to) = tokio::io::split(peer);
                // More than all buffers hold: nobody takes it any more.
                let flood = async {
                    let _ = to.write_all(&[7; 4096]).await;
                };
                let mut word = [0; 4];
                let (read, ()) = tokio::join!(from.read_exact(&mut word), flood);
                read.map(|_| word)
            };
            let (ended, word) = tokio::join!(pumped, talk);
            assert_eq!((ended, &word.unwrap()), (None, b"kill"));
        });
    }

    #[test]
    fn a_reset_is_told_by_its_errno() {
        run(async {
            let reset = tokio_reset();
            let (shard, pair) = UnixStream::pair().unwrap();
            assert_eq!(pump(reset, pair).await, Some(104));
            drop(shard);
        });
    }

    /// A connection that was reset.
    fn tokio_reset() -> impl AsyncRead + AsyncWrite {
        struct Reset;
        impl AsyncRead for Reset {
            fn poll_read(
                self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
                _: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<io::Result<()>> {
                std::task::Poll::Ready(Err(io::Error::from_raw_os_error(104)))
            }
        }
        tokio::io::join(Reset, tokio::io::sink())
    }
}
