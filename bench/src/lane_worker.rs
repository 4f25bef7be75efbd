//! The worker behind every arm of `lane`, over whatever it is reached: it wants each body whole in
//! its memory, looks at its first and last byte, notes the time, and answers.
//!
//! `handoff` answers a length-prefixed body with one byte; `path` is a worker of Dynamo's wire:
//! ack, envelope, a call home with one item. Over a lane the router does that part.

use std::io::{self, Read as _, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use corelane_codec::control_message::{self, PayloadCodec, StreamType, TcpConnectionInfo};
use corelane_codec::limits::CONNECTION_INFO_SCRATCH_BYTES;
use corelane_codec::{call_home, item, reply_frame, two_part};
use corelane_gpu_mem::lane::LaneError;
use corelane_gpu_mem::lane::layout::{Codec, LAST};
use corelane_gpu_mem::lane::worker::{Event, LaneWorker, Options};

/// How the worker is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Way {
    /// Shared memory.
    Lane,
    /// A Unix stream socket.
    Unix,
    /// TCP over loopback.
    Tcp,
}

impl Way {
    /// Its name in reports and arguments.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Lane => "lane",
            Way::Unix => "unix",
            Way::Tcp => "tcp",
        }
    }
}

/// What it speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Speech {
    /// A body behind its length; a byte back.
    Handoff,
    /// Dynamo's request frames and call-home responses.
    Path,
}

/// Arguments of the hidden subcommand `lane-worker`.
#[derive(clap::Args, Debug)]
pub(crate) struct WorkerArgs {
    /// How it is reached.
    #[arg(value_enum)]
    way: Way,
    /// What it speaks.
    #[arg(value_enum)]
    speech: Speech,
    /// The socket to attach at or to listen on; not for TCP.
    #[arg(long, default_value = "")]
    socket: PathBuf,
    /// Look for work without sleeping.
    #[arg(long)]
    spin: bool,
}

/// Serves until it is killed, or until who feeds it goes. Prints where it listens first.
pub(crate) fn run(args: &WorkerArgs) -> Result<()> {
    match args.way {
        Way::Lane => lane(args),
        Way::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            say(&listener.local_addr()?.to_string())?;
            loop {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(args.spin)?;
                // A router has a second connection for large frames.
                let speech = args.speech;
                std::thread::spawn(move || serve(speech, stream));
            }
        }
        Way::Unix => {
            let listener = UnixListener::bind(&args.socket)?;
            say("ready")?;
            loop {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(args.spin)?;
                serve(args.speech, stream)?;
            }
        }
    }
}

fn say(text: &str) -> Result<()> {
    println!("{text}");
    Ok(io::stdout().flush()?)
}

