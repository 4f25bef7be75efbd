//! What a worker is asked, over the request plane, about what is in its KV cache, and its answer.
//!
//! A KV publisher with an index of its own says in its source record where it is asked
//! ([`SourceMetadata::recovery_target`](super::SourceMetadata)). The specification has no section
//! about it; the forms are those that Dynamo 1.6.1 is seen to exchange. An answer is one item, not
//! annotated: an enum by its name,
//!
//! ```text
//! {"TreeDump": {"events": [KV event..], "last_event_id": u64, "reset_scope": "all"}}
//! {"Events": {"events": [KV event..], "last_event_id": u64}}
//! {"TooNew": {..}} {"InvalidRange": {..}} {"TreeDumpFailed": {..}} {"Error": text}
//! ```
//!
//! The events of a dump have numbers of their own; from `last_event_id` on those of the live events
//! count.

use serde::{Deserialize, Serialize};

use super::fields::{self, EventError};
use super::kv::KvEvents;
use crate::msgpack::Reader;

const EVENTS_FIELDS: &[&str] = &["events", "last_event_id", "reset_scope"];

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvQuery {
    /// The instance.
    pub worker_id: u64,
    /// The rank within it.
    pub dp_rank: u32,
    /// Events from this one on are enough; `None` asks for all that is in the cache.
    pub start_event_id: Option<u64>,
    /// Up to this one; workers of 1.6.1 answer up to the last all the same.
    pub end_event_id: Option<u64>,
    /// The asker understands `TreeDumpFailed`.
    #[serde(default)]
    pub supports_tree_dump_failed: bool,
    /// What kind of question it is.
    #[serde(default)]
    pub kind: KvQueryKind,
}

/// The kind of question.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvQueryKind {
    /// What events would have told.
    #[default]
    Recovery,
}

impl KvQuery {
    /// Asks a rank for what came after event `after`, or for all that it holds.
    #[must_use]
    pub fn new(worker_id: u64, dp_rank: u32, after: Option<u64>) -> Self {
        Self {
            worker_id,
            dp_rank,
            start_event_id: after.map(|after| after.saturating_add(1)),
            end_event_id: None,
            supports_tree_dump_failed: true,
            kind: KvQueryKind::Recovery,
        }
    }
}

/// What is answered.
#[derive(Debug, Clone)]
pub enum KvAnswer<'a> {
    /// All that the cache holds: what was known before is void.
    Dump {
        /// Blocks as if they were stored now.
        events: KvEvents<'a>,
        /// What comes behind this event is not in it.
        last_event_id: u64,
    },
    /// The events that were asked for.
    Events {
        /// In order.
        events: KvEvents<'a>,
        /// The number of the last.
        last_event_id: u64,
    },
    /// It cannot say.
    Refused(&'a str),
}

impl<'a> KvAnswer<'a> {
    /// Reads the MessagePack form.
    ///
    /// # Errors
    /// It is none of the answers that we know of. Events are looked at when they are read.
    pub fn decode(item: &'a [u8]) -> Result<Self, EventError> {
        let mut reader = Reader::new(item);
        let (name, content) = fields::variant(&mut reader, "the answer")?;
        content.some("the answer")?;
        match name {
            b"TreeDump" => {
                let (events, last_event_id, scope) = read_events(&mut reader)?;
                match scope {
                    "" | "all" | "device" => Ok(Self::Dump {
                        events,
                        last_event_id,
                    }),
                    _ => Ok(Self::Refused("it tells of other storage only")),
                }
            }
            b"Events" => {
                let (events, last_event_id, _) = read_events(&mut reader)?;
                Ok(Self::Events {
                    events,
                    last_event_id,
                })
            }
            b"TooNew" => Ok(Self::Refused("it has not come as far")),
            b"InvalidRange" => Ok(Self::Refused("it finds the range wrong")),
            b"TreeDumpFailed" => Ok(Self::Refused("it cannot list what it has")),
            b"Error" => Ok(Self::Refused(fields::text(&mut reader, "Error")?)),
            _ => Err(EventError::UnknownVariant("the answer")),
        }
    }
}

