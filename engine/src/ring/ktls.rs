//! TLS that the kernel does on a socket (kTLS): keys go in, and records that are no data come out.
//!
//! ```text
//! handshake, elsewhere --[keys]--> TCP_ULP, TLS_TX, TLS_RX    plain bytes for us from then on
//! a receive fails: EIO  ---------> recvmsg with room for the record's type
//! before a close        ---------> sendmsg with a record's type: the alert close_notify
//! ```

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use socket2::SockRef;

use super::sockets;

/// A record holds no more plain bytes.
pub(crate) const RECORD_BYTES_MAX: usize = 16 * 1024;
/// The initial vector of every cipher that the kernel is given.
pub const IV_BYTES: usize = 12;

/// Type, then the alert: a warning, close_notify.
const ALERT: u8 = 21;
const CLOSE_NOTIFY: [u8; 2] = [1, 0];
const HANDSHAKE: u8 = 22;
const USER_CANCELED: u8 = 90;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Room that a farewell finds when all before it is to leave first: two records that the kernel
/// may still hold outside of the socket's buffer.
const FAREWELL_ROOM_BYTES: usize = 40 * 1024;

/// Version of the protocol.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Version {
    /// TLS 1.2.
    Tls12,
    /// TLS 1.3.
    Tls13,
}

/// What the kernel encrypts with.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Cipher {
    /// AES-128-GCM.
    Aes128Gcm,
    /// AES-256-GCM.
    Aes256Gcm,
    /// ChaCha20-Poly1305.
    Chacha20Poly1305,
}

impl Cipher {
    /// Length of its keys.
    pub fn key_bytes(self) -> usize {
        match self {
            Cipher::Aes128Gcm => 16,
            Cipher::Aes256Gcm | Cipher::Chacha20Poly1305 => 32,
        }
    }

    /// The kernel's number, and how many bytes of the vector are its salt.
    fn layout(self) -> (u16, usize) {
        match self {
            Cipher::Aes128Gcm => (libc::TLS_CIPHER_AES_GCM_128, 4),
            Cipher::Aes256Gcm => (libc::TLS_CIPHER_AES_GCM_256, 4),
            Cipher::Chacha20Poly1305 => (libc::TLS_CIPHER_CHACHA20_POLY1305, 0),
        }
    }
}

/// Which bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// Those that we send.
    Send,
    /// Those that we receive.
    Receive,
}

/// The secrets of one direction.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    /// Version of the protocol.
    pub version: Version,
    /// What they are for.
    pub cipher: Cipher,
    /// [`Cipher::key_bytes`] bytes.
    pub key: &'a [u8],
    /// The initial vector.
    pub iv: &'a [u8; IV_BYTES],
    /// The number of the next record.
    pub sequence: u64,
}

/// The kernel's `struct tls12_crypto_info_*`: version and cipher, two bytes each in the order of
/// this machine; the vector without its salt, the key, the salt, the number in network order.
const INFO_BYTES_MAX: usize = 4 + IV_BYTES + 32 + 8;

impl Keys<'_> {
    /// None when the key is not as long as its cipher wants it.
    fn info(&self) -> Option<([u8; INFO_BYTES_MAX], usize)> {
        if self.key.len() != self.cipher.key_bytes() {
            return None;
        }
        let (number, salt) = self.cipher.layout();
        let version: u16 = match self.version {
            Version::Tls12 => 0x0303,
            Version::Tls13 => 0x0304,
        };
        let mut initial = *self.iv;
        if self.version == Version::Tls12 && salt > 0 {
            // The rest of the vector is not mixed with the number of the record, as everywhere
            // else, but counted up by the kernel. The handshake has used up values from here on,
            // one for each of its records, and none may ever be used again.
            let (_, rest) = initial.split_at_mut(IV_BYTES - 8);
            if let Ok(start) = <[u8; 8]>::try_from(&*rest) {
                let next = u64::from_be_bytes(start).wrapping_add(self.sequence);
                rest.copy_from_slice(&next.to_be_bytes());
            }
        }
        let (salt, iv) = initial.split_at(salt);
        let sequence = self.sequence.to_be_bytes();
        let mut info = [0; INFO_BYTES_MAX];
        let mut at = 0;
        let (version, number) = (version.to_ne_bytes(), number.to_ne_bytes());
        for part in [&version[..], &number, iv, self.key, salt, &sequence] {
            info[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        Some((info, at))
    }
}

/// Makes the kernel's TLS ready on a connected socket. Bytes pass as they are until there are
/// keys.
///
/// # Errors
/// ENOENT: the kernel has no module `tls`. ENOTCONN: it has, and the socket is not connected.
pub fn prepare(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_TCP, libc::TCP_ULP, b"tls")
}

