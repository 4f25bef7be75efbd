//! Requests of relayed routes come in: the envelope's front is read, and written anew so that the
//! worker calls us home (spec/request-plane.md §3).
//!
//! ```text
//! as it came   [path] [u16 H][headers][u32 N ][24 prefix ][control: caller's address]  [body]
//! as it leaves [path'][u16 H][headers][u32 N'][24 prefix'][control: address of ours ] + [body]
//!                      `------------ head, in chunks of our own ----------------'       pieces
//! ```
//!
//! The body stays where it was received.

use corelane_codec::control_message::{
    self, ConnectionInfo, ConnectionInfoError, ControlMessage, NewConnection, RequestType,
    StreamType, TcpConnection, TcpConnectionInfo,
};
use corelane_codec::error::DynamoError;
use corelane_codec::limits::{
    CONNECTION_INFO_SCRATCH_BYTES, CONTROL_BYTES_MAX, TWO_PART_PREFIX_BYTES,
};
use corelane_codec::quic_frame::{QUIC_RESPONSE, QuicConnectionInfo};
use corelane_codec::request_frame::Prefix;
use corelane_codec::{Decoded, two_part};

use crate::decode::{self, WHOLE_BYTES_MAX};
use crate::in_flight::Request;
use crate::quic::{QuicCaller, ResponsePlane};
use crate::relay::{Home, Relay, SUBJECT_BYTES_MAX, TICKET_BYTES, write_ticket};
use crate::respond::{self, Refusal};
use crate::ring::Ring;
use crate::send_pool::ChunkQueue;
use crate::shard::Shard;
use crate::stats::flight::Why;
use crate::{forward, kv, recv, routed, tell};

/// What is wrong with an envelope, in words for its sender.
struct Fault(String);

impl Fault {
    fn new(why: impl ToString) -> Fault {
        Fault(why.to_string())
    }
}

/// What an envelope says that a relay needs.
struct Read {
    response: Home,
    /// The caller waits there on QUIC.
    quic: Option<Box<QuicCaller>>,
    request: Option<Home>,
}

/// The prefix of a frame for a relayed route is there. Refuses the frame, waits for more of it, or
/// makes a request of it. Returns whether it makes sense to look again.
pub(crate) fn take<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    prefix: &Prefix,
    route: u32,
    hint: u64,
) -> bool {
    let there = shard.connections[slot].incoming.bytes();
    let payload_at = prefix.prefix_bytes;
    let fixed_end = payload_at + TWO_PART_PREFIX_BYTES;
    if (prefix.payload_bytes as usize) < TWO_PART_PREFIX_BYTES {
        return refuse(shard, slot, prefix, Fault::new("it is too short"));
    }
    if there < fixed_end {
        shard.connections[slot].need = fixed_end;
        return false;
    }
    let control_bytes = match control_bytes(shard, slot, prefix) {
        Ok(bytes) => bytes,
        Err(fault) => return refuse(shard, slot, prefix, fault),
    };
    let front = fixed_end + control_bytes;
    let wanted = (prefix.frame_bytes().min(WHOLE_BYTES_MAX) as usize).max(front);
    if there < wanted {
        shard.connections[slot].need = wanted;
        return false;
    }
    // Headers, control message, and what our address may be longer than the caller's.
    let head_bytes = front - prefix.path.end + 1024;
    if !has_room(shard, wanted, head_bytes) {
        return decode::refuse(shard, slot, prefix, Refusal::TableFull);
    }
    match begin(shard, slot, prefix, (route, hint), front) {
        Ok(()) => true,
        Err(fault) => refuse(shard, slot, prefix, fault),
    }
}

/// Whether all tables have room for one more.
fn has_room<R: Ring>(shard: &Shard<R>, wanted: usize, head_bytes: usize) -> bool {
    let pieces = wanted / shard.pieces.buffers.buffer_bytes() + 3 + shard.pieces.buffers.count();
    // Its worker's socket and its caller's.
    let sockets = shard.connections.used() + 2 <= shard.config.connections_max as usize;
    let relays = shard.relays.has_room(head_bytes);
    !shard.requests.is_full() && shard.pieces.available() >= pieces && relays && sockets
}

