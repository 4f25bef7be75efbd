//! One response at the caller's side: what comes as frames goes to the core that waits for it as
//! call-home messages, and what that says goes back as frames.
//!
//! ```text
//! Register                     -> Inbound; the core's welcome is answered by Registered
//! Prologue | Error             -> prologue
//! FirstData, Data...           -> item, item...    bulk frames that are early wait for it
//! End                          -> sentinel
//! Reset                        -> end without sentinel
//! Stop | Kill                  <- stop, kill
//! Reset                        <- end without a word, or a core that does not take what comes
//! ```

use std::cell::Cell;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::time::Duration;

use corelane_codec::Decoded;
use corelane_codec::call_home::{
    KILL, PROLOGUE_OK_FRAME, SENTINEL_FRAME, STOP, write_prologue_error,
};
use corelane_codec::limits::TWO_PART_PREFIX_BYTES;
use corelane_codec::quic_frame::Kind;
use corelane_codec::two_part;
use corelane_engine::quic::{Inbound, WELCOME, core_of};
use corelane_engine::shard::Command;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::TYPED_ERROR;
use super::home::{Back, Bundle, Home};

/// Frames and bytes of a response that may come before its first item: bulk lanes overtake.
const EARLY_FRAMES_MAX: usize = 1024;
const EARLY_BYTES_MAX: usize = 16 << 20;
/// Bytes of one response that may wait for its core, and of all of them.
const WAITING_BYTES_MAX: usize = 64 << 20;
const WAITING_BYTES_ALL_MAX: usize = 1 << 30;
/// How long a core may take to say whether it waits.
const WELCOME_MAX: Duration = Duration::from_secs(10);
/// How long its queue may be full.
const COMMAND_MAX: Duration = Duration::from_secs(5);
/// Bytes that are written together as a rule.
const TOGETHER_BYTES: usize = 64 * 1024;
/// No control message that we know is longer.
const CONTROL_BYTES_MAX: usize = 256;

/// What has come for a response.
enum Heard {
    /// Bytes for its core.
    Bytes(Waiting),
    /// The same, and no more will come.
    Last(Waiting),
}

/// Bytes that count as waiting as long as they live.
struct Waiting {
    bytes: Vec<u8>,
    counts: [Rc<Cell<usize>>; 2],
}

impl Drop for Waiting {
    fn drop(&mut self) {
        for count in &self.counts {
            count.set(count.get() - self.bytes.len());
        }
    }
}

/// What a frame means for its response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heed {
    /// More may come.
    On,
    /// It was the last.
    Over,
    /// The worker has reset it.
    Reset,
    /// Its core does not keep up, or it makes no sense: it is to be reset.
    Refused,
}

impl Heed {
    fn of(kept: Option<()>) -> Heed {
        match kept {
            Some(()) => Heed::On,
            None => Heed::Refused,
        }
    }
}

/// What waits for the core of a response.
pub(super) struct Mailbox(mpsc::Receiver<Heard>);

/// A response as its lanes see it.
pub(super) struct Taken {
    mailbox: mpsc::Sender<Heard>,
    /// Bytes that wait: of all responses, of this one.
    counts: [Rc<Cell<usize>>; 2],
    /// The first item has come, or the word that there is none.
    begun: bool,
    early: Vec<(Kind, Waiting)>,
    early_bytes: usize,
}

impl Taken {
    /// For `items_max` that may wait; `waiting_bytes` counts those of all responses.
    pub(super) fn new(items_max: usize, waiting_bytes: &Rc<Cell<usize>>) -> (Taken, Mailbox) {
        let (sender, receiver) = mpsc::channel(items_max);
        let taken = Taken {
            mailbox: sender,
            counts: [Rc::clone(waiting_bytes), Rc::default()],
            begun: false,
            early: Vec::new(),
            early_bytes: 0,
        };
        (taken, Mailbox(receiver))
    }

