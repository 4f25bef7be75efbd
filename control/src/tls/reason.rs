//! Why a handshake failed: a closed set for metrics, and a sentence that says what to do.

use std::io;
use std::time::Duration;

use rustls::{CertificateError, InvalidMessage};

/// Why there is no connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(usize)]
pub enum Reason {
    /// The peer does not speak TLS.
    NotTls,
    /// The peer shows no certificate, and one is demanded.
    NoCertificate,
    /// The peer's certificate is of an authority that we do not know.
    UnknownAuthority,
    /// The peer's certificate is not good: out of date, of another name, not for this use.
    BadCertificate,
    /// The peer refused us.
    RefusedByPeer,
    /// What the peer sent makes no handshake.
    Protocol,
    /// The handshake took too long.
    Overdue,
    /// The peer went away.
    Lost,
    /// Too many handshakes are under way.
    TooMany,
    /// The kernel did not take the keys.
    Kernel,
}

impl Reason {
    /// Every reason, in the order of their numbers.
    pub const ALL: [Reason; 10] = [
        Reason::NotTls,
        Reason::NoCertificate,
        Reason::UnknownAuthority,
        Reason::BadCertificate,
        Reason::RefusedByPeer,
        Reason::Protocol,
        Reason::Overdue,
        Reason::Lost,
        Reason::TooMany,
        Reason::Kernel,
    ];

    /// The word of the label `reason`.
    pub fn word(self) -> &'static str {
        match self {
            Reason::NotTls => "not_tls",
            Reason::NoCertificate => "no_certificate",
            Reason::UnknownAuthority => "unknown_authority",
            Reason::BadCertificate => "bad_certificate",
            Reason::RefusedByPeer => "refused_by_peer",
            Reason::Protocol => "protocol",
            Reason::Overdue => "timeout",
            Reason::Lost => "lost",
            Reason::TooMany => "too_many",
            Reason::Kernel => "kernel",
        }
    }

    /// The reason behind what a handshake answered.
    pub(super) fn of(error: &io::Error) -> Reason {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        match inner {
            None => Reason::Lost,
            Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
                Reason::NotTls
            }
            Some(rustls::Error::NoCertificatesPresented) => Reason::NoCertificate,
            Some(rustls::Error::InvalidCertificate(why)) => match why {
                // The second: an authority that only bears the name of one that we know.
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    Reason::UnknownAuthority
                }
                _ => Reason::BadCertificate,
            },
            Some(rustls::Error::AlertReceived(_)) => Reason::RefusedByPeer,
            Some(_) => Reason::Protocol,
        }
    }

    /// What the shard is told in place of a connection.
    pub(super) fn errno(self) -> i32 {
        match self {
            Reason::Overdue => libc_errno::ETIMEDOUT,
            Reason::Lost => libc_errno::ECONNRESET,
            Reason::TooMany => libc_errno::ENOBUFS,
            _ => libc_errno::EPROTO,
        }
    }

    /// What to look at.
    pub(super) fn remedy(self, dialled: bool, patience: Duration) -> String {
        match (self, dialled) {
            (Reason::NotTls, false) => "it does not speak TLS; switch it on there \
                (DYN_TCP_TLS_CA_CERT_PATH), or take [tls] cert and key away here"
                .into(),
            (Reason::NotTls, true) => "it does not speak TLS; give it a certificate \
                (DYN_TCP_TLS_CERT_PATH and DYN_TCP_TLS_KEY_PATH), or take [tls] ca away here"
                .into(),
            (Reason::Overdue, true) => format!(
                "no handshake within {patience:?}: it may not speak TLS; give it a certificate \
                 (DYN_TCP_TLS_CERT_PATH and DYN_TCP_TLS_KEY_PATH)"
            ),
            (Reason::Overdue, false) => format!("no handshake within {patience:?}"),
            (Reason::NoCertificate, _) => "it shows no certificate; give it one \
                (DYN_TCP_TLS_CLIENT_CERT_PATH and DYN_TCP_TLS_CLIENT_KEY_PATH)"
                .into(),
            (Reason::UnknownAuthority, false) => {
                "its certificate is not of an authority in [tls] client_ca".into()
            }
            (Reason::UnknownAuthority, true) => {
                "its certificate is not of an authority in [tls] ca".into()
            }
            (Reason::RefusedByPeer, _) => "it refused us; its log says more".into(),
            (Reason::Lost, _) => "it went away during the handshake".into(),
            (Reason::TooMany, _) => "too many handshakes are under way".into(),
            (Reason::Kernel, _) => {
                "the kernel does not take its keys; write [tls] kernel = \"off\"".into()
            }
            (Reason::BadCertificate | Reason::Protocol, _) => "the handshake failed".into(),
        }
    }
}

/// The errno values that shards know failures by.
mod libc_errno {
    use rustix::io::Errno;

    pub(super) const ETIMEDOUT: i32 = Errno::TIMEDOUT.raw_os_error();
    pub(super) const ECONNRESET: i32 = Errno::CONNRESET.raw_os_error();
    pub(super) const ENOBUFS: i32 = Errno::NOBUFS.raw_os_error();
    pub(super) const EPROTO: i32 = Errno::PROTO.raw_os_error();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_the_list_and_words_differ() {
        for (number, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, number);
        }
        let mut words: Vec<&str> = Reason::ALL.iter().map(|reason| reason.word()).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), Reason::ALL.len());
    }
}
