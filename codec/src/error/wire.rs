//! How an error is written and read, by serde, in JSON and MessagePack.

use std::fmt;

use serde::de::{self, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeStruct;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Class, DynamoError, Legacy, Reason};
use crate::limits::CAUSES_MAX;

/// What a user may be told about an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum PublicDetails {
    /// A text.
    Message {
        /// The text.
        message: String,
    },
    /// Something is larger than allowed.
    SizeLimit {
        /// What is allowed.
        limit: u64,
        /// What it was, if known; written as null otherwise.
        actual: Option<u64>,
    },
    /// The context is longer than the model takes.
    ContextLength {
        /// What it takes.
        limit: u64,
        /// What it was, if known; written as null otherwise.
        actual: Option<u64>,
    },
    /// Too many requests.
    RateLimit {
        /// How many are allowed, if known; written as null otherwise.
        limit: Option<u64>,
        /// How many are left, if known; written as null otherwise.
        remaining: Option<u64>,
    },
}

impl Serialize for Legacy<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Plain(name) => serializer.serialize_str(name),
            Self::Backend(name) => {
                serializer.serialize_newtype_variant("ErrorType", 10, "Backend", name)
            }
        }
    }
}

impl Serialize for DynamoError {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let optional = [
            !self.text.is_empty(),
            self.public.is_some(),
            self.caused_by.is_some(),
        ];
        let members = 4 + optional.iter().filter(|present| **present).count();
        let mut out = serializer.serialize_struct("DynamoError", members)?;
        out.serialize_field("error_type", &self.reason.legacy())?;
        out.serialize_field("class", self.class().name())?;
        out.serialize_field("reason", self.reason.name())?;
        out.serialize_field("message", &self.text)?;
        match self.text.as_str() {
            "" => out.skip_field("diagnostic")?,
            text => out.serialize_field("diagnostic", text)?,
        }
        match &self.public {
            None => out.skip_field("public")?,
            Some(public) => out.serialize_field("public", public)?,
        }
        match &self.caused_by {
            None => out.skip_field("caused_by")?,
            Some(cause) => out.serialize_field("caused_by", cause)?,
        }
        out.end()
    }
}

impl<'de> Deserialize<'de> for DynamoError {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seed = Seed {
            causes_left: CAUSES_MAX,
        };
        seed.deserialize(deserializer)
    }
}

/// Reads an error that may have so many causes; so a chain cannot exhaust the stack.
#[derive(Clone, Copy)]
struct Seed {
    causes_left: usize,
}

