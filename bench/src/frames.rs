//! The bytes on the wire as the load generator makes and reads them: a request frame like that of
//! a real 1.6.1 client, made once and stamped anew for each request, and the replies to it.
//!
//! ```text
//! u16 P | path | u16 H | headers (JSON) | u32 N | u64 A | u64 B | u64 0 | control (JSON) | body
//! ```
//! Lengths are big-endian (spec/request-plane.md §2.2, §3.1); the checksum is 0 as in a release
//! build.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use corelane_codec::control_message::{
    NewControlMessage, PayloadCodec, RequestType, StreamType, TcpConnection,
};
use corelane_codec::{headers, request_frame, two_part};

/// Places of a stamp: digits of fixed width that change with each request.
const STAMP_ID: &str = "000000000000";
/// Digits of a time in ns since 1970, until the year 2286.
const STAMP_TIME: &str = "0000000000000000000";
/// Where a worker would call home. Nobody does: the sink answers nothing but acks.
const CALL_HOME: &str = "127.0.0.1:9";

/// A request frame that is made once; [`RequestFrame::stamp`] makes the next request of it.
#[derive(Clone)]
pub(crate) struct RequestFrame {
    bytes: Vec<u8>,
    ids: Vec<usize>,
    time: usize,
    count: u64,
}

impl RequestFrame {
    /// The frame for `path` with a body of `body_bytes` (at least 1).
    pub(crate) fn new(path: &str, body_bytes: usize) -> Result<Self> {
        Self::calling(path, body_bytes, CALL_HOME)
    }

    /// The same for a caller who waits for the response at `home`, `IP:PORT`.
    pub(crate) fn calling(path: &str, body_bytes: usize, home: &str) -> Result<Self> {
        let id = format!("5eed0000-0000-4000-8000-{STAMP_ID}");
        let mut headers = Vec::new();
        let members = [
            ("x-endpoint-path", path),
            ("request-id", &id),
            ("x-frontend-send-ts-ns", STAMP_TIME),
        ];
        headers::write(&members, &mut headers);
        let mut payload = Vec::new();
        two_part::write(
            &control_message(&id, home)?,
            &msgpack_string(body_bytes),
            &mut payload,
        );
        let mut bytes = Vec::new();
        request_frame::write_frame(path.as_bytes(), &headers, &payload, &mut bytes)
            .with_context(|| format!("cannot make a request for {path}"))?;

        // Only the part before the body is searched: the body is data.
        let head = &bytes[..bytes.len() - body_bytes.max(1)];
        let tail = format!("-{STAMP_ID}");
        let ids = places(head, tail.as_bytes()).map(|at| at + 1).collect();
        let mark = format!("\"{STAMP_TIME}\"");
        let time = places(head, mark.as_bytes())
            .next()
            .context("the frame has no time")?
            + 1;
        Ok(Self {
            bytes,
            ids,
            time,
            count: 0,
        })
    }

    /// The next request: a new identity and the present time, as a client sends.
    pub(crate) fn stamp(&mut self) -> &[u8] {
        self.count += 1;
        let mut id = [0; STAMP_ID.len()];
        write_digits(&mut id, self.count, 16);
        for at in &self.ids {
            self.bytes[*at..*at + id.len()].copy_from_slice(&id);
        }
        let now_ns = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos());
        let digits = &mut self.bytes[self.time..self.time + STAMP_TIME.len()];
        write_digits(digits, now_ns as u64, 10);
        &self.bytes
    }

    /// Length of each request in bytes.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// The control message of a unary request.
fn control_message(id: &str, home: &str) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let message = NewControlMessage {
        id,
        request_type: RequestType::SingleIn,
        payload_codec: PayloadCodec::MessagePack,
        connection_info: TcpConnection {
            address: home,
            subject: &format!("5eed0001-0000-4000-8000-{STAMP_ID}"),
            context: id,
            stream_type: StreamType::Response,
        },
        metadata: &[],
        frontend_send_ts_ns: None,
        request_stream_connection_info: None,
    };
    message.write(&mut out)?;
    Ok(out)
}

/// A MessagePack string that takes `bytes` in all, its own prefix counted. (0 is taken for 1.)
fn msgpack_string(bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.max(1));
    match bytes {
        0..=32 => out.push(0xa0 | bytes.saturating_sub(1) as u8),
        33..=257 => out.extend_from_slice(&[0xd9, (bytes - 2) as u8]),
        258..=65_538 => {
            out.push(0xda);
            out.extend_from_slice(&((bytes - 3) as u16).to_be_bytes());
        }
        _ => {
            out.push(0xdb);
            out.extend_from_slice(&((bytes - 5) as u32).to_be_bytes());
        }
    }
    out.resize(bytes.max(1), b'x');
    out
}