/// Gives the kernel the keys of one direction, which it cannot be talked out of again.
///
/// # Errors
/// The kernel's answer: it lacks the cipher, or the socket is not prepared.
pub fn install(socket: BorrowedFd<'_>, direction: Direction, keys: &Keys<'_>) -> io::Result<()> {
    let name = match direction {
        Direction::Send => libc::TLS_TX,
        Direction::Receive => libc::TLS_RX,
    };
    let wrong = || io::Error::from_raw_os_error(libc::EINVAL);
    let (mut info, bytes) = keys.info().ok_or_else(wrong)?;
    let installed = set(socket, libc::SOL_TLS, name, &info[..bytes]);
    // No copy of a key is left lying about.
    info.fill(0);
    std::hint::black_box(&info);
    if direction == Direction::Receive && keys.version == Version::Tls13 {
        // Records are decrypted to where they are wanted, on the assumption that nobody pads
        // them; one that is padded costs a second pass. Kernels before 6.0 do not know of it.
        let _ = set(
            socket,
            libc::SOL_TLS,
            libc::TLS_RX_EXPECT_NO_PAD,
            &1i32.to_ne_bytes(),
        );
    }
    installed
}

fn set(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: an open socket, and an option of so many bytes, which the kernel copies.
    let result = unsafe {
        let length = value.len() as libc::socklen_t;
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            length,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One control message of a byte: the type of a record.
const CONTROL_BYTES: usize = size_of::<libc::cmsghdr>() + size_of::<usize>();

#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// Takes the record for which a receive has failed with EIO: its type, and how many bytes of it
/// are in `into` ([`RECORD_BYTES_MAX`] are always enough).
pub(super) fn take_record(fd: RawFd, into: &mut [u8]) -> io::Result<(u8, usize)> {
    let mut control = Control([0; CONTROL_BYTES]);
    let mut span = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: into.len(),
    };
    // SAFETY: all-zero is a valid msghdr; it points to one span and to the room for one control
    // message, which live and are ours during the call. What the kernel says it has written there
    // is read within the bounds that it reports.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut span, 1);
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = CONTROL_BYTES as _;
        let bytes = libc::recvmsg(fd, &mut message, libc::MSG_DONTWAIT);
        let bytes = usize::try_from(bytes).map_err(|_| io::Error::last_os_error())?;
        let header = libc::CMSG_FIRSTHDR(&message);
        if header.is_null()
            || (*header).cmsg_level != libc::SOL_TLS
            || (*header).cmsg_type != libc::TLS_GET_RECORD_TYPE
        {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok((*libc::CMSG_DATA(header), bytes))
    }
}

/// Says farewell (the alert close_notify) on a socket that we have sent our last byte on. False:
/// not yet, what was sent before fills the socket's buffer and the kernel might hold records
/// outside of it, which an end of our direction would cost.
///
/// # Errors
/// The connection is gone.
pub fn farewell(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let fd = socket.as_raw_fd();
    let mut unsent: libc::c_int = 0;
    // SAFETY: an open socket, and an int for the answer.
    if unsafe { libc::ioctl(fd, libc::TIOCOUTQ, &raw mut unsent) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let (unsent, room) = (unsent as usize, SockRef::from(&socket).send_buffer_size()?);
    if unsent > 0 && 2 * unsent + FAREWELL_ROOM_BYTES > room {
        return Ok(false);
    }
    match send_record(socket, ALERT, &CLOSE_NOTIFY) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sends one record of another type than data, without blocking.
///
/// # Errors
/// The connection is gone, or takes nothing now.
pub fn send_record(socket: BorrowedFd<'_>, kind: u8, bytes: &[u8]) -> io::Result<()> {
    let fd = socket.as_raw_fd();
    let mut control = Control([0; CONTROL_BYTES]);
    let mut span = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero is a valid msghdr; it points to one span, which the kernel only reads, and
    // to room for one control message of a byte, which is filled in here.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut span, 1);
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(1) as _;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_TLS;
        (*header).cmsg_type = libc::TLS_SET_RECORD_TYPE;
        (*header).cmsg_len = libc::CMSG_LEN(1) as _;
        *libc::CMSG_DATA(header) = kind;
        libc::sendmsg(fd, &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    match sent {
        ..0 => Err(io::Error::from_raw_os_error(sockets::errno())),
        _ => Ok(()),
    }
}

/// What a record that is no data means to its connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Meaning {
    /// The peer sends no more.
    Farewell,
    /// Nothing: tickets for a later connection.
    Nothing,
    /// New keys, which the kernel has not.
    KeyUpdate,
    /// The peer gives the connection up, or keeps to no protocol.
    Failure,
}

/// What `record` of this type means (RFC 8446 §4.6, §6).
pub(crate) fn meaning(kind: u8, record: &[u8]) -> Meaning {
    match (kind, record) {
        (ALERT, [_, 0]) => Meaning::Farewell,
        (ALERT, [_, USER_CANCELED]) => Meaning::Nothing,
        (HANDSHAKE, [_, ..]) => messages(record),
        _ => Meaning::Failure,
    }
}

/// Whole messages: type, three bytes of length, and so much more.
fn messages(mut record: &[u8]) -> Meaning {
    while let [kind, long, middle, short, rest @ ..] = record {
        let bytes = u32::from_be_bytes([0, *long, *middle, *short]) as usize;
        match *kind {
            KEY_UPDATE => return Meaning::KeyUpdate,
            NEW_SESSION_TICKET if bytes <= rest.len() => record = &rest[bytes..],
            _ => return Meaning::Failure,
        }
    }
    match record.is_empty() {
        true => Meaning::Nothing,
        false => Meaning::Failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_lie_as_the_kernel_wants_them() {
        let (key, iv) = ([7; 32], *b"saltinitial!");
        let keys = |cipher: Cipher| Keys {
            version: Version::Tls13,
            cipher,
            key: &key[..cipher.key_bytes()],
            iv: &iv,
            sequence: 0x0102,
        };
        let number = |cipher: u16| [4, 3, cipher as u8, 0];
        let sequence = [0, 0, 0, 0, 0, 0, 1, 2];
        let (info, bytes) = keys(Cipher::Aes128Gcm).info().unwrap();
        let wanted = [&number(51)[..], b"initial!", &key[..16], b"salt", &sequence].concat();
        assert_eq!(info[..bytes], wanted[..]);
        assert_eq!(bytes, size_of::<libc::tls12_crypto_info_aes_gcm_128>());
        let (info, bytes) = keys(Cipher::Chacha20Poly1305).info().unwrap();
        let wanted = [&number(54)[..], &iv, &key, &sequence].concat();
        assert_eq!(info[..bytes], wanted[..]);
        let (_, bytes) = keys(Cipher::Aes256Gcm).info().unwrap();
        assert_eq!(bytes, size_of::<libc::tls12_crypto_info_aes_gcm_256>());
        let short = Keys {
            key: &key[..16],
            ..keys(Cipher::Aes256Gcm)
        };
        assert!(short.info().is_none());
    }

    #[test]
    fn no_vector_of_the_handshake_is_used_again() {
        let keys = |version, sequence| Keys {
            version,
            cipher: Cipher::Aes128Gcm,
            key: &[7; 16],
            iv: b"salt\0\0\0\0\0\0\x01\xff",
            sequence,
        };
        let vector = |keys: Keys<'_>| keys.info().unwrap().0[4..12].to_vec();
        assert_eq!(vector(keys(Version::Tls12, 1)), [0, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(vector(keys(Version::Tls13, 1)), [0, 0, 0, 0, 0, 0, 1, 0xff]);
    }

    #[test]
    fn records_that_are_no_data_have_a_meaning() {
        let ticket = [4, 0, 0, 3, 1, 2, 3];
        let two = [ticket, ticket].concat();
        let cases: [(u8, &[u8], Meaning); 11] = [
            (21, &[1, 0], Meaning::Farewell),
            (21, &[2, 0], Meaning::Farewell),
            (21, &[1, 90], Meaning::Nothing),
            (21, &[2, 40], Meaning::Failure),
            (21, &[1], Meaning::Failure),
            (22, &ticket, Meaning::Nothing),
            (22, &two, Meaning::Nothing),
            (22, &ticket[..6], Meaning::Failure),
            (22, &[24, 0, 0, 1, 0], Meaning::KeyUpdate),
            (22, &[], Meaning::Failure),
            (20, &[1], Meaning::Failure),
        ];
        for (kind, record, wanted) in cases {
            assert_eq!(meaning(kind, record), wanted, "{kind} {record:?}");
        }
        let after = [&ticket[..], &[24, 0, 0, 1, 1]].concat();
        assert_eq!(meaning(22, &after), Meaning::KeyUpdate);
    }
}
