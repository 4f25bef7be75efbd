//! Connections to our own shards: request frames out, replies back in order.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::rc::Rc;

use corelane_codec::{Decoded, reply_frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_local;

/// Frames that wait in front of one connection.
const WAITING_MAX: usize = 256;
/// Longest reply that is read.
const REPLY_BYTES_MAX: u64 = 64 * 1024;

/// One frame, and who waits for its reply.
struct Job {
    frame: Vec<u8>,
    reply: oneshot::Sender<Vec<u8>>,
}

/// A few connections to one address. Clones share them; they end with the last clone.
#[derive(Clone)]
pub(super) struct Shards {
    lanes: Rc<Vec<mpsc::Sender<Job>>>,
    turn: Rc<std::cell::Cell<usize>>,
}

impl Shards {
    /// So many connections to `address`, made when they are needed.
    pub(super) fn new(address: SocketAddr, connections: usize) -> Shards {
        let lane = |_| {
            let (jobs, waiting) = mpsc::channel(WAITING_MAX);
            spawn_local(keep(address, waiting));
            jobs
        };
        Shards {
            lanes: Rc::new((0..connections.max(1)).map(lane).collect()),
            turn: Rc::default(),
        }
    }

    /// Sends a frame; answers with the text of the reply, or `None` if there was none.
    pub(super) async fn ask(&self, frame: Vec<u8>) -> Option<Vec<u8>> {
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));
        let lane = &self.lanes[turn % self.lanes.len()];
        let (reply, answer) = oneshot::channel();
        lane.send(Job { frame, reply }).await.ok()?;
        answer.await.ok()
    }
}

/// Dials whenever there is something to send and no connection.
async fn keep(address: SocketAddr, mut jobs: mpsc::Receiver<Job>) {
    while let Some(first) = jobs.recv().await {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                let lost = run(stream, first, &mut jobs).await;
                if let Err(error) = lost {
                    tracing::warn!(%address, %error, "the connection to a shard of ours is lost");
                }
            }
            // Whoever waits is told by the end of his channel.
            Err(error) => tracing::warn!(%address, %error, "no shard of ours answers"),
        }
    }
}

async fn run(stream: TcpStream, first: Job, jobs: &mut mpsc::Receiver<Job>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut read, mut write) = stream.into_split();
    let mut waiting = VecDeque::new();
    let mut input = Vec::new();
    let mut next = Some(first);
    loop {
        if let Some(job) = next.take() {
            waiting.push_back(job.reply);
            write.write_all(&job.frame).await?;
        }
        tokio::select! {
            job = jobs.recv(), if waiting.len() < WAITING_MAX => match job {
                Some(job) => next = Some(job),
                None => return Ok(()),
            },
            count = read.read_buf(&mut input) => {
                if count? == 0 {
                    return match waiting.is_empty() {
                        true => Ok(()),
                        false => Err(io::ErrorKind::UnexpectedEof.into()),
                    };
                }
                while take_reply(&mut input, &mut waiting)?.is_continue() {}
            }
        }
    }
}

/// Hands one reply to whom it belongs; breaks when there is none yet.
fn take_reply(
    input: &mut Vec<u8>,
    waiting: &mut VecDeque<oneshot::Sender<Vec<u8>>>,
) -> io::Result<ControlFlow<()>> {
    let text = match reply_frame::decode(input, REPLY_BYTES_MAX) {
        Decoded::Frame(text) => text,
        Decoded::Need(_) => return Ok(ControlFlow::Break(())),
        Decoded::Bad(bad) => return Err(io::Error::other(bad)),
    };
    let end = text.end;
    if let Some(reply) = waiting.pop_front() {
        // Who asked may have gone.
        let _ = reply.send(input[text].to_vec());
    }
    input.drain(..end);
    Ok(ControlFlow::Continue(()))
}
