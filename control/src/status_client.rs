//! Asks the status server of a running process.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use crate::status_server;

/// Longest wait for the connect, and for each part of the answer.
const WAIT_MAX: Duration = Duration::from_secs(20);
/// Longest answer that is taken.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Status and body of `GET path` at `HOST:PORT`.
///
/// # Errors
/// Nobody answers there, in time, or in HTTP.
pub fn get(address: &str, path: &str) -> io::Result<(u16, Vec<u8>)> {
    ask(address, &format!("GET {path} HTTP/1.1"))
}

/// The same of `POST path`, with nothing for a body: something is to be done.
///
/// # Errors
/// As [`get`].
pub fn post(address: &str, path: &str) -> io::Result<(u16, Vec<u8>)> {
    let acts = format!("{}: 1\r\ncontent-length: 0", status_server::ACTS);
    ask(address, &format!("POST {path} HTTP/1.1\r\n{acts}"))
}

fn ask(address: &str, first: &str) -> io::Result<(u16, Vec<u8>)> {
    let mut stream = connect(address)?;
    stream.set_read_timeout(Some(WAIT_MAX))?;
    stream.set_write_timeout(Some(WAIT_MAX))?;
    let head = format!("{first}\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    parse(&answer).ok_or_else(|| {
        let why = "the answer is not HTTP; name the address of a status server";
        io::Error::new(io::ErrorKind::InvalidData, why)
    })
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, WAIT_MAX) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Our status server sends whole bodies, so what is behind the head is the body.
fn parse(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let at = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..at]).ok()?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    Some((status.parse().ok()?, answer[at + 4..].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_and_body_are_told_apart() {
        let answer = b"HTTP/1.1 404 Not Found\r\na: b\r\n\r\nbody\r\n\r\nand more";
        let (status, body) = parse(answer).unwrap();
        assert_eq!((status, &body[..]), (404, &b"body\r\n\r\nand more"[..]));
        for wrong in [
            &b""[..],
            b"HTTP/1.1 200 OK\r\n",
            b"SSH-2.0\r\n\r\n",
            b"HTTP/1.1 x\r\n\r\n",
        ] {
            assert_eq!(parse(wrong), None);
        }
    }
}