fn lane(args: &WorkerArgs) -> Result<()> {
    let options = Options {
        codec: Codec::MessagePack,
        id: 0,
        spin: if args.spin {
            Duration::MAX
        } else {
            Duration::ZERO
        },
        numa_node: None,
    };
    let mut worker = attach(&args.socket, &options)?;
    say("ready")?;
    loop {
        let request = match worker.next(None) {
            Ok(Event::Request(request)) => request,
            Ok(_) => continue,
            Err(LaneError::Gone) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        look_at(worker.body(&request));
        match args.speech {
            Speech::Handoff => worker.finish(&request)?,
            Speech::Path => worker.item(&request, &answer(now_ns()), LAST)?,
        }
    }
}

/// The router makes its socket a little after it listens for callers.
fn attach(socket: &Path, options: &Options) -> Result<LaneWorker> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match LaneWorker::attach(socket, options) {
            Ok(worker) => return Ok(worker),
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// What a device would be handed; both ends are read so that they must be there.
fn look_at(body: &[u8]) {
    let ends = (body.first().copied(), body.last().copied());
    std::hint::black_box(ends);
}

/// The time at which the body was there, as an item: a MessagePack number.
fn answer(ns: u64) -> [u8; 9] {
    let mut out = [0xcf; 9];
    out[1..].copy_from_slice(&ns.to_be_bytes());
    out
}

/// CLOCK_MONOTONIC in ns: one clock for all processes.
pub(crate) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Serves one connection to its end. The buffer is used again and again, as a pinned one would be.
fn serve(speech: Speech, mut stream: impl io::Read + Write) -> Result<()> {
    let mut body = Vec::new();
    loop {
        let done = match speech {
            Speech::Handoff => handoff(&mut stream, &mut body),
            Speech::Path => frame(&mut stream, &mut body),
        };
        match done {
            Ok(()) => {}
            Err(error) if error.downcast_ref::<io::Error>().is_some() => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn handoff(stream: &mut (impl io::Read + Write), body: &mut Vec<u8>) -> Result<()> {
    let mut length = [0; 4];
    read_exact(stream, &mut length)?;
    fill(stream, body, u32::from_be_bytes(length) as usize)?;
    look_at(body);
    stream.write_all(&[1])?;
    Ok(())
}

/// One request frame: acknowledged, then its caller is called home with one item.
fn frame(stream: &mut (impl io::Read + Write), payload: &mut Vec<u8>) -> Result<()> {
    let mut names = Vec::new();
    for _ in 0..2 {
        let mut length = [0; 2];
        read_exact(stream, &mut length)?;
        fill(stream, &mut names, usize::from(u16::from_be_bytes(length)))?;
    }
    let mut length = [0; 4];
    read_exact(stream, &mut length)?;
    fill(stream, payload, u32::from_be_bytes(length) as usize)?;
    let there_ns = now_ns();
    stream.write_all(&reply_frame::ACCEPTED)?;
    let parts = two_part::decode(payload, None).frame();
    let parts = parts.context("the envelope is cut off")?;
    look_at(&payload[parts.body.clone()]);
    let control = control_message::decode(&payload[parts.header.clone()]);
    let control = control.context("the control message cannot be read")?;
    let mut scratch = [0; CONNECTION_INFO_SCRATCH_BYTES];
    let info = TcpConnectionInfo::parse(&control.connection_info, &mut scratch)?;
    let address: SocketAddr = info.socket_addr()?;
    let mut out = Vec::with_capacity(512);
    call_home::write_handshake(&info.subject.to_cow(), StreamType::Response, &mut out);
    out.extend_from_slice(&call_home::PROLOGUE_OK_FRAME);
    item::write_frame(&answer(there_ns), PayloadCodec::MessagePack, &mut out);
    out.extend_from_slice(call_home::final_marker_frame(PayloadCodec::MessagePack));
    out.extend_from_slice(&call_home::SENTINEL_FRAME);
    let mut home = TcpStream::connect(address)?;
    home.set_nodelay(true)?;
    home.write_all(&out)?;
    Ok(())
}

/// Makes `to` hold exactly the next `bytes` bytes; its memory is kept.
fn fill(stream: &mut impl io::Read, to: &mut Vec<u8>, bytes: usize) -> Result<()> {
    to.resize(bytes, 0);
    read_exact(stream, to)
}

/// As the method of that name, on a socket that may not block: then it is asked without end.
pub(crate) fn read_exact(stream: &mut impl io::Read, mut to: &mut [u8]) -> Result<()> {
    while !to.is_empty() {
        match stream.read(to) {
            Ok(0) => bail!(io::Error::from(io::ErrorKind::UnexpectedEof)),
            Ok(bytes) => to = &mut to[bytes..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// All of a call home: until the caller's worker closes, or the sentinel has come.
pub(crate) fn read_response(stream: &mut TcpStream) -> Result<u64> {
    let (mut bytes, mut chunk) = (Vec::with_capacity(1024), [0; 4096]);
    while !bytes.ends_with(&call_home::SENTINEL_FRAME) {
        match stream.read(&mut chunk)? {
            0 => bail!("the response ended early"),
            read => bytes.extend_from_slice(&chunk[..read]),
        }
    }
    let mut at = 0;
    while let Some(message) = two_part::decode(&bytes[at..], None).frame() {
        let body = &bytes[at..][message.body.clone()];
        if let Some(mark) = body.iter().position(|byte| *byte == 0xcf)
            && let Some(number) = body.get(mark + 1..mark + 9)
        {
            return Ok(u64::from_be_bytes(number.try_into()?));
        }
        at += message.frame_bytes();
    }
    let text = String::from_utf8_lossy(&bytes);
    bail!("the response says no time: {text}")
}