    /// A frame has come.
    pub(super) fn hear(&mut self, kind: Kind, payload: &[u8]) -> Heed {
        match kind {
            Kind::Prologue => Heed::of(self.push(PROLOGUE_OK_FRAME.to_vec())),
            Kind::Error => self.last(prologue_error(payload)),
            Kind::FirstData if !self.begun => {
                let first = self.push(item(payload));
                first.map_or(Heed::Refused, |()| self.begin())
            }
            Kind::PriorityEnd if !self.begun => self.begin(),
            Kind::Data if self.begun => Heed::of(self.push(item(payload))),
            Kind::End if self.begun => self.last(Vec::new()),
            Kind::Data => Heed::of(self.hold(kind, item(payload))),
            Kind::End => Heed::of(self.hold(kind, Vec::new())),
            Kind::Reset => Heed::Reset,
            _ => Heed::Refused,
        }
    }

    fn wait(&self, bytes: Vec<u8>) -> Option<Waiting> {
        let more = bytes.len();
        let [all, own] = &self.counts;
        if all.get() + more > WAITING_BYTES_ALL_MAX || own.get() + more > WAITING_BYTES_MAX {
            return None;
        }
        self.counts
            .iter()
            .for_each(|count| count.set(count.get() + more));
        let counts = self.counts.clone();
        Some(Waiting { bytes, counts })
    }

    fn push(&self, bytes: Vec<u8>) -> Option<()> {
        let waiting = self.wait(bytes)?;
        self.mailbox.try_send(Heard::Bytes(waiting)).ok()
    }

    fn last(&self, mut bytes: Vec<u8>) -> Heed {
        bytes.extend_from_slice(&SENTINEL_FRAME);
        let last = self.wait(bytes).map(Heard::Last);
        match last.map(|last| self.mailbox.try_send(last)) {
            Some(Ok(())) => Heed::Over,
            _ => Heed::Refused,
        }
    }

    /// A bulk frame that has overtaken the first item.
    fn hold(&mut self, kind: Kind, bytes: Vec<u8>) -> Option<()> {
        self.early_bytes += bytes.len();
        if self.early.len() >= EARLY_FRAMES_MAX || self.early_bytes > EARLY_BYTES_MAX {
            return None;
        }
        let waiting = self.wait(bytes)?;
        self.early.push((kind, waiting));
        Some(())
    }

    /// Those may follow now that were early.
    fn begin(&mut self) -> Heed {
        self.begun = true;
        for (kind, waiting) in std::mem::take(&mut self.early) {
            if kind == Kind::End {
                return self.last(Vec::new());
            }
            if self.mailbox.try_send(Heard::Bytes(waiting)).is_err() {
                return Heed::Refused;
            }
        }
        Heed::On
    }
}

/// An item as a message.
fn item(payload: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(TWO_PART_PREFIX_BYTES + payload.len());
    message.extend_from_slice(&two_part::prefix(0, payload.len()));
    message.extend_from_slice(payload);
    message
}

/// An error in JSON, with its type.
#[derive(Deserialize)]
struct TypedError<'a> {
    kind: String,
    error: String,
    #[serde(borrow)]
    typed_error: &'a RawValue,
}

/// The prologue of a response that could not be established: of a text, or of a typed error.
fn prologue_error(payload: &[u8]) -> Vec<u8> {
    let mut prologue = Vec::with_capacity(payload.len() + 64);
    match serde_json::from_slice::<TypedError<'_>>(payload) {
        Ok(typed) if typed.kind == TYPED_ERROR => {
            let json = typed.typed_error.get().as_bytes();
            write_prologue_error(&typed.error, Some(json), &mut prologue);
        }
        _ => {
            let text = String::from_utf8_lossy(payload);
            write_prologue_error(&text, None, &mut prologue);
        }
    }
    prologue
}

/// Brings a response to the core that waits for it, until it ends, or the core wants no more.
pub(super) async fn carry(bundle: &Bundle, id: [u8; 16], back: &Back, mailbox: Mailbox) {
    let Some(pair) = knock(&bundle.home, id).await else {
        return bundle.refuse(id, back);
    };
    if mailbox.0.sender_strong_count() == 0 {
        // Its worker has thought better of it.
        return;
    }
    let stats = &bundle.home.stats.caller;
    stats.begun.add();
    back.say(Kind::Registered, &id);
    match pump(pair, mailbox, |kind| back.say(kind, &id)).await {
        Left::Whole => {}
        Left::Killed => bundle.forget(&id),
        Left::Cut => {
            stats.resets_sent.add();
            back.say(Kind::Reset, &id);
            bundle.forget(&id);
        }
    }
}

