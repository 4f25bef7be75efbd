//! The instances of one target endpoint, as something that can be dialled
//! (`spec/events-discovery.md` §4.3, §4.10, §10.2).
//!
//! ```text
//! Watch<EndpointRecord> --check key, value, transport--> Vec<Instance>, sorted by id
//! ```
//! The key decides what exists, the value decides what is used. Dynamo does not compare the
//! two (its quirk Q4); we do, and say so once per key.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::discovery::{DeviceType, EndpointRecord, Transport};
use corelane_codec::path::{EndpointId, InstanceKey, TcpTransport, parse_instance_hex};

use crate::discovery::{Discovery, DiscoveryStats, Freshness, Watch};

/// Longest request path in bytes; its length is a 16-bit field of the request frame.
const PATH_BYTES_MAX: usize = u16::MAX as usize;

/// One instance that requests can be sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// The id that the record's value names.
    pub id: u64,
    /// Where to connect.
    pub address: SocketAddr,
    /// What to send as the request path, byte for byte as advertised.
    pub path: Vec<u8>,
    /// The payload codec that it asks for; JSON when it does not say.
    pub codec: PayloadCodec,
    /// What it computes on, if it says so.
    pub device: Option<DeviceType>,
}

/// A watch on the instances of one endpoint.
pub struct InstanceWatch {
    watch: Watch<EndpointRecord>,
    /// Where those on NATS are dialled.
    gateway: Option<SocketAddr>,
    /// What was said about which key, so that it is said once.
    complaints: BTreeMap<String, String>,
}

impl InstanceWatch {
    /// Starts watching `target`.
    pub fn new(discovery: &Discovery, target: &EndpointId) -> Self {
        let prefix = InstanceKey::endpoint_prefix(target);
        let watch = discovery.watch(&prefix, |_, value| serde_json::from_slice(value));
        Self {
            watch,
            gateway: None,
            complaints: BTreeMap::new(),
        }
    }

    /// Instances that take requests over NATS are dialled at `gateway`, with their subject for a
    /// path; without one they cannot be used.
    #[must_use]
    pub fn over_nats(mut self, gateway: Option<SocketAddr>) -> Self {
        self.gateway = gateway;
        self
    }

    /// Waits until something changed since the last call; the first call returns at once.
    pub async fn changed(&mut self) {
        self.watch.changed().await;
    }

    /// Waits until the first list has arrived; bound it with a timeout of your own.
    pub async fn listed(&mut self) {
        self.watch.listed().await;
    }

    /// Whether the instances are what the store says now.
    pub fn freshness(&self) -> Freshness {
        self.watch.directory().freshness()
    }

    /// The instances, sorted by id, each id once.
    pub fn instances(&mut self) -> Vec<Instance> {
        let prefix = self.watch.prefix();
        let stats = self.watch.stats().clone();
        let mut told = BTreeMap::new();
        let mut found: BTreeMap<u64, Candidate> = BTreeMap::new();
        for (key, record, suspect) in self.watch.directory().entries() {
            let outcome = look(prefix, key, record, self.gateway);
            if let Some(complaint) = outcome.complaint() {
                if self.complaints.get(key) != Some(&complaint) {
                    outcome.count(&stats);
                    tracing::warn!(key, complaint, "instance record");
                }
                told.insert(key.to_owned(), complaint);
            }
            let (Look::Usable(instance) | Look::Mismatched(instance, _)) = outcome.look else {
                continue;
            };
            let own_key = outcome.key_id == Some(instance.id);
            let candidate = Candidate {
                instance,
                suspect,
                own_key,
            };
            match found.get(&candidate.instance.id) {
                Some(present) if present.rank() >= candidate.rank() => {}
                _ => {
                    found.insert(candidate.instance.id, candidate);
                }
            }
        }
        self.complaints = told;
        without_superseded(found, self.gateway)
    }
}

/// An instance and how much it is to be believed.
struct Candidate {
    instance: Instance,
    suspect: bool,
    own_key: bool,
}

impl Candidate {
    /// Of two records with one id, the confirmed one under its own key is right.
    fn rank(&self) -> (bool, bool) {
        (!self.suspect, self.own_key)
    }
}

/// A worker that registered again under a new id after an outage would be listed twice while
/// its old key waits for confirmation; the address tells, except of those behind the gateway.
fn without_superseded(
    found: BTreeMap<u64, Candidate>,
    gateway: Option<SocketAddr>,
) -> Vec<Instance> {
    let confirmed: std::collections::BTreeSet<SocketAddr> = found
        .values()
        .filter(|candidate| !candidate.suspect)
        .map(|candidate| candidate.instance.address)
        .filter(|address| Some(*address) != gateway)
        .collect();
    found
        .into_values()
        .filter(|found| !found.suspect || !confirmed.contains(&found.instance.address))
        .map(|found| found.instance)
        .collect()
}

