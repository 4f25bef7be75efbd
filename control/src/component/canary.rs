//! The health check of an endpoint: its payload is sent to it when nobody has got an item for a
//! while (`spec/events-discovery.md` §7.2).
//!
//! ```text
//! an item to anybody ---------------------------> Healthy, the wait begins again
//! no item for `wait` -> payload -> an item -----> Healthy
//!                              '-> anything else -> Running, which is not ready
//! ```
//! The check goes the way of any request: over the listener, the path and the handler of a shard.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::{Rc, Weak};
use std::time::Duration;

use corelane_codec::error::DynamoError;
use corelane_codec::path::instance_path;
use corelane_engine::call::{Deadlines, NewCall};
use corelane_engine::local::Run;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::runtime::Inner;
use super::serving::Serving;
use crate::health::State;

/// How often it is looked whether somebody got an item.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A shard that does not even run the check answers nothing; it has so much longer.
const SLACK: Duration = Duration::from_secs(5);

/// Checks as long as the endpoint is served. The first check comes at once.
pub(super) async fn keep_checking(inner: Weak<Inner>, serving: Rc<Serving>) {
    let Some(checks) = inner.upgrade().map(|inner| inner.options.checks) else {
        return;
    };
    let mut wait = Duration::ZERO;
    while !serving.is_stopping() {
        let active = active_within(&serving, wait).await;
        wait = checks.wait;
        let state = serving.entry.state();
        if !matches!(state, State::Running | State::Healthy) {
            // Nobody can call it; it is looked at again soon.
            wait = LOOK_EVERY;
            continue;
        }
        let Some(strong) = inner.upgrade() else {
            return;
        };
        let healthy = match active {
            true => Ok(()),
            false => check(&strong, &serving, checks.timeout).await,
        };
        drop(strong);
        if serving.is_stopping() || serving.entry.state() < State::Running {
            continue;
        }
        match healthy {
            Ok(()) => serving.entry.turn(State::Healthy),
            Err(why) => {
                tracing::warn!(endpoint = %serving.id, %why, "health check failed");
                serving.entry.turn(State::Running)
            }
        };
    }
}

/// Waits for an item to anybody, `wait` at most; answers whether there was one.
async fn active_within(serving: &Serving, wait: Duration) -> bool {
    let items = || serving.sum(|stats| stats.items.get());
    let before = items();
    let deadline = Instant::now() + wait;
    while Instant::now() < deadline && !serving.is_stopping() {
        sleep(LOOK_EVERY.min(wait)).await;
        if items() != before {
            return true;
        }
    }
    false
}

/// Sends the payload and waits for the first item.
async fn check(inner: &Inner, serving: &Serving, patience: Duration) -> Result<(), DynamoError> {
    let Some(body) = serving.canary.clone() else {
        return Ok(());
    };
    let new = NewCall {
        address: within_reach(inner.cores.address()),
        path: instance_path(inner.discovery.instance_id(), &serving.id).into_bytes(),
        id: String::new(),
        headers: Vec::new(),
        body,
        codec: serving.codec,
        deadlines: Deadlines {
            ack: patience,
            first_item: patience,
            total: patience,
        },
    };
    let codec = serving.codec;
    let (tell, told) = oneshot::channel();
    let run = Run::new(move |host| async move {
        let mut reply = host.caller().call(new);
        let found = match reply.next().await {
            Some(Ok(item)) => super::items::error_of(&item, codec).map_or(Ok(()), Err),
            Some(Err(error)) => Err(error),
            None => Err(DynamoError::stream_incomplete("the response has no item")),
        };
        // Whoever asked may have gone.
        let _ = tell.send(found);
    });
    inner.hub.run(|_| run).await?;
    match timeout(patience + SLACK, told).await {
        Ok(Ok(found)) => found,
        _ => Err(DynamoError::response_timeout("the shard does not answer")),
    }
}

/// A listener behind a wildcard is reached over loopback.
fn within_reach(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
