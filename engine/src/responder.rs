//! What a handler writes its response with, and the state that it shares with its shard.
//!
//! ```text
//! handler --item, finish--> out (encoded) --shard--> call-home socket
//! handler <--room, stopped-- wakers       <--shard-- bytes taken, "stop", "kill"
//! ```
//!
//! Both sides live on one thread and never borrow the state across a wait.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use corelane_codec::call_home::{self, SENTINEL_FRAME};
use corelane_codec::control_message::{PayloadCodec, StreamType};
use corelane_codec::error::DynamoError;
use corelane_codec::item::{self, Annotated};
use corelane_codec::two_part;

use crate::host::LaneJob;
pub use crate::host::{Host, Sleep};
use crate::input::Input;
use crate::outgoing::{Lent, Outgoing};
use crate::ring::monotonic_ns;

mod for_lane;

use for_lane::wrapping;

/// Items that may wait for the socket before a handler has to.
const ITEMS_MAX: u32 = 64;
/// Bytes that may.
const BYTES_MAX: usize = 256 * 1024;

/// The caller wants nothing more, or cannot be reached: the handler should end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the caller of this request is gone")]
pub struct Gone;

/// The state of one response.
pub(crate) struct Stream {
    codec: PayloadCodec,
    /// Encoded, and not given to the socket.
    out: Vec<u8>,
    out_items: u32,
    /// Blocks of a lane between the bytes of `out`, see [`Outgoing::lend`].
    lent: Vec<(usize, Lent)>,
    /// Who writes it instead of a task.
    job: Option<LaneJob>,
    /// Given to the socket, and not taken by it.
    sending_bytes: usize,
    sending_items: u32,
    /// The prologue has been written.
    began: bool,
    /// Nothing more will be written.
    over: bool,
    /// It ended with a sentinel, so the caller closes the socket.
    complete: bool,
    stopped: bool,
    killed: bool,
    /// The handler has been given time to end and has not.
    abandoned: bool,
    task_over: bool,
    task: Option<Waker>,
    wakers: Vec<Waker>,
    place: (u32, u32),
    touched: bool,
    host: Host,
    so_far: SoFar,
    /// The time that the handler is at work is measured.
    timed: bool,
}

/// What a response has come to, for the numbers of its handler and for its span.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SoFar {
    /// When the prologue was written; 0 before.
    pub(crate) began_ns: u64,
    /// Encoded items.
    pub(crate) bytes: u64,
    /// It ended with an error.
    pub(crate) failed: bool,
    /// The time that the handler was at work, if that is measured.
    pub(crate) busy_ns: u64,
}

/// A response's state as its shard and its handler hold it.
pub(crate) type Shared = Rc<RefCell<Stream>>;

impl Stream {
    /// A response without a handshake. It has no task yet.
    pub(crate) fn new(codec: PayloadCodec, host: &Host) -> Stream {
        Stream {
            codec,
            out: Vec::with_capacity(512),
            out_items: 0,
            lent: Vec::new(),
            job: None,
            sending_bytes: 0,
            sending_items: 0,
            began: false,
            over: false,
            complete: false,
            stopped: false,
            killed: false,
            abandoned: false,
            task_over: true,
            task: None,
            wakers: Vec::new(),
            place: (0, 0),
            touched: false,
            host: host.clone(),
            so_far: SoFar::default(),
            timed: false,
        }
    }

    // --- for the shard ---------------------------------------------------------------

    /// It is to have a socket of its own, which begins with the handshake of `subject`.
    pub(crate) fn shake(&mut self, subject: &str) {
        let written = std::mem::take(&mut self.out);
        let out = &mut self.out;
        out.reserve(written.len() + 512);
        call_home::write_handshake(subject, StreamType::Response, out);
        out.extend_from_slice(&written);
    }

    /// What is written and not given to a connection, and whether nothing will follow it.
    pub(crate) fn written(&self) -> (&[u8], bool) {
        (&self.out, self.over)
    }

    /// A shared connection has taken so many bytes of that.
    pub(crate) fn gave(&mut self, bytes: usize) {
        let before = self.out.len().max(1);
        self.out.drain(..bytes);
        let left = self.out_items as usize * self.out.len();
        self.out_items = left.div_ceil(before) as u32;
        self.wake_all();
    }

    /// Asks the shard to look again in its next turn.
    pub(crate) fn look_again(&mut self) {
        self.touch();
    }

    /// Where the shard keeps it: slot and generation.
    pub(crate) fn set_place(&mut self, place: (u32, u32)) {
        self.place = place;
    }

    /// Where that is.
    pub(crate) fn place(&self) -> (u32, u32) {
        self.place
    }

    /// What it has come to.
    pub(crate) fn so_far(&self) -> SoFar {
        self.so_far
    }

    /// From now on the time that the handler is at work is measured.
    pub(crate) fn time(&mut self) {
        self.timed = true;
    }