/// What one record turned out to be.
enum Look {
    Usable(Instance),
    Mismatched(Instance, String),
    CannotDial(String),
    /// A key of another endpoint whose name continues ours with a `/`.
    Foreign,
}

struct Outcome {
    key_id: Option<u64>,
    look: Look,
}

impl Outcome {
    fn complaint(&self) -> Option<String> {
        match &self.look {
            Look::Usable(_) | Look::Foreign => None,
            Look::Mismatched(_, text) | Look::CannotDial(text) => Some(text.clone()),
        }
    }

    fn count(&self, stats: &DiscoveryStats) {
        match &self.look {
            Look::Mismatched(..) => stats.add(&stats.mismatched_instances, 1),
            Look::CannotDial(_) => stats.add(&stats.rejected_instances, 1),
            Look::Usable(_) | Look::Foreign => {}
        }
    }
}

fn look(prefix: &str, key: &str, record: &EndpointRecord, gateway: Option<SocketAddr>) -> Outcome {
    let last = key.strip_prefix(prefix).unwrap_or(key);
    if last.contains('/') {
        return Outcome {
            key_id: None,
            look: Look::Foreign,
        };
    }
    let key_id = parse_instance_hex(last);
    let look = match dial(&record.transport, gateway) {
        Err(why) => Look::CannotDial(why),
        Ok((address, path)) => {
            let id = record.instance_id;
            let codec = record.payload_codec();
            let instance = Instance {
                id,
                address,
                path,
                codec,
                device: record.device_type,
            };
            match mismatch(prefix, key_id, record) {
                None => Look::Usable(instance),
                Some(text) => Look::Mismatched(instance, text),
            }
        }
    };
    Outcome { key_id, look }
}

fn mismatch(prefix: &str, key_id: Option<u64>, record: &EndpointRecord) -> Option<String> {
    if key_id != Some(record.instance_id) {
        let id = record.instance_id;
        return Some(format!(
            "the key names another id than the value, {id:x}, which is used"
        ));
    }
    let endpoint = record.endpoint_id();
    (InstanceKey::endpoint_prefix(&endpoint) != prefix)
        .then(|| format!("the value says that it belongs to {endpoint}"))
}

/// Address and path of a TCP transport, or why it cannot be dialled.
pub(crate) fn dial(
    transport: &Transport,
    gateway: Option<SocketAddr>,
) -> Result<(SocketAddr, Vec<u8>), String> {
    let text = match (transport, gateway) {
        (Transport::Tcp(text), _) => text,
        (Transport::NatsTcp(subject), Some(gateway)) => {
            return match subject.len() {
                1..=PATH_BYTES_MAX => Ok((gateway, subject.as_bytes().to_vec())),
                bytes => Err(format!("the subject is {bytes} bytes long")),
            };
        }
        (Transport::NatsTcp(subject), None) => {
            return Err(format!(
                "takes requests over NATS ({subject}), which is not dialled"
            ));
        }
    };
    let TcpTransport { address, path } =
        TcpTransport::parse(text).map_err(|error| format!("{error}: {text:?}"))?;
    match (address.port(), path.len()) {
        (0, _) => Err("port 0 cannot be dialled".to_owned()),
        (_, 0) => Err("there is no request path after the address".to_owned()),
        (_, 1..=PATH_BYTES_MAX) => Ok((address, path.as_bytes().to_vec())),
        (_, bytes) => Err(format!("the request path is {bytes} bytes long")),
    }
}