fn places<'a>(hay: &'a [u8], needle: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    hay.windows(needle.len())
        .enumerate()
        .filter(move |(_, w)| *w == needle)
        .map(|(at, _)| at)
}

fn write_digits(to: &mut [u8], mut value: u64, base: u64) {
    for digit in to.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(value % base) as usize];
        value /= base;
    }
}

/// Reads replies (u32 length, data; spec/request-plane.md §2.5) from any cut of the stream.
#[derive(Default)]
pub(crate) struct ReplyReader {
    prefix: [u8; 4],
    have: usize,
    data_left: u32,
    text: Vec<u8>,
    /// The first refusal seen, for the message to the user.
    pub(crate) refusal: Option<String>,
}

/// So much of a refusal is kept.
const REFUSAL_BYTES_MAX: usize = 300;

impl ReplyReader {
    /// Takes `bytes` and calls `reply(refused)` for each reply that they complete.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], mut reply: impl FnMut(bool)) {
        while !bytes.is_empty() {
            if self.have < 4 {
                let take = bytes.len().min(4 - self.have);
                self.prefix[self.have..self.have + take].copy_from_slice(&bytes[..take]);
                bytes = &bytes[take..];
                self.have += take;
                if self.have < 4 {
                    return;
                }
                self.data_left = u32::from_be_bytes(self.prefix);
                if self.data_left == 0 {
                    self.have = 0;
                    reply(false);
                }
                continue;
            }
            let take = bytes.len().min(self.data_left as usize);
            let keep = take.min(REFUSAL_BYTES_MAX.saturating_sub(self.text.len()));
            self.text.extend_from_slice(&bytes[..keep]);
            bytes = &bytes[take..];
            self.data_left -= take as u32;
            if self.data_left == 0 {
                self.have = 0;
                let text = String::from_utf8_lossy(&self.text).into_owned();
                self.text.clear();
                self.refusal.get_or_insert(text);
                reply(true);
            }
        }
    }
}

/// Counts request frames in a stream without keeping them: all that the sink needs to know.
#[derive(Default)]
pub(crate) struct FrameCounter {
    field: Field,
    prefix: [u8; 4],
    have: usize,
    skip_bytes: usize,
    in_payload: bool,
}

/// The length that comes next in the stream.
#[derive(Clone, Copy, Default)]
enum Field {
    #[default]
    Path,
    Headers,
    Payload,
}

impl FrameCounter {
    /// Takes `bytes` and returns how many frames they complete.
    pub(crate) fn feed(&mut self, mut bytes: &[u8]) -> usize {
        let mut frames = 0;
        loop {
            let step = self.skip_bytes.min(bytes.len());
            self.skip_bytes -= step;
            bytes = &bytes[step..];
            if self.skip_bytes > 0 {
                return frames;
            }
            if self.in_payload {
                self.in_payload = false;
                frames += 1;
            }
            if bytes.is_empty() {
                return frames;
            }
            self.read_length(&mut bytes);
        }
    }

    fn read_length(&mut self, bytes: &mut &[u8]) {
        let width = if matches!(self.field, Field::Payload) {
            4
        } else {
            2
        };
        let take = bytes.len().min(width - self.have);
        self.prefix[self.have..self.have + take].copy_from_slice(&bytes[..take]);
        *bytes = &bytes[take..];
        self.have += take;
        if self.have < width {
            return;
        }
        self.have = 0;
        self.skip_bytes = self.prefix[..width]
            .iter()
            .fold(0, |value, byte| value << 8 | usize::from(*byte));
        (self.field, self.in_payload) = match self.field {
            Field::Path => (Field::Headers, false),
            Field::Headers => (Field::Payload, false),
            Field::Payload => (Field::Path, true),
        };
    }
}

#[cfg(test)]
mod tests {
    use corelane_codec::control_message::{self, TcpConnectionInfo};

    use super::*;

    const PATH: &str = "1/bench/sink/generate";