/// Bytes of the control message, once they are known to make sense.
fn control_bytes<R: Ring>(shard: &Shard<R>, slot: u32, prefix: &Prefix) -> Result<usize, Fault> {
    let mut fixed = [0; TWO_PART_PREFIX_BYTES];
    let incoming = shard.connections[slot].incoming;
    shard
        .pieces
        .copy_out(&incoming, prefix.prefix_bytes, &mut fixed);
    let message = match two_part::decode_prefix(&fixed, None) {
        Decoded::Frame(message) => message,
        Decoded::Need(_) => return Err(Fault::new("it is too short")),
        Decoded::Bad(bad) => return Err(Fault::new(bad)),
    };
    if message.frame_bytes() > prefix.payload_bytes as usize {
        return Err(Fault::new("its parts are longer than it is itself"));
    }
    let bytes = message.header.len();
    if bytes == 0 || bytes > CONTROL_BYTES_MAX {
        return Err(Fault::new(format!(
            "its control message has {bytes} bytes of 1 to {CONTROL_BYTES_MAX}"
        )));
    }
    Ok(bytes)
}

/// The caller is told what is wrong: over his call-home address if the envelope says where that
/// is, for a refusal here would make his client avoid us for the requests of all others.
fn refuse<R: Ring>(shard: &mut Shard<R>, slot: u32, prefix: &Prefix, fault: Fault) -> bool {
    let why = format!("the request's envelope cannot be used: {}", fault.0);
    let front = (prefix.payload_bytes as usize).min(TWO_PART_PREFIX_BYTES + CONTROL_BYTES_MAX);
    let incoming = shard.connections[slot].incoming;
    let there = incoming.bytes().saturating_sub(prefix.prefix_bytes);
    let mut envelope = vec![0; front.min(there)];
    shard
        .pieces
        .copy_out(&incoming, prefix.prefix_bytes, &mut envelope);
    if !tell::can_reach(&envelope) {
        return decode::refuse(shard, slot, prefix, Refusal::BadEnvelope { why: &why });
    }
    if !respond::accept(shard, slot) {
        recv::crowd(shard, slot);
        return false;
    }
    shard.stats.shard.refused_bad_envelope.add(1);
    shard.note_refused_frame(slot, Why::BadEnvelope);
    routed::refused(shard, slot, prefix, Why::BadEnvelope);
    let error = DynamoError::invalid_argument(why);
    tell::tell_error(shard, &envelope, tell::Cause::BadEnvelope, &error);
    decode::skip(shard, slot, prefix.frame_bytes());
    true
}

/// Makes request and relay of the frame at the front of a connection.
fn begin<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    prefix: &Prefix,
    (route, hint): (u32, u64),
    front: usize,
) -> Result<(), Fault> {
    let mut envelope = std::mem::take(&mut shard.relays.envelope);
    envelope.clear();
    envelope.resize(front - prefix.prefix_bytes, 0);
    let incoming = shard.connections[slot].incoming;
    shard
        .pieces
        .copy_out(&incoming, prefix.prefix_bytes, &mut envelope);
    let made = admit(shard, slot, prefix, route, &envelope);
    shard.relays.envelope = envelope;
    let mut request = made?;
    request.hint = hint;
    kv::read_headers(shard, slot, prefix, route);
    request.span = routed::begin(shard, slot, prefix, route);
    shard.relays.table[request.relay].span = request.span;
    shard.stats.shard.relays_begun.add(1);
    forward::enter(shard, slot, request, front);
    Ok(())
}