/// The members as they came, before the rules are applied.
#[derive(Default)]
struct Members {
    error_type: Option<ErrorType>,
    class: Option<String>,
    reason: Option<String>,
    message: Option<String>,
    diagnostic: Option<String>,
    public: Option<Public>,
    caused_by: Option<Box<DynamoError>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ErrorType {
    Plain(String),
    Backend {
        #[serde(rename = "Backend")]
        backend: String,
    },
    Other(IgnoredAny),
}

/// Details of a kind that we do not know are dropped and do not spoil the error.
#[derive(Deserialize)]
#[serde(untagged)]
enum Public {
    Known(PublicDetails),
    Other(IgnoredAny),
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Name {
    ErrorType,
    Class,
    Reason,
    Message,
    Diagnostic,
    #[serde(alias = "public_details")]
    Public,
    CausedBy,
    #[serde(other)]
    Other,
}

impl<'de> DeserializeSeed<'de> for Seed {
    type Value = DynamoError;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<DynamoError, D::Error> {
        // A map is what is asked for; readers of self-describing formats hand over arrays too.
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed {
    type Value = DynamoError;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an error object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DynamoError, A::Error> {
        let mut members = Members::default();
        while let Some(name) = map.next_key()? {
            match name {
                Name::ErrorType => once("error_type", &mut members.error_type, map.next_value()?)?,
                Name::Class => once("class", &mut members.class, map.next_value()?)?,
                Name::Reason => once("reason", &mut members.reason, map.next_value()?)?,
                Name::Message => once("message", &mut members.message, map.next_value()?)?,
                Name::Diagnostic => once("diagnostic", &mut members.diagnostic, map.next_value()?)?,
                Name::Public => once("public", &mut members.public, map.next_value()?)?,
                Name::CausedBy => {
                    let cause = map.next_value_seed(Cause(self))?;
                    once("caused_by", &mut members.caused_by, cause)?;
                }
                Name::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        members.apply()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<DynamoError, A::Error> {
        let members = Members {
            error_type: seq.next_element()?.flatten(),
            class: seq.next_element()?.flatten(),
            reason: seq.next_element()?.flatten(),
            message: seq.next_element()?.flatten(),
            diagnostic: seq.next_element()?.flatten(),
            public: seq.next_element()?.flatten(),
            caused_by: seq.next_element_seed(Cause(self))?.flatten(),
        };
        members.apply()
    }
}

fn once<T, E: de::Error>(
    name: &'static str,
    slot: &mut Option<T>,
    value: Option<T>,
) -> Result<(), E> {
    if slot.is_some() {
        return Err(E::duplicate_field(name));
    }
    *slot = value;
    Ok(())
}

/// A cause, or null in its place.
struct Cause(Seed);

impl<'de> DeserializeSeed<'de> for Cause {
    type Value = Option<Box<DynamoError>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Cause {
    type Value = Option<Box<DynamoError>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an error object or null")
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        let Some(causes_left) = self.0.causes_left.checked_sub(1) else {
            return Err(de::Error::custom("error has too many causes"));
        };
        Seed { causes_left }
            .deserialize(deserializer)
            .map(|cause| Some(Box::new(cause)))
    }
}

impl Members {
    /// Applies the reading rules: what is absent gets its default, and a reason that is unknown
    /// or belongs to another class makes the whole an invalid error without public details.
    fn apply<E: de::Error>(self) -> Result<DynamoError, E> {
        let legacy = match &self.error_type {
            None => Some(Reason::Unclassified),
            Some(ErrorType::Plain(name)) => Reason::from_legacy(Legacy::Plain(name)),
            Some(ErrorType::Backend { backend }) => Reason::from_legacy(Legacy::Backend(backend)),
            Some(ErrorType::Other(_)) => None,
        };
        let class = match &self.class {
            Some(name) => Class::from_name(name),
            None => Some(
                legacy
                    .ok_or_else(|| E::custom("error has no class and an unknown error_type"))?
                    .class(),
            ),
        };
        let reason = class.and_then(|class| match &self.reason {
            // The legacy type tells the two apart that share a name.
            Some(name) => legacy
                .filter(|legacy| legacy.name() == name)
                .or(Reason::from_name(name))
                .filter(|reason| reason.class() == class),
            None => legacy
                .filter(|reason| reason.class() == class)
                .or(Some(class.default_reason())),
        });
        let text = self.diagnostic.or(self.message).unwrap_or_default();
        let mut error = DynamoError::new(reason.unwrap_or(Reason::InvalidError), text);
        if let (Some(_), Some(Public::Known(public))) = (reason, self.public) {
            error.public = Some(public);
        }
        error.caused_by = self.caused_by;
        Ok(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> DynamoError {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn writes_dynamos_members_in_order() {
        let error = DynamoError::cannot_connect("outer")
            .with_public(PublicDetails::SizeLimit {
                limit: 5,
                actual: None,
            })
            .with_cause(DynamoError::backend_invalid_argument(""));
        let json = serde_json::to_string(&error).unwrap();
        assert_eq!(
            json,
            concat!(
                r#"{"error_type":"CannotConnect","class":"Unavailable","#,
                r#""reason":"transport.cannot_connect","message":"outer","diagnostic":"outer","#,
                r#""public":{"type":"size_limit","limit":5,"actual":null},"#,
                r#""caused_by":{"error_type":{"Backend":"InvalidArgument"},"#,
                r#""class":"InvalidRequest","reason":"backend.invalid_argument","message":""}}"#
            )
        );
        assert_eq!(read(&json), error);
        let packed = rmp_serde::to_vec_named(&error).unwrap();
        assert_eq!(
            rmp_serde::from_slice::<DynamoError>(&packed).unwrap(),
            error
        );
        let array = rmp_serde::to_vec(&DynamoError::internal("m").with_cause(error.clone()));
        assert!(array.is_ok());
    }

    #[test]
    fn reading_rules() {
        for (json, reason, text) in [
            ("{}", Reason::Unclassified, ""),
            (r#"{"message":"m","later":[1]}"#, Reason::Unclassified, "m"),
            (
                r#"{"message":"m","diagnostic":"d"}"#,
                Reason::Unclassified,
                "d",
            ),
            (r#"{"error_type":"Disconnected"}"#, Reason::Disconnected, ""),
            (
                r#"{"error_type":"WorkerOverloaded"}"#,
                Reason::WorkerOverloaded,
                "",
            ),
            (
                r#"{"error_type":{"Backend":"EngineShutdown"}}"#,
                Reason::EngineShutdown,
                "",
            ),
            (r#"{"class":"NotFound"}"#, Reason::NotFound, ""),
            (
                r#"{"class":"NotFound","error_type":"Unknown"}"#,
                Reason::NotFound,
                "",
            ),
            (
                r#"{"class":"Internal","error_type":"Future"}"#,
                Reason::Internal,
                "",
            ),
            (
                r#"{"class":"Internal","error_type":5}"#,
                Reason::Internal,
                "",
            ),
            (r#"{"class":"Internal"}"#, Reason::Unclassified, ""),
            (
                r#"{"class":"Future","message":"m"}"#,
                Reason::InvalidError,
                "m",
            ),
            (
                r#"{"reason":"request.not_found"}"#,
                Reason::InvalidError,
                "",
            ),
            (
                r#"{"class":"NotFound","reason":"request.not_found"}"#,
                Reason::NotFound,
                "",
            ),
            (
                r#"{"class":"NotFound","reason":"request.later"}"#,
                Reason::InvalidError,
                "",
            ),
            (
                r#"{"error_type":null,"class":null,"reason":null,"message":null,"public":null,
                    "diagnostic":null,"caused_by":null}"#,
                Reason::Unclassified,
                "",
            ),
        ] {
            let error = read(json);
            assert_eq!((error.reason(), error.text()), (reason, text), "{json}");
        }
    }

    #[test]
    fn public_details_survive_only_with_a_valid_reason() {
        let details = r#"{"type":"message","message":"p"}"#;
        let error = read(&format!(
            r#"{{"class":"NotFound","public_details":{details}}}"#
        ));
        let message = "p".to_owned();
        assert_eq!(error.public(), Some(&PublicDetails::Message { message }));
        let lost = read(&format!(
            r#"{{"class":"NotFound","reason":"x","public":{details}}}"#
        ));
        assert_eq!(lost.public(), None);
        let later = read(r#"{"class":"NotFound","public":{"type":"later","x":1}}"#);
        assert_eq!((later.public(), later.reason()), (None, Reason::NotFound));
    }

    #[test]
    fn refuses_what_dynamo_drops() {
        for json in [
            r#"{"error_type":"VariantFromTheFuture","message":"m"}"#,
            r#"{"error_type":{"Backend":"Future"}}"#,
            r#"{"message":"a","message":"b"}"#,
            "5",
        ] {
            assert!(serde_json::from_str::<DynamoError>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn chains_are_bounded_when_read() {
        let chain = |causes: usize| {
            let mut packed = b"\x81\xa9caused_by".repeat(causes);
            packed.push(0x80);
            rmp_serde::from_slice::<DynamoError>(&packed)
        };
        assert_eq!(chain(CAUSES_MAX).unwrap().chain().count(), CAUSES_MAX + 1);
        assert!(chain(CAUSES_MAX + 1).is_err());
        assert!(chain(1000).is_err());
    }

    #[test]
    fn arrays_are_read_member_by_member() {
        let json = r#"["CannotConnect","Unavailable","transport.cannot_connect","m",null,null,{}]"#;
        let error = read(json);
        assert_eq!(error.reason(), Reason::CannotConnect);
        assert_eq!(error.chain().count(), 2);
    }
}
