//! The catalogue: every reason with its class, its legacy name and its constructor, in one table.

use super::DynamoError;

/// What kind of fault an error is; the coarse half of a reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are Dynamo's and say all there is")]
pub enum Class {
    InvalidRequest,
    Unauthenticated,
    PermissionDenied,
    NotFound,
    Conflict,
    PayloadTooLarge,
    UnsupportedMedia,
    RateLimited,
    CapacityExhausted,
    BackendProtocol,
    Unavailable,
    DeadlineExceeded,
    Cancelled,
    NotImplemented,
    Internal,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::InvalidRequest,
        Self::Unauthenticated,
        Self::PermissionDenied,
        Self::NotFound,
        Self::Conflict,
        Self::PayloadTooLarge,
        Self::UnsupportedMedia,
        Self::RateLimited,
        Self::CapacityExhausted,
        Self::BackendProtocol,
        Self::Unavailable,
        Self::DeadlineExceeded,
        Self::Cancelled,
        Self::NotImplemented,
        Self::Internal,
    ];

    /// Its name on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidRequest => "InvalidRequest",
            Self::Unauthenticated => "Unauthenticated",
            Self::PermissionDenied => "PermissionDenied",
            Self::NotFound => "NotFound",
            Self::Conflict => "Conflict",
            Self::PayloadTooLarge => "PayloadTooLarge",
            Self::UnsupportedMedia => "UnsupportedMedia",
            Self::RateLimited => "RateLimited",
            Self::CapacityExhausted => "CapacityExhausted",
            Self::BackendProtocol => "BackendProtocol",
            Self::Unavailable => "Unavailable",
            Self::DeadlineExceeded => "DeadlineExceeded",
            Self::Cancelled => "Cancelled",
            Self::NotImplemented => "NotImplemented",
            Self::Internal => "Internal",
        }
    }

    /// The class of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.name() == name)
    }

    /// The reason of an error that names this class and nothing finer.
    #[must_use]
    pub fn default_reason(self) -> Reason {
        // Every class is also the name of a row.
        Reason::from_legacy(Legacy::Plain(self.name())).unwrap_or(Reason::Unclassified)
    }
}

