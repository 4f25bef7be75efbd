//! What we offer in discovery for one route: our instance record under the listen endpoint, and
//! the model cards of the target (`spec/events-discovery.md` §4.3, §10.1).
//!
//! ```text
//! codec that all instances read --> our record ----\
//! cards of the target ------------> our cards -----+--> discovery, under our identity
//! ```
//! A lost lease is the discovery's business: it stores all records again under the new
//! identity. Here it only counts as not registered until that is done.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::discovery::{DeviceType, EndpointRecord, Transport};
use corelane_codec::path::{EndpointId, TcpTransport, instance_path, instance_subject};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::cards::{CardPublisher, CardWatch, advertised_codec};
use crate::discovery::{Discovery, Entry, Record, Registered};
use crate::nats::{NatsError, Requests};
use crate::publish::Listed;

/// A record that could not be stored at once is looked at this often until it is.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Keeps one listen endpoint offered until `stopping` turns true, or nothing is listed for it any
/// more. A store that is away delays, never fails.
pub struct Offer {
    /// What is listened for.
    pub listen: EndpointId,
    /// The route that has it now; once there is none, the endpoint leaves discovery.
    pub listed: watch::Receiver<Option<Rc<Listed>>>,
    /// Where it is offered.
    pub discovery: Discovery,
    /// What callers are told to dial.
    pub address: SocketAddr,
    /// Requests over NATS, which is where we are offered if they say so.
    pub requests: Option<Requests>,
    /// Ends it, and leaves everything as it is.
    pub stopping: watch::Receiver<bool>,
}

impl Offer {
    /// Registers, and follows changes of the route, its instances, cards and our identity.
    pub async fn keep(mut self) {
        let mut publisher = CardPublisher::new(&self.discovery, &self.listen);
        let mut stored_as = None;
        loop {
            let listed = self.listed.borrow_and_update().clone();
            let Some(listed) = listed else {
                publisher.reconcile(&[], &[]).await;
                let record = Record::instance_name(&self.listen);
                self.discovery.unregister(&record).await;
                tracing::info!(listen = %self.listen, "out of discovery");
                return;
            };
            listed.set_registered(stored_as.is_some());
            if !self.keep_one(&listed, &mut publisher, &mut stored_as).await {
                return;
            }
        }
    }

    /// Until another route has the endpoint; false when all is to end.
    async fn keep_one(
        &mut self,
        listed: &Listed,
        publisher: &mut CardPublisher,
        stored_as: &mut Option<(u64, PayloadCodec)>,
    ) -> bool {
        let mut instances = listed.subscribe();
        let mut cards = CardWatch::new(&self.discovery, &listed.route.target);
        let mut identity = self.discovery.identity();
        loop {
            if *self.stopping.borrow() {
                return false;
            }
            let id = *identity.borrow_and_update();
            instances.borrow_and_update();
            let known = listed.instances();
            let codec = advertised_codec(&known);
            if *stored_as != Some((id, codec)) {
                // Cards first or the record first: readers take either order.
                *stored_as = self
                    .register(listed, id, codec)
                    .await
                    .then_some((id, codec));
            }
            // A watch that is new, as after a change of the route, knows of no card yet.
            if cards.are_listed() {
                publisher.reconcile(&cards.cards(), &known).await;
            }
            let again = stored_as.is_none();
            tokio::select! {
                _ = instances.changed() => {}
                () = cards.changed() => {}
                _ = identity.changed() => listed.set_registered(false),
                _ = self.listed.changed() => return true,
                _ = self.stopping.wait_for(|stop| *stop) => return false,
                () = sleep(LOOK_AGAIN), if again => {}
            }
        }
    }

    /// Answers whether the record stands in the store.
    async fn register(&self, listed: &Listed, id: u64, codec: PayloadCodec) -> bool {
        let listen = &listed.route.listen;
        let place = match place(self.requests.as_ref(), self.address, listen, id).await {
            Ok(place) => place,
            Err(error) => {
                tracing::error!(%listen, %error, "endpoint not offered on NATS");
                listed.set_registered(false);
                return false;
            }
        };
        let record = record(listen, place, codec);
        let stored = match self.discovery.replace(record).await {
            Ok(outcome) => outcome == Registered::Stored,
            Err(error) => {
                tracing::error!(%listen, %error, "endpoint not registered");
                false
            }
        };
        if stored {
            let path = instance_path(id, listen);
            let codec = codec_word(codec);
            tracing::info!(
                %listen, target = %listed.route.target, codec, "registered as {}/{path}",
                self.address
            );
        }
        listed.set_registered(stored);
        stored
    }
}

