//! A shard with handlers or calls of its own, and hand-made peers for both.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel};
use std::time::{Duration, Instant};

use corelane_codec::call_home::{self, Handshake};
use corelane_codec::control_message::{self, PayloadCodec, StreamType, TcpConnectionInfo};
use corelane_codec::error::DynamoError;
use corelane_codec::{Decoded, item, reply_frame, request_frame, two_part};
use corelane_engine::call::{Deadlines, NewCall};
use corelane_engine::command::LocalPath;
use corelane_engine::config::{RingKind, ShardConfig};
use corelane_engine::ends::{Ends, HomeAddress};
use corelane_engine::executor::{ShardHandle, spawn_with};
use corelane_engine::handler::{Handler, MakeHandler, Request};
use corelane_engine::local::{Ending, Reply, Run};
use corelane_engine::responder::{Host, Responder};
use corelane_engine::shard::Command;

use crate::common::{self, Caller, DEADLINE, wait_until};

pub const SERVED: &str = "a1/test/worker/generate";

/// A handler that runs `serve`, made on the shard's thread.
pub fn handler<F, A>(serve: F) -> MakeHandler
where
    F: Fn(Request, Responder) -> A + Send + 'static,
    A: Future<Output = ()> + 'static,
{
    Box::new(move |_| Rc::new(serve) as Rc<dyn Handler>)
}

/// Any port of loopback for calls home.
pub fn home() -> HomeAddress {
    let loopback = [127, 0, 0, 1].into();
    HomeAddress {
        bind: SocketAddr::new(loopback, 0),
        advertise: loopback,
    }
}

/// A worker that answers each request with its body, so many times.
pub fn echoing(ring: RingKind, items: u32) -> Local {
    let make = handler(
        move |request: Request, mut responder: Responder| async move {
            for _ in 0..items {
                if responder.item(request.body()).await.is_err() {
                    return;
                }
            }
            responder.finish();
        },
    );
    Local::worker(ring, make)
}

/// What becomes of calls is read from here, so much of it at most.
const EVENTS_MAX: usize = 1024;

/// A shard with ends.
pub struct Local {
    pub handle: ShardHandle,
    events: Receiver<CallEvent>,
    sender: SyncSender<CallEvent>,
}

impl Local {
    pub fn start(ring: RingKind, ends: Ends) -> Local {
        Local::with_buffers(ring, ends, 1024)
    }

    pub fn with_buffers(ring: RingKind, ends: Ends, buffers: u16) -> Local {
        Local::with(ring, ends, |config| config.buffers = buffers)
    }

    pub fn with(ring: RingKind, ends: Ends, change: impl FnOnce(&mut ShardConfig)) -> Local {
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let cpu = corelane_engine::placement::affinity().unwrap()[0];
        let mut config = ShardConfig::new(0, cpu, ring, Some(listen));
        config.buffers = 1024;
        change(&mut config);
        let (sender, events) = sync_channel(EVENTS_MAX);
        Local {
            handle: spawn_with(config, ends).unwrap(),
            events,
            sender,
        }
    }

    /// A worker that serves [`SERVED`] with `make`.
    pub fn worker(ring: RingKind, make: MakeHandler) -> Local {
        Local::serving(ring, Ends::worker(vec![make]))
    }

    pub fn serving(ring: RingKind, ends: Ends) -> Local {
        let worker = Local::start(ring, ends);
        let path = SERVED.into();
        let paths = vec![LocalPath { path, handler: 0 }];
        worker.handle.command(Command::Serve(paths)).unwrap();
        // Refused until the paths are known.
        wait_until("it serves", || {
            let mut caller = Caller::dial(worker.address());
            caller.send(&common::frame(SERVED, b""));
            caller.reply().is_empty()
        });
        worker
    }

    pub fn client(ring: RingKind) -> Local {
        Local::start(ring, Ends::client(home(), 1024))
    }

    pub fn address(&self) -> SocketAddr {
        self.handle.address.unwrap()
    }

    /// Makes a call of that number; its events come from [`Local::event`].
    pub fn call(&self, number: u64, call: NewCall) {
        let out = self.sender.clone();
        self.run(move |host| follow(host, number, call, out));
    }

