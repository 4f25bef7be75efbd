//! A client's side of the socket: one frame out, one frame in, with deadlines.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::ClientError;
use crate::protocol::fd_pass;
use crate::protocol::frame::{Cut, REPLY_BYTES_MAX, cut};

/// How to reach a service.
#[derive(Clone, Debug)]
pub struct Dial {
    /// Its socket.
    pub path: PathBuf,
    /// How long to try: a service that is still starting is waited for.
    pub dial_timeout: Duration,
    /// How long one answer may take. The service itself waits up to a minute for memory.
    pub reply_timeout: Duration,
}

impl Dial {
    /// The defaults for a socket.
    pub fn new(path: impl Into<PathBuf>) -> Dial {
        Dial {
            path: path.into(),
            dial_timeout: Duration::from_secs(30),
            reply_timeout: Duration::from_secs(120),
        }
    }
}

pub(super) struct Wire {
    stream: UnixStream,
    input: Vec<u8>,
    /// A request has no whole answer: what comes next may be that, or its descriptor.
    owed: bool,
}

impl Wire {
    pub(super) fn dial(dial: &Dial) -> Result<Wire, ClientError> {
        let failed = |errno: Errno| ClientError::Dial {
            path: dial.path.clone(),
            source: errno.into(),
        };
        let deadline = Instant::now() + dial.dial_timeout;
        let stream = loop {
            match connect(&dial.path) {
                Ok(stream) => break stream,
                // Not there yet, dying, or busy.
                Err(Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN)
                    if Instant::now() + DIAL_INTERVAL < deadline =>
                {
                    thread::sleep(DIAL_INTERVAL);
                }
                Err(errno) => return Err(failed(errno)),
            }
        };
        stream.set_nonblocking(false).map_err(ClientError::Io)?;
        stream
            .set_write_timeout(Some(dial.reply_timeout))
            .map_err(ClientError::Io)?;
        let mut wire = Wire {
            stream,
            input: Vec::new(),
            owed: false,
        };
        wire.set_patience(Some(dial.reply_timeout))?;
        Ok(wire)
    }

    /// How long an answer may take from now on; none is for ever.
    pub(super) fn set_patience(&mut self, patience: Option<Duration>) -> Result<(), ClientError> {
        // Zero would mean for ever to the kernel.
        let patience = patience.map(|patience| patience.max(Duration::from_millis(1)));
        self.stream
            .set_read_timeout(patience)
            .map_err(ClientError::Io)
    }

    /// Sends a frame and reads the payload of its answer with `read`. After a failure there is no
    /// other call: an answer that comes late would be taken for another one.
    pub(super) fn call<T>(
        &mut self,
        frame: &[u8],
        read: impl FnOnce(&[u8]) -> Result<T, crate::protocol::Bad>,
    ) -> Result<(T, Option<OwnedFd>), ClientError> {
        if std::mem::replace(&mut self.owed, true) {
            return Err(ClientError::OutOfStep);
        }
        self.stream.write_all(frame).map_err(ClientError::Io)?;
        let mut descriptor = None;
        let mut chunk = [0; 4096];
        loop {
            if let Cut::Frame(payload) = cut(&self.input, REPLY_BYTES_MAX) {
                let taken = payload.len() + crate::protocol::frame::PREFIX_BYTES;
                let answer = read(payload)?;
                self.input.drain(..taken);
                self.owed = false;
                return Ok((answer, descriptor));
            }
            if let Cut::Bad(bad) = cut(&self.input, REPLY_BYTES_MAX) {
                return Err(ClientError::TooLarge(bad));
            }
            let received = match fd_pass::receive(&self.stream, &mut chunk) {
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Err(ClientError::NoAnswer),
                received => received.map_err(|errno| ClientError::Io(errno.into()))?,
            };
            if received.bytes == 0 {
                return Err(ClientError::Closed);
            }
            descriptor = descriptor.or(received.descriptor);
            self.input.extend_from_slice(&chunk[..received.bytes]);
        }
    }
}

/// Tries once, without waiting for room in the service's backlog.
fn connect(path: &Path) -> Result<UnixStream, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

const DIAL_INTERVAL: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::protocol::v1::{GetLockStateRequest, Reply, Request};

    #[test]
    fn an_answer_that_was_given_up_is_not_taken_for_another_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s.sock");
        let _silent = UnixListener::bind(&path).expect("it binds");
        let mut wire = Wire::dial(&Dial {
            reply_timeout: Duration::from_millis(1),
            ..Dial::new(path)
        })
        .expect("it listens");
        let frame = Request::from(GetLockStateRequest {}).encode();
        let mut ask = || wire.call(&frame, Reply::decode);
        assert!(matches!(ask(), Err(ClientError::NoAnswer)));
        assert!(matches!(ask(), Err(ClientError::OutOfStep)));
    }
}
