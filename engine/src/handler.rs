//! Handlers: requests that this process answers itself.
//!
//! A handler is an async function on the shard's own thread. It gets a [`Request`] and a
//! [`Responder`]; what it writes there leaves on a call-home socket that the shard drives
//! (`respond_stream`).

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use corelane_codec::control_message::{
    self, ConnectionInfo, PayloadCodec, RequestType, StreamType, TcpConnectionInfo,
};
use corelane_codec::json::{Object, Text};
use corelane_codec::quic_frame::{QUIC_RESPONSE, QuicConnectionInfo};
use corelane_codec::trace_context::TraceContext;
use corelane_codec::{Decoded, headers, item, two_part};

use crate::quic::{QuicCaller, ResponsePlane};
use crate::responder::{Host, Responder, Shared};
use crate::ring::monotonic_ns;
use crate::stats::HandlerStats;

/// Answers requests. Functions of a request and a responder that return a future are handlers.
pub trait Handler {
    /// Answers one request. Dropping the future must be harmless: a handler that goes on long
    /// after its caller has gone is dropped.
    fn handle(&self, request: Request, responder: Responder) -> Pin<Box<dyn Future<Output = ()>>>;

    /// What it takes: one value in the request's body, or a stream of them
    /// ([`Responder::take_input`]). Requests of the other kind are refused.
    fn takes(&self) -> RequestType {
        RequestType::SingleIn
    }
}

/// A function that takes streams of requests (spec/request-plane.md §5).
pub struct ManyIn<F>(pub F);

impl<F, A> Handler for ManyIn<F>
where
    F: Fn(Request, Responder) -> A,
    A: Future<Output = ()> + 'static,
{
    fn handle(&self, request: Request, responder: Responder) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin((self.0)(request, responder))
    }

    fn takes(&self) -> RequestType {
        RequestType::ManyIn
    }
}

impl<F, A> Handler for F
where
    F: Fn(Request, Responder) -> A,
    A: Future<Output = ()> + 'static,
{
    fn handle(&self, request: Request, responder: Responder) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(self(request, responder))
    }
}

/// Makes a handler on the thread of its shard.
pub type MakeHandler = Box<dyn FnOnce(&Host) -> Rc<dyn Handler> + Send>;

/// A handler that comes while the shard runs, and where it is counted.
pub struct NewHandler {
    /// Made on the shard's thread.
    pub make: MakeHandler,
    /// Its counters.
    pub stats: Arc<HandlerStats>,
}

impl fmt::Debug for NewHandler {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("NewHandler")
    }
}

/// One request, whole.
#[derive(Debug)]
pub struct Request {
    /// `[u16 H][headers][u32 N][payload]`, as it came.
    bytes: Vec<u8>,
    headers: Range<usize>,
    body: Range<usize>,
    id: String,
    codec: PayloadCodec,
    trace: Option<TraceContext>,
}

/// Why a body is not one value of its codec.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request's body is not {codec}: {why}")]
pub struct BadBody {
    codec: &'static str,
    why: String,
}

impl Request {
    /// Its identity, the same at every hop.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How the body is encoded, and each item of the response is to be.
    pub fn codec(&self) -> PayloadCodec {
        self.codec
    }

    /// The body, not looked at.
    pub fn body(&self) -> &[u8] {
        &self.bytes[self.body.clone()]
    }

    /// The one value that the body must be, without blanks around it, still encoded.
    ///
    /// # Errors
    /// The body is not a value of its codec, or more than one.
    pub fn value(&self) -> Result<&[u8], BadBody> {
        item::value(self.body(), self.codec).map_err(|error| BadBody {
            codec: self.codec.name(),
            why: error.to_string(),
        })
    }

