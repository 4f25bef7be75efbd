//! Two-part messages, one per vector.

use corelane_codec::two_part::{self, Message};
use corelane_codec::{Bad, Decoded};

use crate::byte_by_byte;
use crate::common::{Vector, described};

pub(crate) fn valid(vector: &Vector) {
    let (name, bytes) = (&vector.name, &vector.bytes[..]);
    byte_by_byte(
        name,
        bytes,
        |input| two_part::decode(input, None),
        Message::frame_bytes,
    );
    let message = two_part::decode(bytes, None).frame().expect(name);
    assert_eq!(message.frame_bytes(), bytes.len(), "{name}");
    assert_eq!(message.verify(bytes), Ok(()), "{name}");
    let (header, body) = (&bytes[message.header.clone()], &bytes[message.body.clone()]);

    let fields = vector.fields();
    if let Some(text) = fields["header"].as_str() {
        assert_eq!(header, text.as_bytes(), "{name}");
        let body_bytes = fields["data_len"].as_u64().expect(name) as usize;
        assert_eq!(body, described(&fields["data"], body_bytes), "{name}");
        let sum = format!("{:016x}", two_part::checksum(header, body));
        assert_eq!(
            fields["xxh3_64_of_header_then_data"].as_str(),
            Some(&*sum),
            "{name}"
        );
        let declared = format!("{:016x}", message.checksum);
        assert_eq!(fields["checksum"].as_str(), Some(&*declared), "{name}");
    }

    // We write no checksum; all else is the same.
    let mut again = vec![];
    two_part::write(header, body, &mut again);
    let mut without = bytes.to_vec();
    without[16..24].fill(0);
    assert_eq!(again, without, "{name}");
}

pub(crate) fn malformed(vector: &Vector) {
    let (name, bytes) = (&vector.name, &vector.bytes[..]);
    let max_bytes = vector.row["max_message_size"].as_u64();
    let decode = |input| two_part::decode(input, max_bytes);
    byte_by_byte(name, bytes, decode, Message::frame_bytes);
    let expect = &vector.expect()["streaming_decode"];
    let answer = two_part::decode(bytes, max_bytes);
    if let Some(ok) = expect.get("ok") {
        let message = answer.frame().expect(name);
        let want = |key: &str| ok[key].as_u64().expect(name) as usize;
        assert_eq!(message.header.len(), want("header_len"), "{name}");
        assert_eq!(message.body.len(), want("data_len"), "{name}");
        assert_eq!(bytes.len() - message.frame_bytes(), want("left"), "{name}");
        assert_eq!(message.verify(bytes), Ok(()), "{name}");
    } else if expect.as_str() == Some("need more bytes (Ok(None))") {
        assert!(
            matches!(answer, Decoded::Need(need) if need > bytes.len()),
            "{name}"
        );
    } else if expect["error"].as_str() == Some("Checksum mismatch") {
        // Only verifying finds it, as only debug builds look.
        let verified = answer.frame().expect(name).verify(bytes);
        assert!(matches!(verified, Err(Bad::Checksum { .. })), "{name}");
    } else {
        assert!(
            matches!(answer, Decoded::Bad(Bad::LengthOverflow { .. })),
            "{name}"
        );
    }
}
