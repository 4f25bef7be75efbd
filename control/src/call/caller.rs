//! One caller of `corelane call`: one call after the other, from a shard.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;
use corelane_codec::headers::TRACEPARENT;
use corelane_codec::trace_context::TraceContext;
use tokio::sync::mpsc::Sender;

use super::{Bodies, Outcome};
use crate::cli::{CallArgs, Early};
use crate::component::{Call, Client, Ending, LocalClient, LocalReply, Shard};
use crate::trace::CallSpan;

/// Something that happened to a call.
pub(super) struct Heard {
    /// Its number, from 1.
    pub(super) call: u64,
    /// Who answers it, once that is known.
    pub(super) instance: Option<u64>,
    /// When, since its shard began it.
    pub(super) at: Duration,
    pub(super) what: What,
}

/// What happens to calls.
pub(super) enum What {
    /// An item as it came.
    Item(Vec<u8>, PayloadCodec),
    /// An item that could not be understood. The response goes on.
    BadItem(DynamoError),
    /// Nothing more comes.
    End(End),
}

/// How a call ended.
pub(super) struct End {
    pub(super) outcome: Outcome,
    pub(super) error: Option<DynamoError>,
    /// When the worker had accepted it.
    pub(super) accepted: Option<Duration>,
    pub(super) span: Option<CallSpan>,
}

/// Makes calls as long as some are left. Clones share what is left.
#[derive(Clone)]
pub(super) struct Caller {
    pub(super) args: Arc<CallArgs>,
    pub(super) bodies: Arc<Bodies>,
    pub(super) client: Client,
    /// Calls that somebody has begun.
    pub(super) begun: Arc<AtomicU64>,
    /// Who listens; when he is gone nobody calls.
    pub(super) out: Sender<Heard>,
}

/// Nobody listens.
struct Deaf;

impl Caller {
    /// Calls until none is left.
    pub(super) async fn run(self, shard: Shard) {
        let client = shard.client(&self.client);
        loop {
            let number = 1 + self.begun.fetch_add(1, Ordering::Relaxed);
            if number > self.args.count || self.one(&client, number).await.is_err() {
                return;
            }
        }
    }

    async fn one(&self, client: &LocalClient, number: u64) -> Result<(), Deaf> {
        let (call, span) = self.call();
        let began = Instant::now();
        let reply = match client.start(call).await {
            Ok(reply) => reply,
            Err(error) => {
                let end = End {
                    outcome: Outcome::Failed,
                    error: Some(error),
                    accepted: None,
                    span,
                };
                return self
                    .say(number, None, began.elapsed(), What::End(end))
                    .await;
            }
        };
        self.read(number, reply, span).await
    }

    /// A call as the arguments say, and its span, where spans are made.
    fn call(&self) -> (Call, Option<CallSpan>) {
        let codec = self.client.codec();
        let call = self
            .client
            .request_encoded(codec, self.bodies.in_codec(codec));
        let total = self.args.timeout;
        let mut call = call.first_item_within(total).within(total);
        let named = |(name, _): &&(String, String)| name == TRACEPARENT;
        let named = self.args.headers.iter().find(named);
        // A span of ours comes between the caller's and the worker's.
        let parent = named.and_then(|(_, value)| TraceContext::parse(value));
        let span = CallSpan::begin(parent);
        for (name, value) in &self.args.headers {
            if span.is_none() || name != TRACEPARENT {
                call = call.header(name, value);
            }
        }
        if let Some(span) = &span {
            call = call.header(TRACEPARENT, span.context().to_string());
        }
        (call, span)
    }

    async fn read(
        &self,
        number: u64,
        mut reply: LocalReply,
        span: Option<CallSpan>,
    ) -> Result<(), Deaf> {
        let (codec, instance) = (reply.codec(), Some(reply.instance_id()));
        let mut early = self.args.early;
        let (mut items, mut last) = (0, None);
        while let Some(item) = reply.next_item().await {
            let at = reply.times().item.unwrap_or_default();
            // Of an error it is not known before whether it was the end.
            if let Some((at, error)) = last.take() {
                self.say(number, instance, at, What::BadItem(error)).await?;
            }
            match item {
                Ok(item) => {
                    self.say(number, instance, at, What::Item(item, codec))
                        .await?
                }
                Err(error) => last = Some((at, error)),
            }
            items += 1;
            match early {
                Some(Early::Stop(after)) if items >= after => reply.stop(),
                Some(Early::Kill(after)) if items >= after => reply.kill(),
                _ => continue,
            }
            early = None;
        }
        let outcome = match reply.ending() {
            Some(Ending::Stopped) => Outcome::Stopped,
            Some(Ending::Refused) => Outcome::Refused,
            Some(Ending::Failed) => Outcome::Failed,
            Some(Ending::Complete) | None => Outcome::Ok,
        };
        if matches!(outcome, Outcome::Ok | Outcome::Stopped)
            && let Some((at, error)) = mem::take(&mut last)
        {
            self.say(number, instance, at, What::BadItem(error)).await?;
        }
        let times = reply.times();
        let end = End {
            outcome,
            error: last.map(|(_, error)| error),
            accepted: times.accepted,
            span,
        };
        let at = times.ended.unwrap_or_default();
        self.say(number, instance, at, What::End(end)).await
    }

    async fn say(
        &self,
        call: u64,
        instance: Option<u64>,
        at: Duration,
        what: What,
    ) -> Result<(), Deaf> {
        let heard = Heard {
            call,
            instance,
            at,
            what,
        };
        self.out.send(heard).await.map_err(|_| Deaf)
    }
}
