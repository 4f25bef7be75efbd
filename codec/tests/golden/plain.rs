//! Plain TCP events: hellos and answers of `golden/plain_events`, which other clients are written
//! against.

use std::path::Path;

use corelane_codec::event::hello::{
    Answer, HelloFault, Role, Verdict, decode_answer, decode_hello, write_hello,
};
use corelane_codec::{Bad, Decoded};

use crate::byte_by_byte;
use crate::common::unhex;

fn bytes(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/plain_events");
    let hex = std::fs::read_to_string(folder.join(format!("{name}.hex"))).expect(name);
    unhex(hex.trim())
}

#[test]
fn hellos() {
    let scope = b"namespace.demo.component.backend.endpoint.generate";
    let cases: [(&str, Role, u32, &[&[u8]]); 4] = [
        ("hello_publisher", Role::Publisher, 4096, &[scope]),
        ("hello_publisher_bare", Role::Publisher, 0, &[b""]),
        (
            "hello_subscriber",
            Role::Subscriber,
            0,
            &[b"namespace.demo.", b"kv-events"],
        ),
        ("hello_subscriber_all", Role::Subscriber, 1 << 20, &[b""]),
    ];
    for (name, role, payload_bytes_max, prefixes) in cases {
        let input = bytes(name);
        byte_by_byte(name, &input, decode_hello, |hello| hello.bytes());
        let hello = decode_hello(&input).frame().expect(name);
        let read = (hello.role, hello.payload_bytes_max);
        assert_eq!(read, (role, payload_bytes_max), "{name}");
        assert_eq!(hello.prefixes().collect::<Vec<_>>(), prefixes, "{name}");
        let mut again = vec![];
        write_hello(role, payload_bytes_max, prefixes, &mut again).expect(name);
        assert_eq!(again, input, "{name}");
    }
}

#[test]
fn answers() {
    let accepted = Answer {
        verdict: Verdict::Accepted,
        payload_bytes_max: (8 << 20) - 5,
        queue_events_max: 100_000,
        text: "",
    };
    let too_large = Answer {
        verdict: Verdict::TooLarge,
        payload_bytes_max: 1019,
        text: "frames of 4096 bytes; 1019 are taken",
        ..accepted
    };
    for (name, answer) in [
        ("answer_accepted", accepted),
        ("answer_too_large", too_large),
    ] {
        let input = bytes(name);
        byte_by_byte(name, &input, decode_answer, |answer| answer.bytes());
        assert_eq!(decode_answer(&input), Decoded::Frame(answer), "{name}");
        let mut again = vec![];
        answer.write(&mut again);
        assert_eq!(again, input, "{name}");
    }
}

#[test]
fn what_is_no_hello() {
    let cases = [
        ("bad_magic", HelloFault::Magic),
        ("bad_version", HelloFault::Version { version: 2 }),
        ("bad_role", HelloFault::Role { role: 7 }),
        ("bad_count", HelloFault::Count { prefixes: 2 }),
        ("bad_list_long", HelloFault::ListTooLong { bytes: 65_537 }),
        ("bad_list_lengths", HelloFault::List),
    ];
    for (name, fault) in cases {
        let input = bytes(name);
        byte_by_byte(name, &input, decode_hello, |hello| hello.bytes());
        assert_eq!(
            decode_hello(&input),
            Decoded::Bad(Bad::Hello(fault)),
            "{name}"
        );
    }
}
