//! Sizes and bounds of the request plane, by name (spec/request-plane.md §2.2, §3.1, §3.2).

/// Default of `DYN_TCP_MAX_MESSAGE_SIZE`: the most bytes of a whole request frame, or of a reply
/// frame as the client reads it. A frame of exactly this size is allowed.
pub const MESSAGE_BYTES_MAX_DEFAULT: u64 = 33_554_432;
/// Most bytes of an endpoint path: its length field has 16 bits.
pub const PATH_BYTES_MAX: usize = 65_535;
/// Most bytes of the headers JSON: its length field has 16 bits.
pub const HEADERS_BYTES_MAX: usize = 65_535;
/// Most bytes of a request's payload: its length field has 32 bits.
pub const PAYLOAD_BYTES_MAX: usize = u32::MAX as usize;
/// Bytes of a request frame that are neither path, headers nor payload: three length fields.
pub const REQUEST_FIXED_BYTES: usize = 8;
/// Most bytes that come before a request's payload.
pub const REQUEST_PREFIX_BYTES_MAX: usize =
    REQUEST_FIXED_BYTES + PATH_BYTES_MAX + HEADERS_BYTES_MAX;
/// Bytes of a reply frame's length field.
pub const REPLY_PREFIX_BYTES: usize = 4;
/// Bytes before a two-part message's header: two lengths and a checksum.
pub const TWO_PART_PREFIX_BYTES: usize = 24;
/// Most bytes of a request control message; senders refuse more.
pub const CONTROL_BYTES_MAX: usize = 131_072;
/// Scratch that [`crate::control_message::TcpConnectionInfo::parse`] is content with for every
/// connection info that Dynamo writes (about 170 bytes and a request id).
pub const CONNECTION_INFO_SCRATCH_BYTES: usize = 1024;
/// Deepest nesting of arrays and objects that the JSON scanner follows.
pub const NESTING_MAX: usize = 128;
/// Most bytes of an error's diagnostic text on the wire.
pub const DIAGNOSTIC_BYTES_MAX: usize = 4_096;
/// Most bytes of an error's reason.
pub const REASON_BYTES_MAX: usize = 128;
/// Most errors that a chain of causes may hold when it is read; deeper ones are refused.
pub const CAUSES_MAX: usize = 32;

const _: () = assert!(REQUEST_PREFIX_BYTES_MAX as u64 <= MESSAGE_BYTES_MAX_DEFAULT);
const _: () = assert!(size_of::<crate::two_part::Prefix>() == TWO_PART_PREFIX_BYTES);
const _: () = assert!(size_of::<crate::reply_frame::Prefix>() == REPLY_PREFIX_BYTES);
const _: () = assert!(PATH_BYTES_MAX == u16::MAX as usize && HEADERS_BYTES_MAX == PATH_BYTES_MAX);
const _: () = assert!(CONTROL_BYTES_MAX as u64 <= MESSAGE_BYTES_MAX_DEFAULT);
// The scanners keep one bit per open array or object in a u128.
const _: () = assert!(NESTING_MAX <= u128::BITS as usize);
// Offsets and lengths are computed in usize without overflow checks for request frames.
const _: () = assert!(usize::BITS >= 64, "the codec counts frames in 64-bit sizes");
