//! Lanes of the QUIC response plane, and a connection info of it.

use corelane_codec::control_message::ConnectionInfo;
use corelane_codec::quic_frame::{
    PAYLOAD_BYTES_MAX, QuicConnection, QuicConnectionInfo, decode, lane, uuid, write,
};
use serde_json::Value;

use crate::byte_by_byte;
use crate::common::Vector;

/// Every frame of a lane is what the vector says, and is written the same.
pub(crate) fn lane_stream(vector: &Vector) {
    let (name, mut rest) = (&vector.name, &vector.bytes[..]);
    let mut again = vec![];
    for row in vector.fields()["frames"].as_array().expect(name) {
        let decode = |input| decode(input, PAYLOAD_BYTES_MAX);
        byte_by_byte(name, rest, decode, |frame| frame.payload.end);
        let frame = decode(rest).frame().expect(name);
        assert_eq!(row["name"], format!("{:?}", frame.kind), "{name}");
        assert_eq!(row["kind"], frame.kind as u64, "{name}");
        let id = row["id"].as_str().and_then(uuid);
        assert_eq!(id, Some(frame.id), "{name}");
        let payload = &rest[frame.payload.clone()];
        assert_eq!(
            row["payload"].as_str().map(str::as_bytes),
            Some(payload),
            "{name}"
        );
        write(frame.kind, &frame.id, payload, &mut again);
        rest = &rest[frame.payload.end..];
    }
    assert_eq!((again, rest), (vector.bytes.clone(), &[][..]), "{name}");
}

pub(crate) fn connection_info(vector: &Vector) {
    let view = ConnectionInfo::decode(&vector.bytes).unwrap();
    let mut scratch = [0; 512];
    let info = QuicConnectionInfo::parse(&view, &mut scratch).unwrap();
    let whole: Value = serde_json::from_slice(&vector.bytes).unwrap();
    let inner: Value = serde_json::from_str(whole["info"].as_str().unwrap()).unwrap();
    assert_eq!(inner["address"], info.socket_addr().unwrap().to_string());
    assert!(info.certificate().is_some() && lane(info.request_id.as_str().unwrap()) < 8);
    let connection = QuicConnection {
        address: info.address.as_str().unwrap(),
        frontend_id: info.frontend_id.as_str().unwrap(),
        registration_id: info.registration_id.as_str().unwrap(),
        request_id: info.request_id.as_str().unwrap(),
        certificate_sha256: info.certificate_sha256.as_str().unwrap(),
    };
    let mut again = vec![];
    connection.write(&mut again);
    assert_eq!(again, vector.bytes);
}
