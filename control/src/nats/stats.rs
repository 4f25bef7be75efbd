//! What the services of a component say about themselves, asked of all of them at once
//! (spec/events-discovery.md §6.5).

use std::time::Duration;

use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use super::{Nats, NatsError};

/// Longest time that answers are gathered for without a warning.
const USUAL_MAX: Duration = Duration::from_secs(10);
/// Answers that are gathered at most.
const ANSWERS_MAX: usize = 65_536;

/// What one service answers.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ServiceStats {
    /// The component's service name.
    pub name: String,
    /// Drawn at random by the service.
    pub id: String,
    /// Of the program.
    pub version: String,
    /// When it began, in RFC 3339.
    pub started: String,
    /// Its endpoints.
    pub endpoints: Vec<EndpointStats>,
}

/// What a service says about one endpoint.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct EndpointStats {
    /// The subject with dashes for dots.
    pub name: String,
    /// Where its requests come in.
    pub subject: String,
    /// The figures, if the service gives all of them; Dynamo 1.6.1 does not.
    #[serde(flatten, deserialize_with = "all_or_none", default)]
    pub figures: Option<EndpointFigures>,
}

/// Figures of an endpoint.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct EndpointFigures {
    /// Requests taken.
    pub num_requests: u64,
    /// Requests that failed.
    pub num_errors: u64,
    /// Nanoseconds in all.
    pub processing_time: u64,
    /// Nanoseconds each.
    pub average_processing_time: u64,
    /// What went wrong last.
    pub last_error: Value,
    /// The group that shares the requests.
    pub queue_group: String,
    /// What the endpoint's own handler says.
    pub data: Value,
}

/// These figures count only if all of them are there.
fn all_or_none<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<EndpointFigures>, D::Error> {
    let members = Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(members).ok())
}

impl EndpointStats {
    /// The instance: hexadecimal behind the last dash of the subject, as Dynamo reads it.
    pub fn instance_id(&self) -> Option<u64> {
        let (_, hex) = self.subject.rsplit_once('-')?;
        i64::from_str_radix(hex, 16).ok().map(|id| id as u64)
    }
}

impl Nats {
    /// Asks all services of this name what they have done, and gathers answers for `patience`.
    /// What cannot be read is left out.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn service_stats(
        &self,
        service: &str,
        patience: Duration,
    ) -> Result<Vec<ServiceStats>, NatsError> {
        if patience.is_zero() || patience > USUAL_MAX {
            tracing::warn!(?patience, "an odd time to gather the stats of services for");
        }
        let client = self.client();
        let closed = |error: &dyn std::error::Error| NatsError::Service(error.to_string());
        let inbox = client.new_inbox();
        let answers = client.subscribe(inbox.clone()).await;
        let mut answers = answers.map_err(|error| closed(&error))?;
        let subject = format!("$SRV.STATS.{service}");
        let asked = client.publish_with_reply(subject, inbox, "".into()).await;
        asked.map_err(|error| closed(&error))?;
        let deadline = Instant::now() + patience;
        let mut all = Vec::new();
        while let Ok(Some(message)) = timeout_at(deadline, answers.next()).await {
            // Nobody there: the server says so at once.
            if message.payload.is_empty() && message.status.is_some() {
                break;
            }
            match serde_json::from_slice(&message.payload) {
                Ok(stats) => all.push(stats),
                Err(error) => tracing::warn!(%error, service, "stats that are none"),
            }
            if all.len() >= ANSWERS_MAX {
                break;
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A real answer of a 1.6.1 worker, without `data`, and one with it.
    #[test]
    fn figures_count_only_if_all_are_there() {
        let text = r#"{"type":"io.nats.micro.v1.stats_response","name":"demo_backend",
            "id":"MADso9S6ue8rQmBfjx4QKX","version":"1.6.1",
            "started":"2026-11-21T19:56:36.748392417Z","endpoints":[
            {"name":"demo_backend-generate-7d7ba1ff9b377aa9",
             "subject":"demo_backend.generate-7d7ba1ff9b377aa9","num_requests":3,"num_errors":0,
             "processing_time":0,"average_processing_time":0,"last_error":"","queue_group":"q"}]}"#;
        let stats: ServiceStats = serde_json::from_str(text).unwrap();
        let endpoint = &stats.endpoints[0];
        assert_eq!(endpoint.figures, None);
        assert_eq!(endpoint.instance_id(), Some(0x7d7b_a1ff_9b37_7aa9));
        let more = text.replace(
            r#""queue_group":"q""#,
            r#""queue_group":"q","data":{"a":1}"#,
        );
        let stats: ServiceStats = serde_json::from_str(&more).unwrap();
        let figures = stats.endpoints[0].figures.as_ref().unwrap();
        assert_eq!(
            (figures.num_requests, &figures.data["a"]),
            (3, &Value::from(1))
        );
    }
}