/// Reads the envelope, and writes the head.
fn admit<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    prefix: &Prefix,
    route: u32,
    envelope: &[u8],
) -> Result<Request, Fault> {
    let control = control_message::decode(&envelope[TWO_PART_PREFIX_BYTES..]);
    let control = control.map_err(Fault::new)?;
    let Read {
        response,
        quic,
        request,
    } = read(&control, body_bytes(envelope) > 0)?;
    let plane = worker_plane(shard, quic.is_some())?;
    let mut relay = Relay::new(route, response, control.payload_codec, shard.now_ns);
    (relay.quic, relay.feed) = (quic, request.map(Box::new));
    let Ok(relay) = shard.relays.table.insert(relay) else {
        return Err(Fault::new("too many responses pass through this router"));
    };
    match write_head(shard, (relay, slot, plane), prefix, envelope, &control) {
        Ok((head, head_bytes)) => {
            let mut request = Request::new(slot, route, shard.now_ns);
            request.relay = relay;
            (request.head, request.head_bytes) = (head, head_bytes);
            request.frame_bytes = u64::from(prefix.payload_bytes) - envelope.len() as u64;
            Ok(request)
        }
        Err(fault) => {
            shard.relays.table.remove(relay);
            Err(fault)
        }
    }
}

/// How the worker is to call us home.
fn worker_plane<R: Ring>(shard: &Shard<R>, on_quic: bool) -> Result<ResponsePlane, Fault> {
    let asked = match on_quic {
        true => ResponsePlane::Quic,
        false => ResponsePlane::Tcp,
    };
    let plane = shard.config.relay_plane.unwrap_or(asked);
    if plane == ResponsePlane::Quic && shard.relays.quic.is_none() {
        return Err(Fault::new(
            "it asks for its response over quic-response, which this router does not take: set \
             DYN_RESPONSE_PLANE=quic at the router, or =tcp at caller and workers",
        ));
    }
    Ok(plane)
}

/// The declared length of the body.
fn body_bytes(envelope: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&envelope[8..16]);
    u64::from_be_bytes(bytes)
}

/// What a worker would drop in silence (spec/request-plane.md §10.2) is a fault here.
fn read(control: &ControlMessage<'_>, has_body: bool) -> Result<Read, Fault> {
    let info = &control.connection_info;
    let (response, quic) = match info.transport == QUIC_RESPONSE {
        true => quic_home(control, info).map(|(home, caller)| (home, Some(caller)))?,
        false => (home(control, info, StreamType::Response)?, None),
    };
    let many_in = control.request_type == RequestType::ManyIn;
    let request = match (&control.request_stream_connection_info, many_in) {
        (Some(info), true) => Some(home(control, info, StreamType::Request)?),
        (None, true) => {
            return Err(Fault::new(
                "it is of a bidirectional call and has no request_stream_connection_info",
            ));
        }
        (_, false) => None,
    };
    match (many_in, has_body) {
        (false, false) => Err(Fault::new("it has no body")),
        (true, true) => Err(Fault::new("it is of a bidirectional call and has a body")),
        _ => Ok(Read {
            response,
            quic,
            request,
        }),
    }
}

/// Where one of the caller's streams begins.
fn home(
    control: &ControlMessage<'_>,
    info: &ConnectionInfo<'_>,
    stream: StreamType,
) -> Result<Home, Fault> {
    let mut scratch = [0; CONNECTION_INFO_SCRATCH_BYTES];
    let parsed = TcpConnectionInfo::parse(info, &mut scratch).map_err(|error| match error {
        ConnectionInfoError::UnknownTransport => Fault(format!(
            "it asks for its response over {}, and this router relays tcp_server and \
             quic-response only; set DYN_RESPONSE_PLANE at the caller, or response = \"direct\" \
             for the route",
            info.transport
        )),
        error => Fault::new(error),
    })?;
    if parsed.context != control.id {
        return Err(Fault::new("the context of a connection info is not its id"));
    }
    if parsed.stream_type != stream {
        return Err(Fault::new("a connection info is of the wrong stream_type"));
    }
    let address = parsed.socket_addr().map_err(Fault::new)?;
    let mut subject = [0; SUBJECT_BYTES_MAX];
    let subject = parsed.subject.unescape_into(&mut subject);
    let home = subject.ok().and_then(|subject| Home::new(address, subject));
    home.ok_or_else(|| Fault(format!("a subject has over {SUBJECT_BYTES_MAX} bytes")))
}

