//! The address of a TCP instance as discovery holds it (spec/request-plane.md §2.1).

use std::net::SocketAddr;

/// `[tcp://]IP:PORT/PATH`, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpTransport<'a> {
    /// Where to dial.
    pub address: SocketAddr,
    /// What to send as the endpoint path, verbatim and without its leading slash.
    pub path: &'a str,
}

/// Why a transport value cannot be dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// There is no `/` between address and path.
    #[error("transport has no `/` after IP:PORT")]
    NoPath,
    /// The address is not numeric. Dynamo refuses host names too.
    #[error("transport address must be a numeric IP:PORT; host names are not resolved")]
    NotNumeric,
}

impl<'a> TcpTransport<'a> {
    /// Takes a transport value apart at its first `/`.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn parse(value: &'a str) -> Result<Self, TransportError> {
        let value = value.strip_prefix("tcp://").unwrap_or(value);
        let (address, path) = value.split_once('/').ok_or(TransportError::NoPath)?;
        let address = address.parse().map_err(|_| TransportError::NotNumeric)?;
        Ok(Self { address, path })
    }

    /// The value that discovery is to hold.
    #[must_use]
    pub fn value(&self) -> String {
        format!("{}/{}", self.address, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_at_the_first_slash() {
        for (value, address, path) in [
            ("127.0.0.1:1/a1/demo/b/c", "127.0.0.1:1", "a1/demo/b/c"),
            ("tcp://1.2.3.4:5/x", "1.2.3.4:5", "x"),
            ("[2001:db8::1]:5//odd/", "[2001:db8::1]:5", "/odd/"),
            ("1.2.3.4:5/", "1.2.3.4:5", ""),
        ] {
            let transport = TcpTransport::parse(value).unwrap();
            assert_eq!(transport.address, address.parse().unwrap());
            assert_eq!(transport.path, path);
            let plain = value.trim_start_matches("tcp://");
            assert_eq!(transport.value(), plain);
        }
    }

    #[test]
    fn refuses_names_and_missing_paths() {
        assert_eq!(
            TcpTransport::parse("localhost:5/x"),
            Err(TransportError::NotNumeric)
        );
        assert_eq!(
            TcpTransport::parse("1.2.3.4/x"),
            Err(TransportError::NotNumeric)
        );
        assert_eq!(
            TcpTransport::parse("1.2.3.4:5"),
            Err(TransportError::NoPath)
        );
        assert_eq!(
            TcpTransport::parse("TCP://1.2.3.4:5/x"),
            Err(TransportError::NotNumeric)
        );
    }
}