/// Asks the core whether it waits; answers with our end of the pair.
async fn knock(home: &Home, id: [u8; 16]) -> Option<UnixStream> {
    let commands = home.core(core_of(&id))?;
    let (ours, theirs) = StdUnixStream::pair().ok()?;
    ours.set_nonblocking(true).ok()?;
    let mut ours = UnixStream::from_std(ours).ok()?;
    let mut command = Command::Inbound(Inbound {
        socket: theirs.into(),
        registration_id: id,
    });
    let deadline = Instant::now() + COMMAND_MAX;
    while let Err(again) = commands.send(command) {
        if Instant::now() >= deadline {
            return None;
        }
        command = again;
        sleep(Duration::from_millis(1)).await;
    }
    let mut welcome = WELCOME;
    let read = timeout(WELCOME_MAX, ours.read_exact(&mut welcome)).await;
    (matches!(read, Ok(Ok(_))) && welcome == WELCOME).then_some(ours)
}

/// How a response was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// All that has come is with its core, and no more will.
    Whole,
    /// The core has killed it.
    Killed,
    /// The core has closed without a word.
    Cut,
}

async fn pump(mut pair: UnixStream, mailbox: Mailbox, say: impl Fn(Kind)) -> Left {
    let Mailbox(mut mailbox) = mailbox;
    let (mut from, mut to) = pair.split();
    let (mut out, mut at, mut last) = (Vec::new(), 0, false);
    let mut control = Control::default();
    let mut chunk = [0; CONTROL_BYTES_MAX];
    while !last || at < out.len() {
        tokio::select! {
            heard = mailbox.recv(), if at == out.len() && !last => {
                out.clear();
                at = 0;
                last = !gather(heard, &mut mailbox, &mut out);
            }
            wrote = to.write(&out[at..]), if at < out.len() => match wrote {
                Ok(bytes) => at += bytes,
                Err(_) if last => return Left::Whole,
                Err(_) => return Left::Cut,
            },
            read = from.read(&mut chunk) => match read {
                Ok(bytes @ 1..) => {
                    if let Some(left) = control.take(&chunk[..bytes], &say) {
                        return left;
                    }
                }
                // It has heard enough.
                Ok(0) | Err(_) if last => return Left::Whole,
                _ => return Left::Cut,
            },
        }
    }
    Left::Whole
}

/// Takes what waits, up to what is written together. `false`: no more will come.
fn gather(heard: Option<Heard>, mailbox: &mut mpsc::Receiver<Heard>, out: &mut Vec<u8>) -> bool {
    let mut next = heard;
    loop {
        match next {
            Some(Heard::Bytes(waiting)) => out.extend_from_slice(&waiting.bytes),
            Some(Heard::Last(waiting)) => {
                out.extend_from_slice(&waiting.bytes);
                return false;
            }
            None => return false,
        }
        if out.len() >= TOGETHER_BYTES {
            return true;
        }
        next = match mailbox.try_recv() {
            Ok(more) => Some(more),
            Err(mpsc::error::TryRecvError::Empty) => return true,
            Err(mpsc::error::TryRecvError::Disconnected) => None,
        };
    }
}

/// What the core says.
#[derive(Default)]
struct Control {
    bytes: Vec<u8>,
}