fn read_events<'a>(reader: &mut Reader<'a>) -> Result<(KvEvents<'a>, u64, &'a str), EventError> {
    let (mut events, mut last_event_id, mut scope) = (None, 0, "");
    let met = fields::read_struct(reader, "events", EVENTS_FIELDS, |index, reader| {
        let name = EVENTS_FIELDS[index];
        match index {
            0 => events = Some(KvEvents::open(reader.raw()?)?),
            1 => last_event_id = fields::uint(reader, name)?,
            _ => scope = fields::text(reader, name)?,
        }
        Ok(())
    })?;
    met.require(0b011)?;
    let events = events.ok_or(EventError::Missing("events"))?;
    Ok((events, last_event_id, scope))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{KvChange, typed};
    use super::*;

    fn packed(value: &serde_json::Value) -> Vec<u8> {
        typed::to_payload(value).unwrap()
    }

    /// What a stock router has sent, member by member.
    #[test]
    fn questions_are_dynamos() {
        let asked = serde_json::to_string(&KvQuery::new(7, 1, None)).unwrap();
        let seen = concat!(
            r#"{"worker_id":7,"dp_rank":1,"start_event_id":null,"end_event_id":null,"#,
            r#""supports_tree_dump_failed":true,"kind":"recovery"}"#
        );
        assert_eq!(asked, seen);
        assert_eq!(KvQuery::new(7, 1, Some(4)).start_event_id, Some(5));
        let least: KvQuery = serde_json::from_str(
            r#"{"worker_id":7,"dp_rank":1,"start_event_id":3,"end_event_id":null}"#,
        )
        .unwrap();
        assert_eq!(
            (least.start_event_id, least.kind),
            (Some(3), KvQueryKind::Recovery)
        );
    }

    /// What a stock worker has answered.
    #[test]
    fn dumps_and_events_are_read() {
        let event = json!({
            "worker_id": 7, "storage_tier": "device", "residency_domain": "worker",
            "event": {"event_id": 0, "data": {"stored": {
                "parent_hash": null, "start_position": null,
                "blocks": [{"block_hash": 655, "tokens_hash": 9, "mm_extra_info": null}],
            }}, "dp_rank": 0},
        });
        let value = json!({"TreeDump": {
            "events": [event], "last_event_id": 18, "reset_scope": "all",
        }});
        let dump = packed(&value);
        let KvAnswer::Dump {
            mut events,
            last_event_id: 18,
        } = KvAnswer::decode(&dump).unwrap()
        else {
            panic!("a dump up to 18");
        };
        let first = events.next_event().unwrap().unwrap();
        assert_eq!(first.worker_id, 7);
        assert!(matches!(first.change, KvChange::Stored { .. }));
        assert!(events.next_event().unwrap().is_none());
        let owned: typed::KvAnswer = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(serde_json::to_value(&owned).unwrap(), value);
        let none = packed(&json!({"Events": {"events": [], "last_event_id": 19, "more": {}}}));
        let answer = KvAnswer::decode(&none).unwrap();
        assert!(matches!(
            answer,
            KvAnswer::Events {
                last_event_id: 19,
                ..
            }
        ));
    }

    #[test]
    fn refusals_are_told_and_nonsense_is_none() {
        let other = json!({"events": [], "last_event_id": 1, "reset_scope": "lower_tier"});
        let other = json!({ "TreeDump": other });
        for (answer, why) in [
            (
                json!({"TooNew": {"requested_start": 9, "newest_available": 3}}),
                "as far",
            ),
            (
                json!({"InvalidRange": {"start_id": 7, "end_id": 5}}),
                "range",
            ),
            (
                json!({"TreeDumpFailed": {"last_event_id": 1, "message": "m"}}),
                "list",
            ),
            (json!({"Error": "dp_rank mismatch"}), "dp_rank mismatch"),
            (other, "other storage"),
        ] {
            let bytes = packed(&answer);
            let decoded = KvAnswer::decode(&bytes).unwrap();
            assert!(
                matches!(decoded, KvAnswer::Refused(text) if text.contains(why)),
                "{answer}"
            );
        }
        for nonsense in [
            json!({}),
            json!("TreeDump"),
            json!({"Status": {}}),
            json!({"Events": {"events": []}}),
            json!({"Events": {"events": {}, "last_event_id": 1}}),
            json!({"Error": 3}),
        ] {
            assert!(KvAnswer::decode(&packed(&nonsense)).is_err(), "{nonsense}");
        }
    }
}