    pub(crate) fn is_timed(&self) -> bool {
        self.timed
    }

    pub(crate) fn was_busy(&mut self, ns: u64) {
        self.so_far.busy_ns += ns;
    }

    /// The shard has seen what was touched.
    pub(crate) fn seen(&mut self) {
        self.touched = false;
    }

    /// Whether nothing more will be written and all has been given to the socket.
    pub(crate) fn is_written(&self) -> bool {
        self.over && self.out.is_empty()
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    pub(crate) fn is_task_over(&self) -> bool {
        self.task_over
    }

    /// Gives what there is to the socket; false when there is nothing.
    pub(crate) fn give(&mut self, to: &mut Outgoing) -> bool {
        debug_assert!(to.is_empty());
        std::mem::swap(to.waiting(), &mut self.out);
        to.lend(&mut self.lent);
        self.sending_bytes = to.unsent();
        self.sending_items = std::mem::take(&mut self.out_items);
        self.sending_bytes > 0
    }

    /// The socket has taken all that it was given.
    pub(crate) fn taken(&mut self) {
        self.sending_bytes = 0;
        self.sending_items = 0;
        self.wake_all();
    }

    /// The caller wants no more, or is gone. What has not been given to the socket is thrown away.
    pub(crate) fn stop(&mut self, kill: bool) {
        self.stopped = true;
        self.killed |= kill;
        self.over = true;
        self.complete = false;
        self.out.clear();
        self.out_items = 0;
        self.stop_lane(kill);
        self.wake_all();
    }

    /// The handler is to be dropped.
    pub(crate) fn abandon(&mut self) {
        self.abandoned = true;
        if let Some(task) = self.task.take() {
            self.host.wake(task);
        }
    }

    fn wake_all(&mut self) {
        for waker in std::mem::take(&mut self.wakers) {
            self.host.wake(waker);
        }
    }

    // --- for the task ----------------------------------------------------------------

    pub(crate) fn task_began(&mut self) {
        self.task_over = false;
        self.host.task_began();
    }

    /// Notes whom to wake; answers whether the handler is to be dropped.
    pub(crate) fn task_polled(&mut self, context: &mut Context<'_>) -> bool {
        match &self.task {
            Some(task) if task.will_wake(context.waker()) => {}
            _ => self.task = Some(context.waker().clone()),
        }
        self.abandoned
    }

    pub(crate) fn task_ended(&mut self) {
        self.task_over = true;
        self.task = None;
        self.host.task_ended();
        self.touch();
    }

    /// The handler panicked: the caller gets an error, as for any other failure.
    pub(crate) fn panicked(&mut self) {
        self.fail(&DynamoError::backend_unknown(
            "the handler of this request panicked",
        ));
    }

    // --- for the responder -----------------------------------------------------------

    fn touch(&mut self) {
        if !self.touched {
            self.touched = true;
            self.host.touched(self.place);
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.out_items + self.sending_items >= ITEMS_MAX
            || self.out.len() + self.sending_bytes >= BYTES_MAX
    }

    fn wait(&mut self, context: &mut Context<'_>) {
        if !self
            .wakers
            .iter()
            .any(|waker| waker.will_wake(context.waker()))
        {
            self.wakers.push(context.waker().clone());
        }
    }

    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        if self.over {
            return Poll::Ready(Err(Gone));
        }
        if !self.is_full() {
            return Poll::Ready(Ok(()));
        }
        self.wait(context);
        Poll::Pending
    }

    /// The request is taken on: its prologue leaves before the first item.
    pub(crate) fn take_on(&mut self) {
        if !self.began && !self.over {
            self.begin();
            self.touch();
        }
    }

    pub(crate) fn codec(&self) -> PayloadCodec {
        self.codec
    }

    fn begin(&mut self) {
        if !self.began {
            self.began = true;
            self.so_far.began_ns = monotonic_ns();
            self.out.extend_from_slice(&call_home::PROLOGUE_OK_FRAME);
        }
    }

    /// One item whose data are `parts`, one behind the other.
    fn write_item(&mut self, parts: [&[u8]; 3]) {
        self.begin();
        let (before, after) = item::around(self.codec);
        let data_bytes: usize = parts.iter().map(|part| part.len()).sum();
        let body_bytes = before.len() + data_bytes + after.len();
        self.out.extend_from_slice(&two_part::prefix(0, body_bytes));
        self.out.extend_from_slice(before);
        for part in parts {
            self.out.extend_from_slice(part);
        }
        self.out.extend_from_slice(after);
        self.so_far.bytes += body_bytes as u64;
        self.out_items += 1;
        self.touch();
    }

    fn write_error_item(&mut self, error: &DynamoError) {
        let item = Annotated::<()>::from_error(error.clone());
        let mut data = Vec::with_capacity(256);
        // Texts and words always have a form in both codecs.
        if item::write_value(&item, self.codec, &mut data).is_ok() {
            self.write_item([&data, b"", b""]);
        }
    }

    pub(crate) fn finish(&mut self) {
        if self.over {
            return;
        }
        self.begin();
        let last = call_home::final_marker_frame(self.codec);
        self.out.extend_from_slice(last);
        self.end();
    }

    /// An error prologue as long as there is no prologue, an error item after that.
    pub(crate) fn fail(&mut self, error: &DynamoError) {
        if self.over {
            return;
        }
        self.so_far.failed = true;
        if self.began {
            self.write_error_item(error);
            return self.finish();
        }
        self.began = true;
        self.so_far.began_ns = monotonic_ns();
        call_home::write_prologue_error(error.text(), Some(&error.to_json()), &mut self.out);
        self.end();
    }

    fn end(&mut self) {
        self.out.extend_from_slice(&SENTINEL_FRAME);
        self.over = true;
        self.complete = true;
        self.touch();
    }
}

/// Writes the response of one request. Dropped before [`Responder::finish`] or
/// [`Responder::fail`] it closes the socket, and the caller sees a worker that was lost.
pub struct Responder {
    stream: Shared,
    host: Host,
    input: Option<Input>,
}

impl Responder {
    pub(crate) fn new(stream: &Shared) -> Responder {
        let host = stream.borrow().host.clone();
        Responder {
            stream: Rc::clone(stream),
            host,
            input: None,
        }
    }

