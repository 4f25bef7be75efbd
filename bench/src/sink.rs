//! The worker behind every arm of `hop`: takes request frames for any path and answers each with
//! an empty ack, gathered per read. One thread, one epoll, nothing kept of a frame.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context as _, Result};
use socket2::{Domain, Socket, Type};

use crate::frames::FrameCounter;
use crate::poll::{Interest, Poller};

/// Arguments of the hidden subcommand `sink`.
#[derive(clap::Args, Debug)]
pub(crate) struct SinkArgs {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

const LISTENER: u64 = u64::MAX;
const READ_BYTES: usize = 256 * 1024;
const CONNECTIONS_MAX: usize = 16_384;
/// Acks to write at a time: 4 zero bytes each.
static ACKS: [u8; 16 * 1024] = [0; 16 * 1024];

/// Serves until it is killed. Prints the address on standard output first.
pub(crate) fn run(args: &SinkArgs) -> Result<()> {
    let listener = listen(args.listen)
        .with_context(|| format!("cannot listen on {}; choose another --listen", args.listen))?;
    println!("{}", listener.local_addr()?);
    io::stdout().flush()?;
    Sink::new(listener)?.serve()
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

struct Connection {
    stream: TcpStream,
    counter: FrameCounter,
    ack_bytes_left: usize,
    interest: Interest,
}

struct Sink {
    listener: TcpListener,
    poller: Poller,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    buffer: Vec<u8>,
}

impl Sink {
    fn new(listener: TcpListener) -> io::Result<Self> {
        let poller = Poller::new(256)?;
        poller.add(&listener, LISTENER, Interest::Read)?;
        Ok(Self {
            listener,
            poller,
            connections: Vec::new(),
            free: Vec::new(),
            buffer: vec![0; READ_BYTES],
        })
    }

    fn serve(mut self) -> Result<()> {
        loop {
            for index in 0..self.poller.wait(None)? {
                let ready = self.poller.ready(index);
                if ready.token == LISTENER {
                    self.accept()?;
                    continue;
                }
                let slot = ready.token as usize;
                let Some(connection) = self.connections[slot].as_mut() else {
                    continue;
                };
                if connection.turn(ready.readable, &mut self.buffer).is_err() {
                    self.connections[slot] = None;
                    self.free.push(slot);
                    continue;
                }
                connection.watch(&self.poller, ready.token)?;
            }
        }
    }

    fn accept(&mut self) -> Result<()> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::ConnectionAborted => continue,
                Err(e) => return Err(e).context("cannot accept; is the limit of open files low?"),
            };
            if self.connections.len() - self.free.len() >= CONNECTIONS_MAX {
                continue;
            }
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            let slot = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            self.poller.add(&stream, slot as u64, Interest::Read)?;
            self.connections[slot] = Some(Connection {
                stream,
                counter: FrameCounter::default(),
                ack_bytes_left: 0,
                interest: Interest::Read,
            });
        }
    }
}

impl Connection {
    /// Reads what is there, once, and acks what it completes. An error ends the connection.
    fn turn(&mut self, readable: bool, buffer: &mut [u8]) -> io::Result<()> {
        if readable {
            match self.stream.read(buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => self.ack_bytes_left += 4 * self.counter.feed(&buffer[..bytes]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        while self.ack_bytes_left > 0 {
            match self
                .stream
                .write(&ACKS[..self.ack_bytes_left.min(ACKS.len())])
            {
                Ok(bytes) => self.ack_bytes_left -= bytes,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn watch(&mut self, poller: &Poller, token: u64) -> io::Result<()> {
        let wanted = match self.ack_bytes_left {
            0 => Interest::Read,
            _ => Interest::ReadWrite,
        };
        if wanted != self.interest {
            self.interest = wanted;
            poller.modify(&self.stream, token, wanted)?;
        }
        Ok(())
    }
}