/// Where a caller waits on QUIC.
fn quic_home(
    control: &ControlMessage<'_>,
    info: &ConnectionInfo<'_>,
) -> Result<(Home, Box<QuicCaller>), Fault> {
    let mut scratch = [0; CONNECTION_INFO_SCRATCH_BYTES];
    let info = QuicConnectionInfo::parse(info, &mut scratch).map_err(Fault::new)?;
    if info.request_id != control.id {
        let why = "the request_id of a connection info is not its id";
        return Err(Fault::new(why));
    }
    let caller = QuicCaller::read(&info).map_err(Fault)?;
    let subject = info.registration_id.to_cow();
    let home = Home::new(caller.address, &subject);
    let home = home.ok_or_else(|| Fault::new("the registration_id is no UUID"))?;
    Ok((home, Box::new(caller)))
}

/// Writes what leaves in place of headers and envelope, and notes where its tickets stand.
fn write_head<R: Ring>(
    shard: &mut Shard<R>,
    (relay, slot, plane): (u32, u32, ResponsePlane),
    prefix: &Prefix,
    envelope: &[u8],
    message: &ControlMessage<'_>,
) -> Result<(ChunkQueue, u32), Fault> {
    let control = &envelope[TWO_PART_PREFIX_BYTES..];
    let rest_bytes = u64::from(prefix.payload_bytes) - envelope.len() as u64;
    shard.relays.table[relay].secret = shard.relays.draw();
    let mut head = std::mem::take(&mut shard.relays.head);
    head.clear();
    // `u16 H, headers, u32 N`, and the fixed part; both lengths are set when they are known.
    let lead = prefix.prefix_bytes - prefix.path.end;
    head.resize(lead + TWO_PART_PREFIX_BYTES, 0);
    let incoming = shard.connections[slot].incoming;
    shard
        .pieces
        .copy_out(&incoming, prefix.path.end, &mut head[..lead - 4]);
    let written = write_control(shard, (relay, plane), control, message, &mut head);
    let control_bytes = head.len() - lead - TWO_PART_PREFIX_BYTES;
    // The rest may be more than the body: bytes behind it, which no reader looks at.
    let payload_bytes = (TWO_PART_PREFIX_BYTES + control_bytes) as u64 + rest_bytes;
    head[lead - 4..lead].copy_from_slice(&(payload_bytes as u32).to_be_bytes());
    let fixed = two_part::prefix(control_bytes, body_bytes(envelope) as usize);
    head[lead..lead + TWO_PART_PREFIX_BYTES].copy_from_slice(&fixed);
    let frame_bytes = prefix.path.end as u64 + lead as u64 + payload_bytes;
    let fits = frame_bytes <= shard.config.message_bytes_max;
    let mut queue = ChunkQueue::EMPTY;
    let put = shard.relays.heads.push_all(&mut queue, &head);
    let head_bytes = head.len() as u32;
    shard.relays.head = head;
    let fault = match (written, put, fits) {
        (Ok(()), true, true) => return Ok((queue, head_bytes)),
        (Err(fault), ..) => fault,
        (_, false, _) => Fault::new("it finds no room"),
        (.., false) => Fault::new("it is too large once it names the router"),
    };
    shard.relays.heads.clear(&mut queue);
    Err(fault)
}

