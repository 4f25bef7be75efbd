//! One etcd lease: granted, kept alive in time, given back; and the pauses between attempts.
//!
//! The keeper is a task of its own, so that slow writes or lists never delay a refresh
//! (`spec/events-discovery.md` §4.7). It refreshes when half of the TTL has passed, and
//! every 2 s at least. A broken
//! stream is not a lost lease: the lease is lost only when the store itself says that it does
//! not know it. That way a restart of the store on its old data, which keeps leases, keeps our
//! identity too.

use std::time::Duration;

use etcd_client::{Client, Error, LeaseClient, LeaseGrantOptions};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};

/// A granted lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lease {
    /// Positive; the instance id of everything stored under it.
    pub(crate) id: i64,
    /// As granted, which may be longer than asked for.
    pub(crate) ttl: Duration,
}

/// Why keeping a lease alive ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The store does not know the lease any more; its keys are gone.
    Lost,
    /// No contact; the lease may well live on.
    Broken(String),
}

/// Asks for a lease.
pub(crate) async fn grant(
    client: &Client,
    ttl: Duration,
    deadline: Duration,
) -> Result<Lease, String> {
    let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX).max(1);
    let mut leases = client.lease_client();
    let granted = timeout(deadline, leases.grant(seconds, None::<LeaseGrantOptions>))
        .await
        .map_err(|_| format!("no answer to the lease request within {deadline:?}"))?
        .map_err(|error| error.to_string())?;
    match (granted.id(), u64::try_from(granted.ttl())) {
        (id @ 1.., Ok(ttl @ 1..)) => Ok(Lease {
            id,
            ttl: Duration::from_secs(ttl),
        }),
        (id, _) => Err(format!(
            "the store granted lease {id} for {} s",
            granted.ttl()
        )),
    }
}

/// Keeps `lease` alive until it is lost or contact breaks; `alive` runs after each refresh.
/// Whoever has reason to think that it is lost says so by `doubt`: the next refresh comes at once.
pub(crate) async fn keep_alive(
    client: &Client,
    lease: Lease,
    deadline: Duration,
    doubt: &Notify,
    mut alive: impl FnMut(),
) -> Ended {
    let mut leases = client.lease_client();
    // A refresh that takes longer than a quarter of the TTL leaves no time for a second try.
    let deadline = deadline.min(lease.ttl / 4).max(Duration::from_millis(250));
    // Opening the stream sends the first refresh and reads its answer.
    let (mut keeper, mut answers) = match timeout(deadline, leases.keep_alive(lease.id)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(Error::LeaseKeepAliveError(why))) => {
            return lost_or_broken(&mut leases, lease, deadline, why).await;
        }
        Ok(Err(error)) => return Ended::Broken(error.to_string()),
        Err(_) => return Ended::Broken(format!("no keep-alive answer within {deadline:?}")),
    };
    let mut refreshed = Instant::now();
    loop {
        alive();
        let pause = (lease.ttl / 2).min(REFRESH_EVERY);
        let _ = timeout_at(refreshed + pause, doubt.notified()).await;
        refreshed = Instant::now();
        let refresh = async {
            keeper.keep_alive().await?;
            answers.message().await
        };
        match timeout(deadline, refresh).await {
            Ok(Ok(Some(answer))) if answer.ttl() > 0 => {}
            Ok(Ok(Some(_))) => return Ended::Lost,
            Ok(Ok(None)) => return Ended::Broken("the keep-alive stream ended".to_owned()),
            Ok(Err(error)) => return Ended::Broken(error.to_string()),
            Err(_) => return Ended::Broken(format!("no keep-alive answer within {deadline:?}")),
        }
    }
}

/// A lease that was revoked from outside is noticed this soon, whatever its TTL: until then clients
/// do not find us.
const REFRESH_EVERY: Duration = Duration::from_secs(2);

/// The client library reports an unknown lease and a failing stream by the same error; ask.
async fn lost_or_broken(
    leases: &mut LeaseClient,
    lease: Lease,
    deadline: Duration,
    why: String,
) -> Ended {
    match timeout(deadline, leases.time_to_live(lease.id, None)).await {
        Ok(Ok(left)) if left.ttl() <= 0 => Ended::Lost,
        _ => Ended::Broken(why),
    }
}

/// Gives the lease back, which deletes its keys.
pub(crate) async fn revoke(
    client: &Client,
    lease: Lease,
    deadline: Duration,
) -> Result<(), String> {
    let mut leases = client.lease_client();
    match timeout(deadline, leases.revoke(lease.id)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {deadline:?}")),
    }
}

/// Pauses that double: the first attempt comes at once, then `first`, up to `longest`.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// Starts with a pause of zero.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            next: Duration::ZERO,
        }
    }

    /// The pauses of reconnecting: at once, 0.5 s, doubling to 5 s (§4.7).
    pub fn reconnect() -> Self {
        Self::new(Duration::from_millis(500), Duration::from_secs(5))
    }

    /// The pause before the next attempt.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = if pause.is_zero() {
            self.first
        } else {
            (pause * 2).min(self.longest)
        };
        pause
    }

    /// After success: the next failure is retried at once again.
    pub fn reset(&mut self) {
        self.next = Duration::ZERO;
    }
}

/// A pause between half of `pause` and all of it, so that many processes that lost the same
/// store do not come back in step.
pub(crate) fn jittered(pause: Duration) -> Duration {
    let random = (uuid::Uuid::new_v4().as_u128() & 0xffff) as u32;
    pause / 2 + (pause / 2) * random / 0xffff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_start_over() {
        let mut backoff = Backoff::reconnect();
        let pauses: Vec<u128> = (0..7).map(|_| backoff.pause().as_millis()).collect();
        assert_eq!(pauses, [0, 500, 1000, 2000, 4000, 5000, 5000]);
        backoff.reset();
        assert_eq!(backoff.pause(), Duration::ZERO);
    }

    #[test]
    fn jitter_stays_between_half_and_all() {
        for _ in 0..200 {
            let pause = jittered(Duration::from_secs(4));
            assert!((Duration::from_secs(2)..=Duration::from_secs(4)).contains(&pause));
        }
    }
}