    /// The value of a header of the frame.
    pub fn header(&self, name: &str) -> Option<Text<'_>> {
        headers::find(&self.bytes[self.headers.clone()], name)
    }

    /// What a call that is made for this request passes on as `traceparent`: the span of this
    /// request, or what its caller sent where no spans are made.
    pub fn trace(&self) -> Option<TraceContext> {
        self.trace.or_else(|| self.callers_trace())
    }

    /// The span of the caller.
    pub(crate) fn callers_trace(&self) -> Option<TraceContext> {
        let text = self.header(headers::TRACEPARENT)?;
        TraceContext::parse(&text.to_cow())
    }

    /// The span of this request has been begun.
    pub(crate) fn set_trace(&mut self, span: TraceContext) {
        self.trace = Some(span);
    }

    /// Bytes of the envelope.
    pub(crate) fn payload_bytes(&self) -> usize {
        self.bytes.len() - self.headers.end - 4
    }

    /// Bytes that it holds.
    pub(crate) fn held_bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// Where the caller waits for the response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallHome {
    pub(crate) address: SocketAddr,
    pub(crate) subject: String,
    /// He waits on QUIC.
    pub(crate) quic: Option<Box<QuicCaller>>,
    /// He offers a connection that many responses share.
    pub(crate) offers_mux: bool,
}

impl CallHome {
    /// The transport on which he waits.
    pub(crate) fn plane(&self) -> ResponsePlane {
        match self.quic {
            Some(_) => ResponsePlane::Quic,
            None => ResponsePlane::Tcp,
        }
    }
}

/// A frame whose envelope cannot be understood, and where its caller can be told, if known.
#[derive(Debug)]
pub(crate) struct Undecodable {
    pub(crate) home: Option<CallHome>,
    pub(crate) why: String,
}

/// A request, where its response goes, and where its values come from if not in its body.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) request: Request,
    pub(crate) home: CallHome,
    pub(crate) input: Option<CallHome>,
}

/// Reads a frame without its path, for an endpoint that takes such requests.
pub(crate) fn read(bytes: Vec<u8>, takes: RequestType) -> Result<Arrived, Undecodable> {
    let headers_bytes = usize::from(u16::from_be_bytes([bytes[0], bytes[1]]));
    let headers = 2..2 + headers_bytes;
    let payload = headers.end + 4;
    match envelope(&bytes[payload..], takes) {
        Ok(envelope) => {
            let body = payload + envelope.body.start..payload + envelope.body.end;
            let request = Request {
                bytes,
                headers,
                body,
                id: envelope.id,
                codec: envelope.codec,
                trace: None,
            };
            Ok(Arrived {
                request,
                home: envelope.home,
                input: envelope.input,
            })
        }
        Err(why) => {
            let home = call_home_of(&bytes[payload..]);
            Err(Undecodable { home, why })
        }
    }
}

struct Envelope {
    body: Range<usize>,
    id: String,
    codec: PayloadCodec,
    home: CallHome,
    input: Option<CallHome>,
}

/// All that Dynamo's worker asks of an envelope (spec/request-plane.md §10.2).
fn envelope(payload: &[u8], takes: RequestType) -> Result<Envelope, String> {
    let parts = match two_part::decode(payload, None) {
        Decoded::Frame(parts) => parts,
        Decoded::Need(bytes) => {
            let have = payload.len();
            return Err(format!("the envelope has {have} bytes of {bytes}"));
        }
        Decoded::Bad(bad) => return Err(bad.to_string()),
    };
    let control = control_message::decode(&payload[parts.header.clone()]);
    let control = control.map_err(|error| error.to_string())?;
    let id = control.id.to_cow();
    let home = place(&control.connection_info, StreamType::Response, &id)?;
    let input = match (takes, control.request_type) {
        (RequestType::SingleIn, RequestType::ManyIn) => {
            return Err("this endpoint takes one request, not a stream of them".into());
        }
        (RequestType::ManyIn, RequestType::SingleIn) => {
            return Err("this endpoint takes a stream of requests, not one".into());
        }
        (RequestType::SingleIn, RequestType::SingleIn) if parts.body.is_empty() => {
            return Err(NO_BODY.into());
        }
        (RequestType::SingleIn, RequestType::SingleIn) => None,
        (RequestType::ManyIn, RequestType::ManyIn) if !parts.body.is_empty() => {
            return Err("a stream of requests comes with a body".into());
        }
        (RequestType::ManyIn, RequestType::ManyIn) => {
            let info = control.request_stream_connection_info;
            let info = info.ok_or("where to dial for the requests is not said")?;
            Some(place(&info, StreamType::Request, &id)?)
        }
    };
    Ok(Envelope {
        body: parts.body,
        codec: control.payload_codec,
        id: id.into_owned(),
        home,
        input,
    })
}

