//! One socket of a shard, whatever it is for.

use crate::outgoing::Outgoing;
use crate::pieces::PieceList;
use crate::relay::Leg;
use crate::ring::Handle;
use crate::send_pool::ChunkQueue;
use crate::table::NONE;
use crate::timer_wheel::TimerId;

/// What a connection is for. The number is an index into the table of the role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Somebody sends us requests.
    Downstream,
    /// We forward requests to an instance.
    Upstream(u32),
    /// We call a caller home to tell of a failure.
    Tell(u32),
    /// A request begins or ends in this process.
    End(End),
    /// A response passes through this process.
    Relay(Leg),
}

/// A connection of the worker's or of the client's role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// We call a caller home with the response of a handler.
    Response(u32),
    /// We send requests of our own to a worker.
    Link(u32),
    /// A worker calls us home; [`NONE`] until it has said for which call.
    Home(u32),
    /// We take the request stream of a bidirectional call.
    Input(u32),
    /// A worker takes the request stream of a call of ours.
    Feed(u32),
    /// The responses of many requests of one caller leave here.
    MuxLink(u32),
    /// A worker calls us home with many responses.
    MuxHome(u32),
    /// A worker called us home and is told that nobody waits; then the socket is closed.
    Goodbye,
}

/// Where the bytes of a downstream connection go next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intake {
    /// Frame by frame.
    Frames,
    /// The rest of a large frame, cut through to its request.
    Stream {
        /// The request that takes them.
        request: u32,
        /// Bytes still to come.
        left: u64,
    },
    /// To `collected`: a frame for a handler of this process, or a large message of a response.
    Collect {
        /// The handler; [`NONE`] for a response.
        handler: u32,
        /// Bytes still to come.
        left: u64,
    },
    /// Into the slab of a worker behind a lane.
    Lane {
        /// The lane.
        lane: u32,
        /// The request that takes them.
        job: u32,
        /// Bytes still to come.
        left: u32,
    },
    /// Nowhere: the rest of a refused frame.
    Discard {
        /// Bytes still to come.
        left: u64,
    },
}

/// Requests of one connection in the order of their arrival, linked through the request table.
#[derive(Clone, Copy, Debug)]
pub struct Fifo {
    /// The oldest.
    pub head: u32,
    /// The newest.
    pub tail: u32,
    /// How many.
    pub len: u32,
}

impl Fifo {
    /// With nothing in it.
    pub const EMPTY: Fifo = Fifo {
        head: NONE,
        tail: NONE,
        len: 0,
    };
}

/// A socket with what is under way on it.
#[derive(Debug)]
pub struct Connection {
    /// Descriptor and slot.
    pub handle: Handle,
    /// What it is for.
    pub role: Role,
    /// True exactly when the kernel holds a receive of this connection.
    pub receiving: bool,
    /// True exactly when the kernel holds a send.
    pub sending: bool,
    /// True exactly when the kernel holds a connect.
    pub connecting: bool,
    /// It has been shut down and goes away when none of the three above is true.
    pub closing: bool,
    /// No receive is wanted until something of ours has moved.
    pub paused: bool,
    /// It waits for a free buffer.
    pub starved: bool,
    /// It waits for room in a table.
    pub crowded: bool,
    /// It stands in the list of connections with something to send.
    pub dirty: bool,
    /// The peer has sent its end of stream.
    pub end_of_stream: bool,
    /// The kernel does TLS on it; see [`crate::adopt`].
    pub kernel_tls: bool,
    /// Its frames go to lanes: little is received at once, as what follows may belong into a slab.
    pub careful: bool,
    /// A timer looks at its unfinished frame.
    pub frame_timer: bool,
    /// Received bytes that no frame has taken.
    pub incoming: PieceList,
    /// It makes no sense to look at `incoming` before it has so many bytes.
    pub need: usize,
    /// Where they go.
    pub intake: Intake,
    /// Frames taken; tells a connection that stands still from a slow one.
    pub frames: u64,
    /// `frames` when the timer was set.
    pub frames_seen: u64,
    /// Since when the frame after so many others (`frame_of`) is looked at.
    pub frame_ns: u64,
    /// `frames` at that time.
    pub frame_of: u64,
    /// Bytes of large frames passed on; tells a slow one from one that stands still.
    pub streamed: u64,
    /// `streamed` when the timer was set.
    pub streamed_seen: u64,
    /// Replies owed, in order.
    pub replies: Fifo,
    /// Replies and control frames to be sent.
    pub out: ChunkQueue,
    /// The same for frames that we make ourselves.
    pub outgoing: Outgoing,
    /// What has arrived of a frame that is being collected.
    pub collected: Vec<u8>,
    /// Ends a call home that does not say for whom.
    pub timer: Option<TimerId>,
}

impl Connection {
    /// A fresh connection with nothing under way.
    pub fn new(handle: Handle, role: Role) -> Connection {
        Connection {
            handle,
            role,
            receiving: false,
            sending: false,
            connecting: false,
            closing: false,
            paused: false,
            starved: false,
            crowded: false,
            dirty: false,
            end_of_stream: false,
            kernel_tls: false,
            careful: false,
            frame_timer: false,
            incoming: PieceList::EMPTY,
            need: 0,
            intake: Intake::Frames,
            frames: 0,
            frames_seen: 0,
            frame_ns: 0,
            frame_of: 0,
            streamed: 0,
            streamed_seen: 0,
            replies: Fifo::EMPTY,
            out: ChunkQueue::EMPTY,
            outgoing: Outgoing::default(),
            collected: Vec::new(),
            timer: None,
        }
    }

    /// Whether the kernel holds nothing of it.
    pub fn is_quiet(&self) -> bool {
        !self.receiving && !self.sending && !self.connecting
    }
}