    /// Path, headers, control and body of a frame, read with no help from the code above.
    fn take_apart(frame: &[u8]) -> (String, serde_json::Value, serde_json::Value, Vec<u8>) {
        let u16_at = |at: usize| usize::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
        let path_end = 2 + u16_at(0);
        let headers_end = path_end + 2 + u16_at(path_end);
        let payload = &frame[headers_end + 4..];
        let declared = u32::from_be_bytes(frame[headers_end..headers_end + 4].try_into().unwrap());
        assert_eq!(payload.len(), declared as usize);
        let u64_at = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().unwrap());
        let control_end = 24 + u64_at(0) as usize;
        assert_eq!(payload.len(), control_end + u64_at(8) as usize);
        assert_eq!(u64_at(16), 0, "checksum");
        (
            String::from_utf8(frame[2..path_end].to_vec()).unwrap(),
            serde_json::from_slice(&frame[path_end + 2..headers_end]).unwrap(),
            serde_json::from_slice(&payload[24..control_end]).unwrap(),
            payload[control_end..].to_vec(),
        )
    }

    #[test]
    fn a_frame_is_like_that_of_a_real_client() {
        let mut frame = RequestFrame::new(PATH, 128).unwrap();
        let (path, headers, control, body) = take_apart(frame.stamp());
        assert_eq!(path, PATH);
        assert_eq!(headers["x-endpoint-path"], PATH);
        assert_eq!(headers["request-id"], control["id"]);
        assert_eq!(body.len(), 128);
        let info = &control["connection_info"];
        assert_eq!(info["transport"], "tcp_server");
        let info: serde_json::Value = serde_json::from_str(info["info"].as_str().unwrap()).unwrap();
        assert_eq!(info["context"], control["id"]);
        assert_eq!(info["address"], CALL_HOME);
        assert_eq!(info["stream_type"], "response");
    }

    #[test]
    fn the_codec_reads_what_is_sent() {
        let mut frame = RequestFrame::new(PATH, 300).unwrap();
        let bytes = frame.stamp();
        let read = request_frame::decode_strict(bytes).frame().unwrap();
        assert_eq!((read.path, read.frame_bytes), (PATH, bytes.len()));
        let sent = headers::find(read.headers, "x-frontend-send-ts-ns").unwrap();
        assert_eq!(sent.as_str().map(str::len), Some(STAMP_TIME.len()));
        let envelope = two_part::decode(read.payload, None).frame().unwrap();
        assert_eq!((envelope.body.len(), envelope.checksum), (300, 0));
        let control = control_message::decode(&read.payload[envelope.header]).unwrap();
        let mut scratch = [0; 1024];
        let info = TcpConnectionInfo::parse(&control.connection_info, &mut scratch).unwrap();
        assert_eq!(info.context.as_str(), control.id.as_str());
        assert_eq!(info.socket_addr().unwrap().to_string(), CALL_HOME);
    }

    #[test]
    fn each_stamp_is_another_request() {
        let mut frame = RequestFrame::new(PATH, 1).unwrap();
        let (_, first, control, _) = take_apart(frame.stamp());
        let (_, second, _, _) = take_apart(frame.stamp());
        assert_ne!(first["request-id"], second["request-id"]);
        assert_eq!(control["id"], "5eed0000-0000-4000-8000-000000000001");
        let sent: u64 = second["x-frontend-send-ts-ns"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_nanos() as u64;
        assert!(
            now >= sent && now - sent < 60_000_000_000,
            "sent {sent}, now {now}"
        );
    }

    #[test]
    fn bodies_are_msgpack_strings_of_the_size_asked_for() {
        for bytes in [1, 2, 32, 33, 128, 257, 258, 4096, 65_538, 65_539, 1 << 20] {
            let body = msgpack_string(bytes);
            assert_eq!(body.len(), bytes);
            let (prefix, declared) = match body[0] {
                b if b & 0xe0 == 0xa0 => (1, usize::from(b & 0x1f)),
                0xd9 => (2, usize::from(body[1])),
                0xda => (3, usize::from(u16::from_be_bytes([body[1], body[2]]))),
                0xdb => (
                    5,
                    u32::from_be_bytes(body[1..5].try_into().unwrap()) as usize,
                ),
                other => panic!("prefix {other:#x}"),
            };
            assert_eq!(prefix + declared, bytes);
        }
    }

    #[test]
    fn frames_are_counted_at_any_cut() {
        let mut stream = Vec::new();
        for body in [1, 128, 5000] {
            stream.extend_from_slice(RequestFrame::new(PATH, body).unwrap().stamp());
        }
        stream.extend_from_slice(&[0; 8]); // empty path, headers and payload
        for step in [1, 2, 3, 7, 600, stream.len()] {
            let mut counter = FrameCounter::default();
            let frames: usize = stream.chunks(step).map(|piece| counter.feed(piece)).sum();
            assert_eq!(frames, 4, "in steps of {step}");
        }
        let mut counter = FrameCounter::default();
        assert_eq!(counter.feed(&stream[..stream.len() - 1]), 3);
    }

    #[test]
    fn replies_are_read_at_any_cut() {
        let mut stream = vec![0; 8];
        stream.extend_from_slice(&[0, 0, 0, 7]);
        stream.extend_from_slice(b"Server ");
        stream.extend_from_slice(&[0; 4]);
        for step in [1, 3, stream.len()] {
            let mut reader = ReplyReader::default();
            let mut seen = Vec::new();
            for piece in stream.chunks(step) {
                reader.feed(piece, |refused| seen.push(refused));
            }
            assert_eq!(seen, [false, false, true, false], "in steps of {step}");
            assert_eq!(reader.refusal.as_deref(), Some("Server "));
        }
    }
}
