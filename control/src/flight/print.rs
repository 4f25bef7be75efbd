//! Flight records for people and for programs.

use corelane_engine::stats::flight::{Answered, Buffers, Kind, Order, Record, Relayed, Side, Why};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

/// What stands for no connection and no request.
const NONE: u32 = u32::MAX;

/// `08:31:48.123456  core 0  begun      request 17, route 0, connection 5, bytes 1234`, in UTC.
pub fn text_line(core: u32, unix_ns: u64, record: &Record) -> String {
    let at = i128::from(unix_ns);
    let time = Timestamp::from_nanosecond(at).map_or_else(
        |_| unix_ns.to_string(),
        |time| time.strftime("%H:%M:%S%.6f").to_string(),
    );
    let plain = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    let fields: Vec<String> = fields(record)
        .iter()
        .map(|(name, value)| format!("{name} {}", plain(value)))
        .collect();
    let kind = word(record);
    format!("{time}  core {core}  {kind:<9}  {}", fields.join(", "))
}

/// The same as an object.
pub fn json_line(core: u32, unix_ns: u64, record: &Record) -> String {
    let mut object = Map::new();
    object.insert("unix_ns".into(), unix_ns.into());
    object.insert("core".into(), core.into());
    object.insert("number".into(), record.number.into());
    object.insert("kind".into(), word(record).into());
    for (name, value) in fields(record) {
        object.insert(name.into(), value);
    }
    Value::Object(object).to_string()
}

fn word(record: &Record) -> &'static str {
    Kind::of(record.kind.into()).map_or("unknown", Kind::word)
}

/// The numbers of a record under the names of what they are.
fn fields(record: &Record) -> Vec<(&'static str, Value)> {
    let Record {
        detail,
        subject,
        value,
        ..
    } = *record;
    let connection = ("connection", json!(subject));
    let Some(kind) = Kind::of(record.kind.into()) else {
        return vec![
            ("of", json!(record.kind)),
            ("detail", json!(detail)),
            ("subject", json!(subject)),
            ("value", json!(value)),
        ];
    };
    let side = ("side", named(Side::of(detail).map(Side::word), detail));
    match kind {
        Kind::Nothing => Vec::new(),
        Kind::Handled => vec![
            connection,
            ("handler", json!(detail)),
            ("bytes", json!(value)),
        ],
        Kind::Laned => vec![
            ("job", json!(subject)),
            ("route", json!(detail)),
            ("connection", json!(value)),
        ],
        Kind::Opened | Kind::Closed => vec![connection, side],
        Kind::Lost => vec![connection, side, ("errno", json!(value))],
        Kind::Shortage => {
            let what = named(Buffers::of(detail).map(Buffers::word), detail);
            vec![("what", what), ("held", json!(subject))]
        }
        Kind::Command => {
            let order = named(Order::of(detail).map(Order::word), detail);
            vec![("order", order), ("of", json!(value))]
        }
        Kind::Relayed => {
            let what = named(Relayed::of(detail).map(Relayed::word), detail);
            vec![("relay", json!(subject)), ("what", what)]
        }
        Kind::Told => vec![("waiting", json!(subject))],
        _ => fields_of_request(kind, record),
    }
}

/// The same of what happens to requests.
fn fields_of_request(kind: Kind, record: &Record) -> Vec<(&'static str, Value)> {
    let (detail, subject, value) = (record.detail, record.subject, record.value);
    let (upper, lower) = ((value >> 32) as u32, value as u32);
    let request = ("request", json!(subject));
    match kind {
        Kind::Begun => vec![
            request,
            ("route", json!(detail)),
            ("connection", json!(upper)),
            ("bytes", json!(lower)),
        ],
        Kind::Routed => vec![
            request,
            ("attempt", json!(u64::from(detail) + 1)),
            ("instance", json!(format!("{value:x}"))),
        ],
        Kind::Answered => {
            let answer = named(Answered::of(detail).map(Answered::word), detail);
            vec![request, ("answer", answer), ("ns", json!(value))]
        }
        Kind::Replied => {
            let reply = if detail == 0 { "accepted" } else { "text" };
            vec![
                request,
                ("reply", json!(reply)),
                ("connection", json!(value)),
            ]
        }
        Kind::Refused => {
            let why = ("why", named(Why::of(detail).map(Why::word), detail));
            let there = [("connection", subject), ("request", lower)];
            let there = there.into_iter().filter(|(_, number)| *number != NONE);
            let there = there.map(|(name, number)| (name, json!(number)));
            std::iter::once(why).chain(there).collect()
        }
        _ => vec![request, ("ns", json!(value))],
    }
}

/// The word of a number; one of a later version stays a number.
fn named(word: Option<&'static str>, number: u32) -> Value {
    word.map_or_else(|| json!(number), |word| json!(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 1_763_800_308_123_456_789;

    fn record(kind: u8, detail: u32, subject: u32, value: u64) -> Record {
        Record {
            number: 9,
            at_ns: 1,
            kind,
            detail,
            subject,
            value,
        }
    }

    #[test]
    fn lines_say_what_the_numbers_are() {
        for (kind, detail, subject, value, wanted) in [
            (
                Kind::Begun,
                3,
                17,
                5 << 32 | 1234,
                "request 17, route 3, connection 5, bytes 1234",
            ),
            (
                Kind::Routed,
                0,
                17,
                0xab,
                "request 17, attempt 1, instance ab",
            ),
            (
                Kind::Answered,
                1,
                17,
                900,
                "request 17, answer overloaded, ns 900",
            ),
            (
                Kind::Replied,
                0,
                17,
                5,
                "request 17, reply accepted, connection 5",
            ),
            (
                Kind::Refused,
                6,
                5,
                u64::from(NONE),
                "why queue_full, connection 5",
            ),
            (Kind::Refused, 6, NONE, 17, "why queue_full, request 17"),
            (
                Kind::Lost,
                1,
                8,
                104,
                "connection 8, side upstream, errno 104",
            ),
            (Kind::Command, 99, 0, 1, "order 99, of 1"),
        ] {
            let line = text_line(1, AT, &record(kind as u8, detail, subject, value));
            let head = format!("08:31:48.123456  core 1  {:<9}  ", kind.word());
            assert_eq!(line, head + wanted);
        }
    }

    #[test]
    fn every_kind_has_a_line_of_json() {
        for kind in 0..=Kind::ALL.len() as u8 {
            let line = json_line(0, AT, &record(kind, 0, 1, 2));
            let value: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(value["unix_ns"], AT);
            assert_eq!((&value["core"], &value["number"]), (&json!(0), &json!(9)));
            let known = Kind::of(kind.into()).map_or("unknown", Kind::word);
            assert_eq!(value["kind"], known);
        }
    }
}