/// Said of a request without a body.
pub(crate) const NO_BODY: &str = "the request has no body";

/// What the control message of a request that comes alone says: id, codec, and its caller.
pub(crate) fn of_control(control: &[u8]) -> Result<(String, PayloadCodec, CallHome), String> {
    let control = control_message::decode(control).map_err(|error| error.to_string())?;
    let id = control.id.to_cow();
    let home = place(&control.connection_info, StreamType::Response, &id)?;
    if control.request_type == RequestType::ManyIn {
        return Err("this endpoint takes one request, not a stream of them".into());
    }
    Ok((id.into_owned(), control.payload_codec, home))
}

/// Where the caller waits for one of the streams of the request `id`.
fn place(info: &ConnectionInfo<'_>, stream: StreamType, id: &str) -> Result<CallHome, String> {
    let mut scratch = scratch(info);
    let (home, context, stream_type) = home(info, &mut scratch)?;
    if stream_type != stream {
        return Err(format!(
            "the connection info is not one for a {}",
            stream.name()
        ));
    }
    if context != id {
        return Err("the connection info's context is not the request's id".into());
    }
    Ok(home)
}

/// Where the caller waits, the id of the request that he says it is for, and for which of its
/// streams.
fn home<'s>(
    info: &ConnectionInfo<'_>,
    scratch: &'s mut [u8],
) -> Result<(CallHome, Cow<'s, str>, StreamType), String> {
    if info.transport == QUIC_RESPONSE {
        let info = QuicConnectionInfo::parse(info, scratch).map_err(|error| error.to_string())?;
        let home = quic_home(&info)?;
        return Ok((home, info.request_id.to_cow(), StreamType::Response));
    }
    let info = TcpConnectionInfo::parse(info, scratch).map_err(|error| error.to_string())?;
    let home = CallHome {
        address: info.socket_addr().map_err(|error| error.to_string())?,
        subject: info.subject.to_cow().into_owned(),
        quic: None,
        offers_mux: info.offers_mux,
    };
    Ok((home, info.context.to_cow(), info.stream_type))
}

fn quic_home(info: &QuicConnectionInfo<'_>) -> Result<CallHome, String> {
    let caller = QuicCaller::read(info)?;
    Ok(CallHome {
        address: caller.address,
        subject: info.registration_id.to_cow().into_owned(),
        quic: Some(Box::new(caller)),
        offers_mux: false,
    })
}

/// Where the caller is, if at least that can be read: his connection info must be whole, whatever
/// is wrong around it.
pub(crate) fn call_home_of(payload: &[u8]) -> Option<CallHome> {
    let Decoded::Frame(parts) = two_part::decode_prefix(payload, None) else {
        return None;
    };
    let mut members = Object::open(payload.get(parts.header)?).ok()?;
    while let Some(member) = members.next_member().ok()? {
        if member.key == "connection_info" {
            let info = ConnectionInfo::decode(member.value.raw()).ok()?;
            let mut scratch = scratch(&info);
            let (home, ..) = home(&info, &mut scratch).ok()?;
            return Some(CallHome {
                offers_mux: false,
                ..home
            });
        }
    }
    None
}

/// Room for an info of any length: a request id may be long.
fn scratch(info: &ConnectionInfo<'_>) -> Vec<u8> {
    vec![0; info.info.raw().len()]
}

/// A handler at work. A panic ends the request and nothing else.
pub(crate) struct Task {
    work: Option<Pin<Box<dyn Future<Output = ()>>>>,
    stream: Shared,
}

impl Task {
    pub(crate) fn new(
        handler: Rc<dyn Handler>,
        request: Request,
        responder: Responder,
        stream: Shared,
    ) -> Task {
        // Called inside the future, so that a panic of `handle` itself is caught as well.
        let work = async move { handler.handle(request, responder).await };
        stream.borrow_mut().task_began();
        Task {
            work: Some(Box::pin(work)),
            stream,
        }
    }

    fn poll_work(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(work) = &mut self.work else {
            return Poll::Ready(());
        };
        match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
            Ok(poll) => poll,
            Err(_) => {
                self.stream.borrow_mut().panicked();
                Poll::Ready(())
            }
        }
    }

    /// Drops the handler, whatever it does when it is dropped.
    fn put_down(&mut self) {
        let work = self.work.take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(work)));
    }
}