/// The older name of an error's kind, `error_type` on the wire: a word, or `{"Backend": word}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Legacy<'a> {
    /// A word.
    Plain(&'a str),
    /// A word for a fault inside the engine.
    Backend(&'a str),
}

/// Each row: constructor; variant; class; reason; how it is made or read as a legacy type; how
/// that type is written (older readers know fewer names).
macro_rules! catalogue {
    ($(
        $new:ident $variant:ident $class:ident $name:literal
            $kind:ident $read:literal $write:literal;
    )*) => {
        /// Why something failed: Dynamo's closed catalogue.
        ///
        /// [`Reason::ResponseTimeout`] and [`Reason::BackendResponseTimeout`] have one name and
        /// differ in their legacy type only; policy treats them alike.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason {
            $(#[doc = concat!("`", $name, "`")] $variant,)*
        }

        impl Reason {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Its name on the wire.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The only class that it may come with.
            #[must_use]
            pub const fn class(self) -> Class {
                match self { $(Self::$variant => Class::$class,)* }
            }

            /// The `error_type` that goes on the wire with it.
            #[must_use]
            pub const fn legacy(self) -> Legacy<'static> {
                match self { $(Self::$variant => Legacy::$kind($write),)* }
            }

            /// The reason that an `error_type` stands for when no reason is given.
            #[must_use]
            pub fn from_legacy(legacy: Legacy<'_>) -> Option<Self> {
                match legacy {
                    $(Legacy::$kind($read) => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }

        impl DynamoError {
            $(
                #[doc = concat!("An error of reason `", $name, "`.")]
                #[must_use]
                pub fn $new(text: impl Into<String>) -> Self {
                    Self::new(Reason::$variant, text)
                }
            )*
        }
    };
}

// A legacy name with a blank in it is one that no peer sends: those reasons have no legacy type
// of their own to be read from.
catalogue! {
    invalid_argument InvalidArgument InvalidRequest "request.invalid_argument"
        Plain "InvalidArgument" "InvalidArgument";
    cannot_connect CannotConnect Unavailable "transport.cannot_connect"
        Plain "CannotConnect" "CannotConnect";
    disconnected Disconnected Unavailable "transport.disconnected"
        Plain "Disconnected" "Disconnected";
    connection_timeout ConnectionTimeout DeadlineExceeded "transport.connection_timeout"
        Plain "ConnectionTimeout" "ConnectionTimeout";
    response_timeout ResponseTimeout DeadlineExceeded "backend.response_timeout"
        Plain "ResponseTimeout" "ResponseTimeout";
    cancelled Cancelled Cancelled "request.cancelled"
        Plain "Cancelled" "Cancelled";
    resource_exhausted PoolExhausted CapacityExhausted "capacity.pool_exhausted"
        Plain "ResourceExhausted" "ResourceExhausted";
    worker_overloaded WorkerOverloaded CapacityExhausted "capacity.worker_overloaded"
        Plain "WorkerOverloaded" "ResourceExhausted";
    unavailable Unavailable Unavailable "backend.unavailable"
        Plain "Unavailable" "Unavailable";
    worker_unavailable WorkerUnavailable Unavailable "backend.worker_unavailable"
        Plain "WorkerUnavailable" "WorkerUnavailable";
    backend_unknown BackendUnknown Internal "backend.unknown"
        Backend "Unknown" "Unknown";
    backend_invalid_argument BackendInvalidArgument InvalidRequest "backend.invalid_argument"
        Backend "InvalidArgument" "InvalidArgument";
    backend_cannot_connect BackendCannotConnect Unavailable "backend.cannot_connect"
        Backend "CannotConnect" "CannotConnect";
    backend_disconnected BackendDisconnected Unavailable "backend.disconnected"
        Backend "Disconnected" "Disconnected";
    backend_connection_timeout BackendConnectionTimeout DeadlineExceeded
        "backend.connection_timeout" Backend "ConnectionTimeout" "ConnectionTimeout";
    backend_response_timeout BackendResponseTimeout DeadlineExceeded "backend.response_timeout"
        Backend "ResponseTimeout" "ResponseTimeout";
    backend_cancelled BackendCancelled Cancelled "backend.cancelled"
        Backend "Cancelled" "Cancelled";
    engine_shutdown EngineShutdown Unavailable "backend.engine_shutdown"
        Backend "EngineShutdown" "EngineShutdown";
    stream_incomplete StreamIncomplete Unavailable "backend.stream_incomplete"
        Backend "StreamIncomplete" "StreamIncomplete";
    invalid_request InvalidRequest InvalidRequest "request.invalid"
        Plain "InvalidRequest" "InvalidArgument";
    payload_too_large PayloadTooLarge PayloadTooLarge "request.payload_too_large"
        Plain "PayloadTooLarge" "InvalidArgument";
    unsupported_media UnsupportedMedia UnsupportedMedia "request.unsupported_media"
        Plain "UnsupportedMedia" "InvalidArgument";
    rate_limited RateLimited RateLimited "request.rate_limited"
        Plain "RateLimited" "ResourceExhausted";
    capacity_exhausted CapacityExhausted CapacityExhausted "capacity.exhausted"
        Plain "CapacityExhausted" "ResourceExhausted";
    deadline_exceeded DeadlineExceeded DeadlineExceeded "request.deadline_exceeded"
        Plain "DeadlineExceeded" "ResponseTimeout";
    unauthenticated Unauthenticated Unauthenticated "request.unauthenticated"
        Plain "Unauthenticated" "Unknown";
    permission_denied PermissionDenied PermissionDenied "request.permission_denied"
        Plain "PermissionDenied" "Unknown";
    not_found NotFound NotFound "request.not_found"
        Plain "NotFound" "Unknown";
    conflict Conflict Conflict "request.conflict"
        Plain "Conflict" "Unknown";
    backend_protocol BackendProtocol BackendProtocol "backend.protocol"
        Plain "BackendProtocol" "Unknown";
    not_implemented NotImplemented NotImplemented "runtime.not_implemented"
        Plain "NotImplemented" "Unknown";
    internal Internal Internal "runtime.internal"
        Plain "Internal" "Unknown";
    unknown Unclassified Internal "runtime.unclassified"
        Plain "Unknown" "Unknown";
    invalid_error InvalidError Internal "runtime.invalid_error"
        Plain "invalid error" "Unknown";
    queue_deadline_exceeded QueueDeadlineExceeded DeadlineExceeded
        "router.queue_deadline_exceeded" Plain "queue deadline exceeded" "ResponseTimeout";
}

impl Reason {
    /// The reason of that name; of the two that share `backend.response_timeout` the plain one.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let mut all = Self::ALL.iter().copied();
        all.find(|reason| reason.name() == name)
    }

    /// True for the reasons after which Dynamo's migration tries a request again
    /// (spec/request-plane.md §12).
    #[must_use]
    pub const fn migrates(self) -> bool {
        matches!(
            self,
            Self::CannotConnect
                | Self::Disconnected
                | Self::ConnectionTimeout
                | Self::BackendCannotConnect
                | Self::BackendDisconnected
                | Self::BackendConnectionTimeout
                | Self::ResponseTimeout
                | Self::BackendResponseTimeout
                | Self::EngineShutdown
                | Self::StreamIncomplete
                | Self::WorkerUnavailable
                | Self::WorkerOverloaded
        )
    }

    /// True for the reasons after which a request must not be tried on another instance
    /// (spec/request-plane.md §4.3, §12).
    #[must_use]
    pub const fn blocks_migration(self) -> bool {
        matches!(
            self,
            Self::Cancelled
                | Self::DeadlineExceeded
                | Self::BackendCancelled
                | Self::CapacityExhausted
                | Self::PoolExhausted
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::REASON_BYTES_MAX;

    #[test]
    fn names_are_well_formed_and_lead_back() {
        assert_eq!(Reason::ALL.len(), 35);
        for reason in Reason::ALL {
            let name = reason.name();
            let again = Reason::from_name(name).unwrap();
            let twins = [Reason::ResponseTimeout, Reason::BackendResponseTimeout];
            assert!(again == *reason || twins == [again, *reason], "{name}");
            assert!(name.len() <= REASON_BYTES_MAX);
            let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
            assert!(name.bytes().all(allowed), "{name}");
        }
        assert_eq!(Reason::from_name("request.later"), None);
    }

    #[test]
    fn backend_reasons_are_the_snake_case_of_their_type() {
        for reason in Reason::ALL {
            let Legacy::Backend(name) = reason.legacy() else {
                continue;
            };
            let mut snake = String::from("backend");
            for char in name.chars() {
                match char.is_ascii_uppercase() {
                    true if snake == "backend" => snake.push('.'),
                    true => snake.push('_'),
                    false => {}
                }
                snake.push(char.to_ascii_lowercase());
            }
            assert_eq!(snake, reason.name());
        }
    }

    #[test]
    fn every_class_has_a_default_of_its_own() {
        for class in Class::ALL {
            assert_eq!(Class::from_name(class.name()), Some(class));
            assert_eq!(class.default_reason().class(), class);
        }
    }
}