#[cfg(test)]
impl Instance {
    /// One for tests.
    pub(crate) fn sample(id: u64, port: u16) -> Instance {
        Instance {
            id,
            address: ([127, 0, 0, 1], port).into(),
            path: format!("{id:x}/x").into_bytes(),
            codec: PayloadCodec::Json,
            device: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::{MemoryDiscovery, MemoryStore};

    const PREFIX: &str = "v1/instances/demo/backend/fake/";

    fn value(id: u64, transport: &str) -> String {
        let names = r#""component":"backend","endpoint":"fake","namespace":"demo""#;
        format!(r#"{{"type":"Endpoint",{names},"instance_id":{id},"transport":{transport}}}"#)
    }

    fn tcp(id: u64, address: &str) -> String {
        value(id, &format!(r#"{{"tcp":"{address}/x"}}"#))
    }

    fn setup() -> (MemoryStore, Discovery, InstanceWatch) {
        let store = MemoryStore::default();
        let discovery = Discovery::Memory(MemoryDiscovery::new(&store));
        let target = EndpointId::new("demo", "backend", "fake");
        let watch = InstanceWatch::new(&discovery, &target);
        (store, discovery, watch)
    }

    fn ids(watch: &mut InstanceWatch) -> Vec<u64> {
        watch
            .instances()
            .iter()
            .map(|instance| instance.id)
            .collect()
    }

    #[test]
    fn instances_on_nats_are_dialled_at_the_gateway() {
        let (store, _, watch) = setup();
        let gateway = SocketAddr::from(([127, 0, 0, 1], 9));
        let mut watch = watch.over_nats(Some(gateway));
        let nats = value(2, r#"{"nats_tcp":"demo_backend.fake-2"}"#);
        store.put(&format!("{PREFIX}1"), tcp(1, "127.0.0.1:5555").as_bytes());
        store.put(&format!("{PREFIX}2"), nats.as_bytes());
        let found = watch.instances();
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[1].address, &found[1].path[..]),
            (gateway, &b"demo_backend.fake-2"[..])
        );
        let mut without = watch.over_nats(None);
        assert_eq!(ids(&mut without), [1]);
    }

    // The cases of `dumps/discovery-client-tolerance.txt`.
    #[test]
    fn tolerates_what_real_clients_tolerate_and_removes_by_key() {
        let (store, discovery, mut watch) = setup();
        let put = |last: &str, value: &str| store.put(&format!("{PREFIX}{last}"), value.as_bytes());
        put(
            "a1",
            &value(0xa1, r#"{"tcp":"tcp://127.0.0.1:1/a1/demo/backend/fake"}"#),
        );
        let only = Instance {
            id: 0xa1,
            address: "127.0.0.1:1".parse().unwrap(),
            path: b"a1/demo/backend/fake".to_vec(),
            codec: PayloadCodec::Json,
            device: None,
        };
        assert_eq!(watch.instances(), [only]);
        put("a2", &value(0xa2, r#"{"nats_tcp":"demo_backend.fake-a2"}"#));
        put("a3", &value(0xa3, r#"{"http":"127.0.0.1:3/x"}"#));
        put("a4", &tcp(0x3e7, "127.0.0.1:4"));
        put("00A8", &tcp(0xa8, "[::1]:8"));
        put("more/ab", &tcp(0xab, "127.0.0.1:11"));
        assert_eq!(ids(&mut watch), [0xa1, 0xa8, 0x3e7]);
        let stats = discovery.stats();
        assert_eq!(
            (stats.rejected_records.get(), stats.rejected_instances.get()),
            (1, 1)
        );
        assert_eq!(stats.mismatched_instances.get(), 1);
        assert_eq!(ids(&mut watch).len(), 3);
        assert_eq!(stats.rejected_instances.get(), 1, "said once");
        // The id of a mismatched pair goes with its key, which is Dynamo's zombie.
        store.delete(&format!("{PREFIX}a4"));
        assert_eq!(ids(&mut watch), [0xa1, 0xa8]);
        // Changed in place: the new address. Broken in place: the last good one.
        put("a1", &tcp(0xa1, "127.0.0.1:77"));
        put("a1", "{");
        assert_eq!(watch.instances()[0].address.port(), 77);
    }

    #[test]
    fn what_cannot_be_dialled_is_left_out() {
        let (store, discovery, mut watch) = setup();
        for (id, transport) in [
            (1, r#"{"tcp":"worker-0:80/x"}"#),
            (2, r#"{"tcp":"127.0.0.1/x"}"#),
            (3, r#"{"tcp":"127.0.0.1:0/x"}"#),
            (4, r#"{"tcp":"127.0.0.1:80"}"#),
            (5, r#"{"tcp":"::1:80/x"}"#),
            (6, r#"{"tcp":"127.0.0.1:80/"}"#),
        ] {
            store.put(&format!("{PREFIX}{id:x}"), value(id, transport).as_bytes());
        }
        assert!(watch.instances().is_empty());
        assert_eq!(discovery.stats().rejected_instances.get(), 6);
    }

    #[test]
    fn one_id_under_two_keys_is_one_instance() {
        let (store, _discovery, mut watch) = setup();
        store.put(&format!("{PREFIX}1"), tcp(9, "127.0.0.1:1").as_bytes());
        store.put(&format!("{PREFIX}9"), tcp(9, "127.0.0.1:9").as_bytes());
        let instances = watch.instances();
        assert_eq!((instances.len(), instances[0].address.port()), (1, 9));
    }

    #[test]
    fn a_suspect_yields_to_its_successor_at_the_same_address() {
        let candidate = |id, port, suspect| {
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            let instance = Instance {
                id,
                address,
                path: vec![],
                codec: PayloadCodec::Json,
                device: None,
            };
            (
                id,
                Candidate {
                    instance,
                    suspect,
                    own_key: true,
                },
            )
        };
        let found = [
            candidate(1, 10, true),
            candidate(2, 10, false),
            candidate(3, 11, true),
        ];
        let left = without_superseded(found.into_iter().collect(), None);
        assert_eq!(
            left.iter().map(|instance| instance.id).collect::<Vec<_>>(),
            [2, 3]
        );
    }
}