    /// Ends a call early, if it has not ended.
    pub fn end_call(&self, number: u64, kill: bool) {
        self.run(move |_| async move {
            let reply = CALLS.with_borrow(|calls| calls.get(&number).cloned());
            match reply {
                Some(reply) if kill => reply.borrow().kill(),
                Some(reply) => reply.borrow().stop(),
                None => {}
            }
        });
    }

    fn run<A: Future<Output = ()> + 'static>(&self, make: impl FnOnce(Host) -> A + Send + 'static) {
        self.handle.command(Command::Run(Run::new(make))).unwrap();
    }

    /// The next event of any call.
    pub fn event(&self) -> CallEvent {
        self.events.recv_timeout(DEADLINE).expect("an event")
    }

    /// All events of one call, which is the only one, without the acknowledgement.
    pub fn outcome(&self) -> Vec<What> {
        let mut all = Vec::new();
        loop {
            let what = self.event().what;
            if what == What::Acked {
                continue;
            }
            let over = what.is_end();
            all.push(what);
            if over {
                return all;
            }
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

/// Something that happened to a call.
#[derive(Debug)]
pub struct CallEvent {
    pub call: u64,
    pub what: What,
}

/// What happens to calls. The last four are ends.
#[derive(Clone, Debug, PartialEq)]
pub enum What {
    Acked,
    Item(Vec<u8>),
    BadItem(DynamoError),
    Finished,
    Refused(String),
    Failed(DynamoError),
    Stopped,
}

impl What {
    pub fn is_end(&self) -> bool {
        !matches!(self, What::Acked | What::Item(_) | What::BadItem(_))
    }

    /// An error, the last thing of a call that has ended so.
    fn last(error: DynamoError, ending: Option<Ending>) -> What {
        match ending {
            Some(Ending::Refused) => What::Refused(error.text().into()),
            Some(Ending::Failed) => What::Failed(error),
            _ => What::BadItem(error),
        }
    }
}

thread_local! {
    /// The calls of a shard, by number.
    static CALLS: RefCell<HashMap<u64, Rc<RefCell<Reply>>>> = RefCell::default();
}

/// Makes a call and tells what becomes of it; runs on the shard.
async fn follow(host: Host, number: u64, call: NewCall, out: SyncSender<CallEvent>) {
    let reply = Rc::new(RefCell::new(host.caller().call(call)));
    CALLS.with_borrow_mut(|calls| calls.insert(number, Rc::clone(&reply)));
    let say = async |what| {
        let mut event = CallEvent { call: number, what };
        while let Err(TrySendError::Full(back)) = out.try_send(event) {
            event = back;
            host.sleep(Duration::from_millis(1)).await;
        }
    };
    let accepted = poll_fn(|context| reply.borrow_mut().poll_accepted(context)).await;
    let ending = reply.borrow().ending();
    if let Err(error) = accepted {
        say(What::last(error, ending)).await;
    } else {
        if reply.borrow().times().accepted.is_some() {
            say(What::Acked).await;
        }
        read(&reply, say).await;
    }
    CALLS.with_borrow_mut(|calls| calls.remove(&number));
}

async fn read(reply: &RefCell<Reply>, say: impl AsyncFn(What)) {
    // An error is an item, or the end: what comes next tells.
    let mut held = None;
    loop {
        let next = poll_fn(|context| reply.borrow_mut().poll_next(context)).await;
        let ending = match next {
            Some(_) => None,
            None => reply.borrow().ending(),
        };
        if let Some(error) = held.take() {
            say(What::last(error, ending)).await;
        }
        match (next, ending) {
            (Some(Ok(item)), _) => say(What::Item(item.into_bytes())).await,
            (Some(Err(error)), _) => held = Some(error),
            (None, Some(Ending::Complete)) => return say(What::Finished).await,
            (None, Some(Ending::Stopped)) => return say(What::Stopped).await,
            (None, _) => return,
        }
    }
}

/// Runs a task on a shard; what it answers.
pub fn run<T, F, A>(local: &Local, task: F) -> Receiver<T>
where
    T: Send + 'static,
    F: FnOnce(Host) -> A + Send + 'static,
    A: Future<Output = T> + 'static,
{
    let (sender, receiver) = channel();
    let run = Run::new(move |host| async move {
        let _ = sender.send(task(host).await);
    });
    local.handle.command(Command::Run(run)).unwrap();
    receiver
}

/// What a task has answered.
pub fn answered<T>(receiver: &Receiver<T>) -> T {
    receiver.recv_timeout(DEADLINE).expect("an answer in time")
}

/// A call with a short body in JSON.
pub fn call_to(address: SocketAddr) -> NewCall {
    NewCall {
        address,
        path: SERVED.into(),
        id: String::new(),
        headers: Vec::new(),
        body: b"{\"a\":1}".to_vec(),
        codec: PayloadCodec::Json,
        deadlines: Deadlines::default(),
    }
}

/// A hand-made frontend: a caller and the place where it is called home.
pub struct Frontend {
    pub caller: Caller,
    pub listener: TcpListener,
}

impl Frontend {
    pub fn of(worker: &Local) -> Frontend {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let caller = Caller::dial(worker.address());
        Frontend { caller, listener }
    }

    pub fn frame(&self, subject: &str, codec: PayloadCodec, body: &[u8]) -> Vec<u8> {
        let address = self.listener.local_addr().unwrap().to_string();
        common::frame(SERVED, &common::envelope_in(&address, subject, codec, body))
    }

    pub fn send(&mut self, subject: &str, codec: PayloadCodec, body: &[u8]) {
        let frame = self.frame(subject, codec, body);
        self.caller.send(&frame);
        assert_eq!(self.caller.reply(), "");
    }

    /// The next call home.
    pub fn called(&self) -> Called {
        accept(&self.listener)
    }

    /// One whole call: the data of its items.
    pub fn call(&mut self, codec: PayloadCodec, body: &[u8]) -> Vec<Vec<u8>> {
        self.send("subject-1", codec, body);
        let mut called = self.called();
        assert_eq!(called.handshake(), "subject-1");
        called.prologue_ok();
        called.items_to_the_end(codec)
    }
}

/// The next connection to a call-home listener.
pub fn accept(listener: &TcpListener) -> Called {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + DEADLINE;
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(_) => assert!(Instant::now() < deadline, "nobody calls home"),
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let bytes = Vec::new();
    Called { stream, bytes }
}

/// One call-home socket, at the frontend's end.
pub struct Called {
    pub stream: TcpStream,
    bytes: Vec<u8>,
}

impl Called {
    pub fn of(stream: TcpStream) -> Called {
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let bytes = Vec::new();
        Called { stream, bytes }
    }

    /// Header and body of the next message; `None` at the end of the stream or a reset.
    pub fn message(&mut self) -> Option<(Vec<u8>, Vec<u8>)> {
        loop {
            if let Decoded::Frame(message) = two_part::decode(&self.bytes, None) {
                let header = self.bytes[message.header.clone()].to_vec();
                let body = self.bytes[message.body.clone()].to_vec();
                self.bytes.drain(..message.frame_bytes());
                return Some((header, body));
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return None,
                Ok(read) => self.bytes.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no message: {error}"),
            }
        }
    }

    pub fn handshake(&mut self) -> String {
        let (header, _) = self.message().expect("a handshake");
        Handshake::decode(&header)
            .unwrap()
            .subject
            .to_cow()
            .into_owned()
    }

    pub fn prologue_ok(&mut self) {
        let (header, body) = self.message().expect("a prologue");
        assert_eq!(
            (&header[..], &body[..]),
            (&call_home::PROLOGUE_OK[..], &b""[..])
        );
    }

    /// The next item's data, `None` for the final marker.
    pub fn item(&mut self, codec: PayloadCodec) -> Option<Vec<u8>> {
        let (header, body) = self.message().expect("an item");
        assert_eq!(String::from_utf8_lossy(&header), "");
        let item = item::decode(&body, codec).unwrap();
        assert_eq!(item.complete_final, item.data.is_none());
        item.data.map(|range| body[range].to_vec())
    }

    pub fn items_to_the_end(&mut self, codec: PayloadCodec) -> Vec<Vec<u8>> {
        let mut items = Vec::new();
        while let Some(data) = self.item(codec) {
            items.push(data);
        }
        let (header, _) = self.message().expect("a sentinel");
        assert_eq!(header, call_home::SENTINEL);
        items
    }

    /// The text of an error prologue and all that follows.
    pub fn error_prologue(&mut self) -> String {
        let (header, _) = self.message().expect("a prologue");
        assert_eq!(self.message().expect("a sentinel").0, call_home::SENTINEL);
        String::from_utf8(header).unwrap()
    }

    pub fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }
}

/// A hand-made worker: one request connection.
pub struct HandWorker {
    pub listener: TcpListener,
    pub stream: Option<TcpStream>,
    /// A connection that it does not look at.
    aside: Option<TcpStream>,
    bytes: Vec<u8>,
}

/// A request as a hand-made worker reads it.
pub struct Asked {
    pub path: String,
    pub headers: String,
    pub address: SocketAddr,
    pub subject: String,
    /// The subject of the request stream, if there is one.
    pub input: Option<String>,
    pub body: Vec<u8>,
}

impl Default for HandWorker {
    fn default() -> Self {
        HandWorker {
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            stream: None,
            aside: None,
            bytes: Vec::new(),
        }
    }
}

impl HandWorker {
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// Whether a request has come, or a part of one. Does not wait.
    pub fn has_some(&mut self) -> bool {
        self.listener.set_nonblocking(true).unwrap();
        if self.stream.is_none() {
            let Ok((stream, _)) = self.listener.accept() else {
                return false;
            };
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            self.stream = Some(stream);
        }
        let stream = self.stream.as_ref().unwrap();
        stream.set_nonblocking(true).unwrap();
        let some = matches!(stream.peek(&mut [0]), Ok(1)) || !self.bytes.is_empty();
        stream.set_nonblocking(false).unwrap();
        some
    }

    /// Looks at the next connection from now on; the first one stays open.
    pub fn bulk(&mut self) {
        self.connected();
        self.aside = self.stream.take();
        self.connected();
    }

    fn connected(&mut self) -> &mut TcpStream {
        self.stream
            .get_or_insert_with(|| accept(&self.listener).stream)
    }

    /// The bytes of the next frame.
    pub fn take_frame(&mut self) -> Vec<u8> {
        self.connected();
        let stream = self.stream.as_mut().unwrap();
        loop {
            if let Decoded::Frame(frame) = request_frame::decode_strict(&self.bytes) {
                let taken = frame.frame_bytes;
                return self.bytes.drain(..taken).collect();
            }
            let mut chunk = [0; 4096];
            let read = stream.read(&mut chunk).expect("a request in time");
            assert!(read > 0, "the client closed the connection");
            self.bytes.extend_from_slice(&chunk[..read]);
        }
    }

    pub fn take(&mut self) -> Asked {
        let bytes = self.take_frame();
        let frame = request_frame::decode_strict(&bytes).frame().unwrap();
        let parts = two_part::decode(frame.payload, None).frame().unwrap();
        let control = control_message::decode(&frame.payload[parts.header]).unwrap();
        let mut scratch = [0; 1024];
        let info = TcpConnectionInfo::parse(&control.connection_info, &mut scratch);
        let info = info.unwrap();
        assert!(info.context == *control.id.to_cow());
        let input = control.request_stream_connection_info.map(|info| {
            let mut scratch = [0; 1024];
            let info = TcpConnectionInfo::parse(&info, &mut scratch).unwrap();
            assert_eq!(info.stream_type, StreamType::Request);
            info.subject.to_cow().into_owned()
        });
        Asked {
            input,
            path: frame.path.into(),
            headers: String::from_utf8(frame.headers.to_vec()).unwrap(),
            address: info.socket_addr().unwrap(),
            subject: info.subject.to_cow().into_owned(),
            body: frame.payload[parts.body].to_vec(),
        }
    }

    pub fn reply(&mut self, text: &str) {
        let mut out = Vec::new();
        reply_frame::write(&[text], &mut out);
        self.stream.as_mut().unwrap().write_all(&out).unwrap();
    }
}

impl Asked {
    /// Dials the caller and says for which call.
    pub fn call_home(&self) -> Called {
        let mut called = self.dial();
        let mut out = Vec::new();
        call_home::write_handshake(&self.subject, StreamType::Response, &mut out);
        called.say(&out);
        called
    }

    pub fn dial(&self) -> Called {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let bytes = Vec::new();
        Called { stream, bytes }
    }
}

/// The bytes of a golden file.
pub fn golden(name: &str) -> Vec<u8> {
    let path = format!(
        "{}/../codec/golden/1.6.1/request_plane/{name}.hex",
        env!("CARGO_MANIFEST_DIR")
    );
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let nibble = |digit: u8| (digit as char).to_digit(16).unwrap() as u8;
    digits
        .chunks(2)
        .map(|pair| nibble(pair[0]) << 4 | nibble(pair[1]))
        .collect()
}
