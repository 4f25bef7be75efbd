//! Whole NATS connections of a worker and of a caller of the real crate: subjects are ours, what
//! the messages carry is read as from any other transport.

use std::collections::BTreeMap;

use corelane_codec::control_message::{self, PayloadCodec, TcpConnectionInfo};
use corelane_codec::path::{EndpointId, Slug, instance_subject};
use corelane_codec::two_part;
use serde_json::Value;

use crate::common::Vector;

/// The endpoint and the instance of the captures.
const INSTANCE: u64 = 0x55f7_e952_701f_5d46;

/// One operation of the NATS client protocol.
struct Operation<'a> {
    /// Its line, in words.
    words: Vec<&'a str>,
    headers: &'a str,
    payload: &'a [u8],
}

/// Cuts a stream into operations.
fn operations<'a>(name: &str, mut rest: &'a [u8]) -> Vec<Operation<'a>> {
    let mut all = vec![];
    while !rest.is_empty() {
        let end = rest.windows(2).position(|two| two == b"\r\n").expect(name);
        let line = std::str::from_utf8(&rest[..end]).expect(name);
        rest = &rest[end + 2..];
        let words: Vec<&str> = line.split(' ').collect();
        let number = |back: usize| words[words.len() - back].parse::<usize>().expect(name);
        let (headers, bytes) = match words[0] {
            "PUB" | "MSG" => (0, number(1)),
            "HPUB" | "HMSG" => (number(2), number(1)),
            _ => {
                let (headers, payload) = ("", &b""[..]);
                all.push(Operation {
                    words,
                    headers,
                    payload,
                });
                continue;
            }
        };
        let (message, behind) = rest.split_at(bytes);
        rest = behind.strip_prefix(b"\r\n").expect(name);
        all.push(Operation {
            words,
            headers: std::str::from_utf8(&message[..headers]).expect(name),
            payload: &message[headers..],
        });
    }
    all
}

pub(crate) fn check(vector: &Vector) {
    let name = vector.name.as_str();
    let all = operations(name, &vector.bytes);
    let endpoint = EndpointId::new("vec", "backend", "generate");
    let subject = instance_subject(INSTANCE, &endpoint);
    let service = Slug::slugify("vec_backend");
    let first: Value = serde_json::from_str(&all[0].words[1..].join(" ")).expect(name);
    match all[0].words[0] {
        "CONNECT" => {
            assert_eq!(
                (&first["user"], &first["pass"]),
                (&"user".into(), &"user".into())
            );
            assert!(
                first["headers"] == true && first["no_responders"] == true,
                "{name}"
            );
            let subscribed = |to: &str| all.iter().any(|op| op.words.starts_with(&["SUB", to]));
            for verb in ["PING", "INFO", "STATS"] {
                assert!(subscribed(&format!("$SRV.{verb}")), "{name} {verb}");
                assert!(
                    subscribed(&format!("$SRV.{verb}.{}", service.as_str())),
                    "{name}"
                );
            }
        }
        _ => assert_eq!(first["max_payload"], 1 << 20, "{name}"),
    }
    let to_instance = |op: &&Operation<'_>| op.words.get(1) == Some(&subject.as_str());
    let found: Vec<&Operation<'_>> = all.iter().filter(to_instance).collect();
    match name {
        "live_nats_worker_to_server" => {
            let words: Vec<&str> = found.iter().flat_map(|op| op.words[..3].to_vec()).collect();
            assert_eq!(words, ["SUB", subject.as_str(), "q"]);
            acknowledged(&all, "PUB");
        }
        "live_nats_client_from_server" => acknowledged(&all, "MSG"),
        _ => {
            assert_eq!(found.len(), 1, "{name}");
            request(name, found[0]);
        }
    }
}

/// The last operation is an empty message to an inbox.
fn acknowledged(all: &[Operation<'_>], verb: &str) {
    let last = all.last().expect("an operation");
    assert!(last.words[0] == verb && last.words[1].starts_with("_INBOX."));
    assert!(last.payload.is_empty() && last.headers.is_empty());
}

fn request(name: &str, operation: &Operation<'_>) {
    let mut lines = operation.headers.lines();
    assert_eq!(lines.next(), Some("NATS/1.0"), "{name}");
    let headers: BTreeMap<&str, &str> = lines.filter_map(|line| line.split_once(": ")).collect();
    let names: Vec<&str> = headers.keys().copied().collect();
    assert_eq!(names, ["request-id", "x-frontend-send-ts-ns"], "{name}");
    let message = two_part::decode(operation.payload, None)
        .frame()
        .expect(name);
    let control = control_message::decode(&operation.payload[message.header]).expect(name);
    assert!(control.id == headers["request-id"], "{name}");
    assert_eq!(control.payload_codec, PayloadCodec::MessagePack, "{name}");
    let mut scratch = [0; 512];
    let info = TcpConnectionInfo::parse(&control.connection_info, &mut scratch).expect(name);
    assert!(
        info.socket_addr().is_ok() && info.context == headers["request-id"],
        "{name}"
    );
    assert_eq!(
        &operation.payload[message.body],
        b"\x82\xa4mode\xa2ok\xa1n\x02"
    );
}