fn codec_word(codec: PayloadCodec) -> &'static str {
    match codec {
        PayloadCodec::Json => "json",
        PayloadCodec::MessagePack => "msgpack",
    }
}

/// Where callers reach us.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    /// At this address.
    Tcp(SocketAddr),
    /// At the subject of the instance.
    Nats,
}

/// Where an instance of ours is reached; on NATS it takes requests from here on.
pub(crate) async fn place(
    requests: Option<&Requests>,
    address: SocketAddr,
    endpoint: &EndpointId,
    instance_id: u64,
) -> Result<Place, NatsError> {
    match requests.filter(|requests| requests.is_offered()) {
        None => Ok(Place::Tcp(address)),
        Some(requests) => {
            requests.serve(endpoint, instance_id).await?;
            Ok(Place::Nats)
        }
    }
}

/// Our instance record.
pub(crate) fn record(endpoint: &EndpointId, place: Place, codec: PayloadCodec) -> Record {
    let endpoint = endpoint.clone();
    let device = device_type(|name| std::env::var(name).ok());
    Record::new(Record::instance_name(&endpoint), move |id| {
        let path = instance_path(id, &endpoint);
        let transport = match place {
            Place::Nats => Transport::NatsTcp(instance_subject(id, &endpoint)),
            Place::Tcp(address) => Transport::Tcp(
                TcpTransport {
                    address,
                    path: &path,
                }
                .value(),
            ),
        };
        let mut record = EndpointRecord::new(&endpoint, id, transport);
        record.device_type = Some(device);
        record.request_plane_codec = Some(codec);
        Entry {
            key: record.key().to_string(),
            // A struct of strings and numbers always has a JSON form.
            value: serde_json::to_vec(&record).unwrap_or_default(),
        }
    })
}

/// As Dynamo would write it (§4.3): an accelerator, unless the environment hides them all.
fn device_type(lookup: impl Fn(&str) -> Option<String>) -> DeviceType {
    let hides = |name: &str, words: &[&str]| {
        let value = lookup(name).map(|value| value.trim().to_ascii_lowercase());
        value.is_some_and(|value| words.contains(&value.as_str()))
    };
    let cuda = hides("CUDA_VISIBLE_DEVICES", &["", "-1", "none", "void"]);
    if cuda || hides("NVIDIA_VISIBLE_DEVICES", &["none", "void"]) {
        DeviceType::Cpu
    } else {
        DeviceType::Cuda
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_is_what_dynamo_reads() {
        let endpoint = EndpointId::new("demo", "router", "generate");
        let address = "10.0.0.7:7000".parse().unwrap();
        let entry = record(&endpoint, Place::Tcp(address), PayloadCodec::MessagePack).entry(0xa1);
        assert_eq!(entry.key, "v1/instances/demo/router/generate/a1");
        let value: serde_json::Value = serde_json::from_slice(&entry.value).unwrap();
        assert_eq!(value["type"], "Endpoint");
        assert_eq!(value["instance_id"], 0xa1);
        assert_eq!(
            value["transport"]["tcp"],
            "10.0.0.7:7000/a1/demo/router/generate"
        );
        assert_eq!(value["request_plane_codec"], "msgpack");
        assert!(value["device_type"].is_string());
    }

    #[test]
    fn a_device_is_there_unless_the_environment_hides_it() {
        let device = |name: &'static str, value: &'static str| {
            device_type(move |asked| (asked == name).then(|| value.to_owned()))
        };
        assert_eq!(device("HOME", "none"), DeviceType::Cuda);
        assert_eq!(device("CUDA_VISIBLE_DEVICES", "0"), DeviceType::Cuda);
        assert_eq!(device("CUDA_VISIBLE_DEVICES", ""), DeviceType::Cpu);
        assert_eq!(device("CUDA_VISIBLE_DEVICES", " None "), DeviceType::Cpu);
        assert_eq!(device("NVIDIA_VISIBLE_DEVICES", "void"), DeviceType::Cpu);
        assert_eq!(device("NVIDIA_VISIBLE_DEVICES", ""), DeviceType::Cuda);
    }
}