impl Control {
    /// Takes more of it; answers how the response is left, if it is.
    fn take(&mut self, bytes: &[u8], say: impl Fn(Kind)) -> Option<Left> {
        self.bytes.extend_from_slice(bytes);
        loop {
            let message = match two_part::decode(&self.bytes, Some(CONTROL_BYTES_MAX as u64)) {
                Decoded::Frame(message) => message,
                Decoded::Need(_) => return None,
                Decoded::Bad(_) => return Some(Left::Cut),
            };
            let header = &self.bytes[message.header.clone()];
            if header == STOP {
                say(Kind::Stop);
            } else if header == KILL {
                say(Kind::Kill);
                return Some(Left::Killed);
            }
            self.bytes.drain(..message.frame_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use corelane_codec::call_home::{KILL_FRAME, Prologue, STOP_FRAME};

    use super::*;

    fn taken(items_max: usize) -> (Taken, Mailbox, Rc<Cell<usize>>) {
        let waiting = Rc::default();
        let (taken, mailbox) = Taken::new(items_max, &waiting);
        (taken, mailbox, waiting)
    }

    fn all(mailbox: &mut Mailbox) -> (Vec<u8>, bool) {
        let mut out = Vec::new();
        let heard = mailbox.0.try_recv().ok();
        let more = heard.is_some() && gather(heard, &mut mailbox.0, &mut out);
        (out, more)
    }

    #[test]
    fn bulk_frames_wait_for_the_first_item() {
        let (mut taken, mut mailbox, waiting) = taken(16);
        assert_eq!(taken.hear(Kind::Data, b"two"), Heed::On);
        assert_eq!(taken.hear(Kind::End, b""), Heed::On);
        assert_eq!(taken.hear(Kind::Prologue, b""), Heed::On);
        assert!(waiting.get() > 0);
        assert_eq!(taken.hear(Kind::FirstData, b"one"), Heed::Over);
        let mut want = PROLOGUE_OK_FRAME.to_vec();
        want.extend_from_slice(&item(b"one"));
        want.extend_from_slice(&item(b"two"));
        want.extend_from_slice(&SENTINEL_FRAME);
        assert_eq!(all(&mut mailbox), (want, false));
        assert_eq!(waiting.get(), 0);
    }

    #[test]
    fn who_does_not_keep_up_is_reset() {
        let (mut slow, mailbox, waiting) = taken(3);
        assert_eq!(slow.hear(Kind::Prologue, b""), Heed::On);
        assert_eq!(slow.hear(Kind::FirstData, b"1"), Heed::On);
        assert_eq!(slow.hear(Kind::Data, b"2"), Heed::On);
        assert_eq!(slow.hear(Kind::Data, b"3"), Heed::Refused);
        drop((slow, mailbox));
        assert_eq!(waiting.get(), 0);
        let (mut early, _mailbox, _) = taken(4096);
        for _ in 0..EARLY_FRAMES_MAX {
            assert_eq!(early.hear(Kind::Data, b""), Heed::On);
        }
        assert_eq!(early.hear(Kind::Data, b""), Heed::Refused);
        let (mut long, _mailbox, _) = taken(4096);
        assert_eq!(long.hear(Kind::PriorityEnd, b""), Heed::On);
        let large = vec![0; WAITING_BYTES_MAX / 2];
        assert_eq!(long.hear(Kind::Data, &large), Heed::On);
        assert_eq!(long.hear(Kind::Data, &large), Heed::Refused);
    }

    #[test]
    fn frames_out_of_turn_are_refused() {
        let (mut twice, _mailbox, _) = taken(16);
        assert_eq!(twice.hear(Kind::FirstData, b""), Heed::On);
        assert_eq!(twice.hear(Kind::FirstData, b""), Heed::Refused);
        let (mut none, _mailbox, _) = taken(16);
        assert_eq!(none.hear(Kind::PriorityEnd, b""), Heed::On);
        assert_eq!(none.hear(Kind::FirstData, b""), Heed::Refused);
        assert_eq!(none.hear(Kind::Reset, b""), Heed::Reset);
    }

    #[test]
    fn errors_keep_their_type() {
        let typed = br#"{"kind":"dynamo.quic.typed_error","error":"no","typed_error":{"a":1}}"#;
        for (payload, text, json) in [
            (&typed[..], "no", Some(&b"{\"a\":1}"[..])),
            (b"plain \"text\"", "plain \"text\"", None),
            (b"{\"kind\":\"other\"}", "{\"kind\":\"other\"}", None),
        ] {
            let bytes = prologue_error(payload);
            let message = two_part::decode(&bytes, None).frame().unwrap();
            let prologue = Prologue::decode(&bytes[message.header.clone()]).unwrap();
            assert_eq!(prologue.error.unwrap().to_cow(), text);
            assert_eq!(prologue.typed_error, json);
        }
    }

    #[test]
    fn stop_goes_on_and_kill_ends() {
        let said = std::cell::RefCell::new(Vec::new());
        let mut control = Control::default();
        let mut bytes = WELCOME.to_vec();
        bytes.extend_from_slice(&STOP_FRAME);
        bytes.extend_from_slice(&KILL_FRAME);
        let mut left = None;
        for byte in bytes {
            assert_eq!(left, None);
            left = control.take(&[byte], |kind| said.borrow_mut().push(kind));
        }
        assert_eq!(left, Some(Left::Killed));
        assert_eq!(said.take(), [Kind::Stop, Kind::Kill]);
    }
}
