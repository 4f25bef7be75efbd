//! Telling the sender of a request that it has failed, by the way that a worker would take.

use std::net::SocketAddr;
use std::time::Duration;

use corelane_codec::call_home::{self, SENTINEL_FRAME};
use corelane_codec::control_message::{self, StreamType, TcpConnectionInfo};
use corelane_codec::error::DynamoError;
use corelane_codec::limits::CONNECTION_INFO_SCRATCH_BYTES;
use corelane_codec::{Decoded, two_part};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Time to call a caller home.
const TELL_MAX: Duration = Duration::from_secs(5);

/// Whether the sender of this request can be told.
pub(super) fn is_reached(envelope: &[u8]) -> bool {
    info(envelope, |info| info.socket_addr().is_ok()).unwrap_or(false)
}

/// Calls the sender of a request home with an error. He may be gone, or on another transport;
/// then his own deadline has to do.
pub(super) async fn tell(envelope: &[u8], error: &DynamoError) {
    let Some((address, message)) = home(envelope, error) else {
        tracing::warn!(%error, "a caller over NATS could not be told");
        return;
    };
    let call = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(&message).await?;
        stream.shutdown().await
    };
    match timeout(TELL_MAX, call).await {
        Ok(Ok(())) => tracing::debug!(%address, %error, "a caller over NATS was told"),
        Ok(Err(why)) => tracing::warn!(%address, %error, %why, "a caller could not be told"),
        Err(_) => tracing::warn!(%address, %error, "a caller does not listen"),
    }
}

/// Where the sender of a request listens, and what is to be written there.
fn home(envelope: &[u8], error: &DynamoError) -> Option<(SocketAddr, Vec<u8>)> {
    let told = info(envelope, |info| {
        let mut message = Vec::new();
        let subject = info.subject.to_cow();
        call_home::write_handshake(&subject, StreamType::Response, &mut message);
        call_home::write_prologue_error(error.text(), Some(&error.to_json()), &mut message);
        message.extend_from_slice(&SENTINEL_FRAME);
        Some((info.socket_addr().ok()?, message))
    });
    told.flatten()
}

/// What a request says of the way back, if that is TCP.
fn info<T>(envelope: &[u8], read: impl FnOnce(TcpConnectionInfo<'_>) -> T) -> Option<T> {
    let Decoded::Frame(parts) = two_part::decode_prefix(envelope, None) else {
        return None;
    };
    let control = control_message::decode(envelope.get(parts.header)?).ok()?;
    let mut scratch = [0; CONNECTION_INFO_SCRATCH_BYTES];
    let info = TcpConnectionInfo::parse(&control.connection_info, &mut scratch).ok()?;
    Some(read(info))
}