/// Appends the control message with our address and our tickets.
fn write_control<R: Ring>(
    shard: &mut Shard<R>,
    (relay, plane): (u32, ResponsePlane),
    control: &[u8],
    message: &ControlMessage<'_>,
    head: &mut Vec<u8>,
) -> Result<(), Fault> {
    let id = message.id.to_cow();
    let infos = [
        Some((&message.connection_info, StreamType::Response)),
        message
            .request_stream_connection_info
            .as_ref()
            .filter(|_| message.request_type == RequestType::ManyIn)
            .map(|info| (info, StreamType::Request)),
    ];
    let mut tickets = [[0; TICKET_BYTES]; 2];
    for (info, text) in infos.iter().zip(&mut tickets) {
        if let Some((_, stream)) = info {
            write_ticket(shard.relays.ticket(relay, *stream), text);
        }
    }
    let place = shard.relays.quic.as_ref();
    let place = place.filter(|_| plane == ResponsePlane::Quic);
    let connection = |which: usize, stream| {
        // Hexadecimal digits and dashes.
        let subject = std::str::from_utf8(&tickets[which]).unwrap_or_default();
        match place {
            Some(place) if stream == StreamType::Response => {
                NewConnection::Quic(place.connection(subject, &id))
            }
            _ => NewConnection::Tcp(TcpConnection {
                address: &shard.relays.address,
                subject,
                context: &id,
                stream_type: stream,
            }),
        }
    };
    let mut from = head.len();
    match infos {
        [Some((info, stream)), None] => {
            let ours = connection(0, stream);
            from += info.range().start;
            control_message::write_redirected(control, info.range(), &ours, head)
                .map_err(Fault::new)?;
        }
        [Some(response), Some(request)] => {
            // The one that stands later goes first: the other's place stays as it was read.
            let order = match response.0.range().start < request.0.range().start {
                true => [(1, request), (0, response)],
                false => [(0, response), (1, request)],
            };
            let [(later, (late, late_stream)), (first, (early, early_stream))] = order;
            let mut once = Vec::with_capacity(control.len() + 512);
            let ours = connection(later, late_stream);
            control_message::write_redirected(control, late.range(), &ours, &mut once)
                .map_err(Fault::new)?;
            let ours = connection(first, early_stream);
            from += early.range().start;
            control_message::write_redirected(&once, early.range(), &ours, head)
                .map_err(Fault::new)?;
        }
        _ => {}
    }
    // The second of them is none where no request stream is.
    let count = infos.iter().flatten().count();
    shard.relays.table[relay].ticket_at = find_tickets(head, from, &tickets[..count]);
    Ok(())
}

/// Where tickets stand that were written behind `from`; nothing in them is escaped.
fn find_tickets(head: &[u8], from: usize, tickets: &[[u8; TICKET_BYTES]]) -> [u32; 2] {
    let mut ticket_at = [0; 2];
    for (at, ticket) in ticket_at.iter_mut().zip(tickets) {
        let mut places = head[from..].windows(TICKET_BYTES);
        if let Some(place) = places.position(|place| place == ticket) {
            *at = (from + place) as u32;
        }
    }
    ticket_at
}

/// Another attempt: the same head with other tickets, in chunks of its own. `None`: no room.
pub(crate) fn renew_head<R: Ring>(
    shard: &mut Shard<R>,
    relay: u32,
    old: &ChunkQueue,
) -> Option<ChunkQueue> {
    shard.relays.table[relay].secret = shard.relays.draw();
    let mut head = std::mem::take(&mut shard.relays.head);
    head.clear();
    for part in shard.relays.heads.unsent(old) {
        head.extend_from_slice(part);
    }
    let streams = [StreamType::Response, StreamType::Request];
    let places = shard.relays.table[relay].ticket_at;
    for (at, stream) in places.into_iter().zip(streams) {
        let mut text = [0; TICKET_BYTES];
        write_ticket(shard.relays.ticket(relay, stream), &mut text);
        let at = at as usize;
        if at > 0 {
            head[at..at + TICKET_BYTES].copy_from_slice(&text);
        }
    }
    let mut queue = ChunkQueue::EMPTY;
    let put = shard.relays.heads.push_all(&mut queue, &head);
    shard.relays.head = head;
    if !put {
        shard.relays.heads.clear(&mut queue);
    }
    put.then_some(queue)
}