impl Future for Task {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let abandoned = self.stream.borrow_mut().task_polled(context);
        let began_ns = self.stream.borrow().is_timed().then(monotonic_ns);
        let pending = !abandoned && self.poll_work(context).is_pending();
        if let Some(began_ns) = began_ns {
            let busy_ns = monotonic_ns().saturating_sub(began_ns);
            self.stream.borrow_mut().was_busy(busy_ns);
        }
        if pending {
            return Poll::Pending;
        }
        self.put_down();
        Poll::Ready(())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.put_down();
        self.stream.borrow_mut().task_ended();
    }
}

#[cfg(test)]
mod tests {
    use corelane_codec::control_message::{NewControlMessage, TcpConnection};

    use super::*;

    fn frame(control: &[u8], body: &[u8]) -> Vec<u8> {
        let mut payload = Vec::new();
        two_part::write(control, body, &mut payload);
        let headers = br#"{"request-id":"r","x-a":"1"}"#;
        let mut frame = (headers.len() as u16).to_be_bytes().to_vec();
        frame.extend_from_slice(headers);
        frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        frame.extend_from_slice(&payload);
        frame
    }

    fn control(context: &str) -> String {
        let message = NewControlMessage {
            id: "id-1",
            request_type: RequestType::SingleIn,
            payload_codec: PayloadCodec::Json,
            connection_info: TcpConnection {
                address: "127.0.0.1:9",
                subject: "s",
                context,
                stream_type: StreamType::Response,
            },
            metadata: &[],
            frontend_send_ts_ns: None,
            request_stream_connection_info: None,
        };
        let mut out = Vec::new();
        message.write(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_good_frame_becomes_a_request() {
        let bytes = frame(control("id-1").as_bytes(), b" {\"a\":1} ");
        let Arrived { request, home, .. } = read(bytes, RequestType::SingleIn).unwrap();
        assert_eq!(
            (request.id(), request.codec()),
            ("id-1", PayloadCodec::Json)
        );
        assert_eq!(request.body(), b" {\"a\":1} ");
        assert_eq!(request.value().unwrap(), b"{\"a\":1}");
        assert!(request.header("x-a").unwrap() == "1" && request.header("x-b").is_none());
        assert_eq!(home.address, "127.0.0.1:9".parse().unwrap());
        assert_eq!(home.subject, "s");
    }

    #[test]
    fn what_is_wrong_is_said_and_the_caller_found_all_the_same() {
        let good = control("id-1");
        for (control, body, why) in [
            (control("other"), "1", "context"),
            (
                good.replace("\\\"response\\\"", "\\\"request\\\""),
                "1",
                "response",
            ),
            (good.replace("\"json\"", "\"cbor\""), "1", "payload_codec"),
            (good.replace("single_in", "many_in"), "1", "stream"),
            (good.replace("\"id\":\"id-1\",", ""), "1", "`id`"),
            (good.clone(), "", "no body"),
        ] {
            let undecodable = read(
                frame(control.as_bytes(), body.as_bytes()),
                RequestType::SingleIn,
            )
            .unwrap_err();
            assert!(undecodable.why.contains(why), "{}", undecodable.why);
            let home = undecodable.home.expect("the address was there");
            assert_eq!(home.subject, "s");
        }
        let mut cut = frame(good.as_bytes(), b"body");
        cut.truncate(cut.len() - 2);
        assert!(read(cut, RequestType::SingleIn).unwrap_err().home.is_some());
        for control in ["", "{}", "[]", &good.replace("tcp_server", "zmq")] {
            let undecodable =
                read(frame(control.as_bytes(), b"1"), RequestType::SingleIn).unwrap_err();
            assert_eq!(undecodable.home, None, "{control}");
        }
    }

    #[test]
    fn a_body_must_be_one_value() {
        for body in ["{", "1 2", "nope"] {
            let frame = frame(control("id-1").as_bytes(), body.as_bytes());
            let Arrived { request, .. } = read(frame, RequestType::SingleIn).unwrap();
            let error = request.value().unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with("the request's body is not json: ")
            );
        }
    }

    #[test]
    fn a_request_may_leave_its_core() {
        fn may_leave<T: Send>() {}
        may_leave::<Request>();
    }
}
