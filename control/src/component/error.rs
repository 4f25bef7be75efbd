//! What can go wrong between a program and its runtime, and between a handler and its caller.

use corelane_codec::error::DynamoError;
use corelane_codec::item::CodecError;
use corelane_codec::path::BadReference;
use corelane_engine::handler::BadBody;
use corelane_engine::responder::Gone;

use super::names::BadName;
use crate::discovery::DiscoveryError;

/// Why a runtime, an endpoint or a client cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that may not be made up.
    #[error(transparent)]
    Name(#[from] BadName),
    /// A text that names no endpoint.
    #[error(transparent)]
    Reference(#[from] BadReference),
    /// The store refuses the record.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    /// This process serves the endpoint already.
    #[error("{0} is served by this process already; stop it first")]
    AlreadyServed(String),
    /// This process takes no requests.
    #[error("{0} cannot be served: the runtime was started with Options::calls_only")]
    CallsOnly(String),
    /// A text that is not the address of an instance.
    #[error("{0:?} is no instance; write it like 127.0.0.1:9000/1a/dynamo/backend/generate")]
    Address(String),
    /// The runtime is leaving, or has left.
    #[error("the runtime is stopping; nothing new can be begun")]
    Stopping,
    /// A health check that cannot be sent.
    #[error("the health check of {endpoint} has no form in its codec: {why}")]
    HealthCheck {
        /// The endpoint.
        endpoint: String,
        /// What is wrong with the payload.
        why: CodecError,
    },
    /// A health check of an endpoint that takes streams of requests.
    #[error("{0} takes streams of requests, which no health check makes; serve it without one")]
    NotChecked(String),
    /// The environment asks for what cannot be had.
    #[error("{0}")]
    Environment(String),
}

/// How the work on one request can end early. `?` makes one of everything that [`super::Request`]
/// and [`super::Stream`] answer with; [`Fault::from`] of a [`DynamoError`] says anything else.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The caller asked to stop, or is gone. Nobody is told.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// The request is not what the handler takes: the caller gets `request.invalid_argument`.
    #[error(transparent)]
    BadRequest(#[from] BadBody),
    /// A value has no form in the codec of the request.
    #[error("a value of the response cannot be written: {0}")]
    Unwritable(CodecError),
    /// What the caller is to be told.
    #[error(transparent)]
    Failed(#[from] DynamoError),
}

impl Fault {
    /// A fault of the handler itself, in words.
    pub fn new(text: impl Into<String>) -> Fault {
        Fault::Failed(DynamoError::backend_unknown(text))
    }

    /// A body that is not what the endpoint takes.
    pub(super) fn unreadable(why: &CodecError) -> Fault {
        let text = format!("the request's body is not what this endpoint takes: {why}");
        Fault::Failed(DynamoError::invalid_argument(text))
    }

    /// The same as the caller sees it; `None` if there is nobody to be told.
    pub(super) fn told(&self) -> Option<DynamoError> {
        match self {
            Fault::Gone(_) => None,
            Fault::BadRequest(why) => Some(DynamoError::invalid_argument(why.to_string())),
            Fault::Unwritable(_) => Some(DynamoError::backend_unknown(self.to_string())),
            Fault::Failed(error) => Some(error.clone()),
        }
    }
}

/// What a handler answers with.
pub type Outcome = Result<(), Fault>;