    pub(crate) fn set_input(&mut self, input: Input) {
        self.input = Some(input);
    }

    /// The stream of the request's values, once, where the endpoint takes one
    /// ([`crate::handler::Handler::takes`]).
    pub fn take_input(&mut self) -> Option<Input> {
        self.input.take()
    }

    /// How items are to be encoded.
    pub fn codec(&self) -> PayloadCodec {
        self.stream.borrow().codec
    }

    /// Writes one item; `data` is one encoded value of the endpoint's response type. Waits while
    /// 64 items or 256 KiB wait for the caller.
    ///
    /// # Errors
    /// [`Gone`]: the item is not written, and no later one will be.
    pub async fn item(&mut self, data: &[u8]) -> Result<(), Gone> {
        self.room().await?;
        self.stream.borrow_mut().write_item([data, b"", b""]);
        Ok(())
    }

    /// Writes one item of the usual type: `Annotated` with `value`, one encoded value, as its data.
    ///
    /// # Errors
    /// As [`Responder::item`].
    pub async fn annotated(&mut self, value: &[u8]) -> Result<(), Gone> {
        self.room().await?;
        let mut stream = self.stream.borrow_mut();
        let [before, after] = wrapping(stream.codec, true);
        stream.write_item([before, value, after]);
        Ok(())
    }

    /// Writes an item that is an error. The response goes on.
    ///
    /// # Errors
    /// As [`Responder::item`].
    pub async fn error_item(&mut self, error: &DynamoError) -> Result<(), Gone> {
        self.room().await?;
        self.stream.borrow_mut().write_error_item(error);
        Ok(())
    }

    /// Ends the response with an error: in the prologue if there was no item, else as last item.
    pub fn fail(self, error: &DynamoError) {
        self.stream.borrow_mut().fail(error);
    }

    /// Ends the response well.
    pub fn finish(self) {
        self.stream.borrow_mut().finish();
    }

    /// Whether the caller asked to stop, or is gone.
    pub fn is_stopped(&self) -> bool {
        self.stream.borrow().stopped
    }

    /// Whether the caller asked to be spared the rest, or is gone.
    pub fn is_killed(&self) -> bool {
        self.stream.borrow().killed
    }

    /// Waits until [`Responder::is_stopped`].
    pub async fn stopped(&self) {
        poll_fn(|context| self.poll_stopped(context)).await;
    }

    /// Waits for so long, at least.
    ///
    /// # Errors
    /// [`Gone`] at once when the caller asks to stop or is gone.
    pub async fn sleep(&self, time: Duration) -> Result<(), Gone> {
        let mut sleep = self.host.sleep(time);
        poll_fn(|context| {
            if self.poll_stopped(context).is_ready() {
                return Poll::Ready(Err(Gone));
            }
            Pin::new(&mut sleep).poll(context).map(Ok)
        })
        .await
    }

    fn poll_stopped(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut stream = self.stream.borrow_mut();
        if stream.stopped {
            return Poll::Ready(());
        }
        stream.wait(context);
        Poll::Pending
    }

    async fn room(&self) -> Result<(), Gone> {
        poll_fn(|context| self.stream.borrow_mut().poll_room(context)).await
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        // During a panic the task ends the response, with an error.
        if std::thread::panicking() {
            return;
        }
        let mut stream = self.stream.borrow_mut();
        if !stream.over {
            stream.over = true;
            stream.touch();
        }
    }
}
