//! What a decoder answers, and what can be wrong with a peer's bytes or with ours.

/// The answer of a decoder that looked at the bytes received so far.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Decoded<T> {
    /// The unit is complete.
    Frame(T),
    /// More bytes are needed: this many in total, counted from the start of the input. Always
    /// larger than the input was, and never larger than what a complete unit has.
    Need(usize),
    /// No further byte can make this valid; the peer is at fault.
    Bad(Bad),
}

impl<T> Decoded<T> {
    /// The frame, if there is one.
    pub fn frame(self) -> Option<T> {
        match self {
            Self::Frame(frame) => Some(frame),
            Self::Need(_) | Self::Bad(_) => None,
        }
    }

    /// Applies `f` to the frame and leaves the other answers as they are.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Decoded<U> {
        match self {
            Self::Frame(frame) => Decoded::Frame(f(frame)),
            Self::Need(bytes) => Decoded::Need(bytes),
            Self::Bad(bad) => Decoded::Bad(bad),
        }
    }
}

/// A frame is larger than the receiver allows. The text is what a Dynamo server says in its
/// `Read error: ` reply (spec/request-plane.md §2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("message too large: {frame_bytes} bytes (max: {max_bytes} bytes)")]
pub struct TooLarge {
    /// Size of the whole frame, length fields included.
    pub frame_bytes: u64,
    /// The limit that it exceeds; a frame of exactly this size is allowed.
    pub max_bytes: u64,
}

/// Why received bytes can never become a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    /// The frame is larger than the limit.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The declared lengths do not fit the machine's address space when added.
    #[error("declared lengths overflow: {header_bytes} header bytes and {body_bytes} body bytes")]
    LengthOverflow {
        /// Declared header length.
        header_bytes: u64,
        /// Declared body length.
        body_bytes: u64,
    },
    /// No chunk of a multiplexed connection.
    #[error("no chunk: kind {kind}, {bytes} bytes")]
    Chunk {
        /// The byte in the place of the kind.
        kind: u8,
        /// Declared length.
        bytes: u32,
    },
    /// A frame of an event of a version that is not understood.
    #[error("event frame of version {version}; 1 is understood")]
    EventVersion {
        /// The first byte.
        version: u8,
    },
    /// A non-zero checksum does not fit the content.
    #[error("checksum mismatch: frame says {declared:016x}, content has {computed:016x}")]
    Checksum {
        /// What the frame says.
        declared: u64,
        /// XXH3-64 of header and body.
        computed: u64,
    },
    /// The endpoint path is not UTF-8 (strict decoder only).
    #[error("endpoint path is not UTF-8 (first bad byte at {at})")]
    PathNotUtf8 {
        /// Offset of the first bad byte inside the path.
        at: usize,
    },
    /// The headers are not a JSON object of strings (strict decoder only).
    #[error("headers are not a JSON object of strings")]
    HeadersNotJson,
    /// A QUIC frame of a kind that there is not.
    #[error("frame kind {kind} is none")]
    UnknownKind {
        /// The first byte.
        kind: u8,
    },
    /// A QUIC frame with a payload where none is allowed.
    #[error("a frame of kind {kind} has no payload")]
    UnexpectedPayload {
        /// The first byte.
        kind: u8,
    },
    /// No ZMTP, or none that we speak.
    #[error(transparent)]
    Zmtp(#[from] crate::zmtp::Fault),
    /// No hello of plain events, or no answer to one.
    #[error(transparent)]
    Hello(#[from] crate::event::hello::HelloFault),
}

/// Why something of ours cannot be put on the wire. Nothing has been written when it is returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The endpoint path does not fit its 16-bit length.
    #[error("endpoint path has {bytes} bytes; the frame holds at most 65535")]
    PathTooLong {
        /// Its length.
        bytes: usize,
    },
    /// The headers do not fit their 16-bit length.
    #[error("headers have {bytes} bytes; the frame holds at most 65535")]
    HeadersTooLong {
        /// Their length.
        bytes: usize,
    },
    /// The payload does not fit its 32-bit length.
    #[error("payload has {bytes} bytes; the frame holds at most 4294967295")]
    PayloadTooLong {
        /// Its length.
        bytes: usize,
    },
    /// The caller's buffer is too short.
    #[error("{need_bytes} bytes are needed, the buffer has {have_bytes}; give a larger one")]
    BufferTooShort {
        /// What the encoding takes.
        need_bytes: usize,
        /// What was given.
        have_bytes: usize,
    },
    /// The control message exceeds Dynamo's fixed limit (spec/request-plane.md §3.2).
    #[error("control message has {bytes} bytes, more than 131072; shorten id or metadata")]
    ControlTooLarge {
        /// Its length.
        bytes: usize,
    },
    /// Metadata keys must come sorted by bytes and without repetition.
    #[error("metadata keys must be sorted and distinct")]
    MetadataNotSorted,
}
