//! One listening socket: bound for its owner only, never over a living service, removed at the end.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::ServerError;
use crate::history::Peer;
use crate::paths::PATH_BYTES_MAX;

/// A socket that listens, and its file.
#[derive(Debug)]
pub struct Listener {
    /// The socket; it does not block.
    pub socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of what we bound: nothing else is removed in its name.
    bound: (u64, u64),
}

impl Listener {
    /// Listens at `path`, for the owner only, or for everybody where who connects is asked for
    /// afterwards. A file that nobody listens behind is replaced.
    ///
    /// # Errors
    /// The path is too long, cannot be written, or belongs to something that lives.
    pub fn bind(path: &Path, everybody: bool) -> Result<Listener, ServerError> {
        let failed = |source: io::Error| ServerError::Bind {
            path: path.to_owned(),
            source,
        };
        let bytes = path.as_os_str().len();
        if bytes >= PATH_BYTES_MAX {
            return Err(ServerError::PathTooLong {
                path: path.to_owned(),
                bytes,
            });
        }
        let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
        clear_stale(path, &address)?;
        let socket = stream_socket().map_err(|errno| failed(errno.into()))?;
        // On Linux the socket file gets the mode of the socket, so there is no moment in which
        // others could connect.
        let owner = Mode::RUSR | Mode::WUSR;
        rustix::fs::fchmod(&socket, owner)
            .and_then(|()| rustix::net::bind(&socket, &address))
            .and_then(|()| rustix::net::listen(&socket, BACKLOG))
            .map_err(|errno| failed(errno.into()))?;
        if everybody {
            // The mode of the socket is masked by the umask; the file's is not.
            rustix::fs::chmod(
                path,
                owner | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH,
            )
            .map_err(|errno| failed(errno.into()))?;
        }
        let file = fs::symlink_metadata(path).map_err(failed)?;
        Ok(Listener {
            socket,
            path: path.to_owned(),
            bound: (file.dev(), file.ino()),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == self.bound);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket that nobody listens on. A living service, or a file of another kind, stays.
fn clear_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ServerError> {
    let failed = |source: io::Error| ServerError::Bind {
        path: path.to_owned(),
        source,
    };
    let probe = stream_socket().map_err(|errno| failed(errno.into()))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::NOENT) => Ok(()),
        // A full backlog (EAGAIN) is a living service too.
        Ok(()) | Err(Errno::AGAIN | Errno::INPROGRESS) => Err(ServerError::AlreadyRunning {
            path: path.to_owned(),
        }),
        Err(Errno::CONNREFUSED) => {
            use std::os::unix::fs::FileTypeExt;
            let file = fs::symlink_metadata(path).map_err(failed)?;
            if !file.file_type().is_socket() {
                return Err(failed(io::Error::other(
                    "a file that is no socket lies there",
                )));
            }
            fs::remove_file(path).map_err(failed)
        }
        Err(errno) => Err(failed(errno.into())),
    }
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Who is at the other end, as the kernel noted when it connected. A process that our namespace
/// does not see has the pid 0, which is why rustix's own type (never zero) is not used.
pub(super) fn peer_of(socket: &OwnedFd) -> Result<Peer, Errno> {
    use std::os::fd::AsRawFd;
    let mut credentials = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the pointers are to a live value of the length given, which the kernel fills.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    match answer {
        0 => Ok(Peer {
            pid: u32::try_from(credentials.pid).unwrap_or_default(),
            uid: credentials.uid,
        }),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

const BACKLOG: i32 = 1024;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_socket_is_for_its_owner_and_goes_with_its_listener() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s.sock");
        let listener = Listener::bind(&path, false).expect("it binds");
        let mode = fs::metadata(&path)
            .expect("it is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(
            Listener::bind(&path, false),
            Err(ServerError::AlreadyRunning { .. })
        ));
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_for_other_users_can_be_opened_by_them() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s.sock");
        let _listener = Listener::bind(&path, true).expect("it binds");
        let file = fs::metadata(&path).expect("it is there");
        assert_eq!(file.permissions().mode() & 0o777, 0o666);
    }

    #[test]
    fn a_stale_socket_is_replaced_and_other_files_are_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("it binds"));
        let listener = Listener::bind(&path, false).expect("the stale file is replaced");
        fs::remove_file(&path).expect("ours to remove");
        fs::write(&path, b"a letter").expect("it writes");
        drop(listener);
        assert!(path.exists(), "what is not ours is not removed");
        assert!(matches!(
            Listener::bind(&path, false),
            Err(ServerError::Bind { .. })
        ));
        assert_eq!(fs::read(&path).expect("still there"), b"a letter");
    }

    #[test]
    fn a_path_that_does_not_fit_is_named() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(120)));
        let refused = Listener::bind(&path, false)
            .err()
            .map(|error| error.to_string());
        assert!(refused.is_some_and(|text| text.contains("107")));
    }
}
