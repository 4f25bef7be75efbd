//! Records that real workers put into etcd.

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::discovery::{DeviceType, EndpointRecord, ModelRecord, Transport};
use corelane_codec::path::{self, InstanceKey, ModelKey, TcpTransport};
use serde_json::Value;

use crate::common::golden;

fn records(file: &str) -> Vec<(String, String)> {
    let text = std::fs::read(golden().join("discovery").join(file)).unwrap();
    let dump: Value = serde_json::from_slice(&text).unwrap();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    let rows = dump["kvs"].as_array().unwrap();
    rows.iter()
        .map(|row| (text(row, "key"), text(row, "raw_value")))
        .collect()
}

fn endpoint(key: &str, value: &str) -> EndpointRecord {
    let record: EndpointRecord = serde_json::from_str(value).unwrap();
    assert_eq!(serde_json::to_string(&record).unwrap(), value);
    assert_eq!(record.key().to_string(), key);
    assert_eq!(InstanceKey::parse(key), Some(record.key()));
    assert_eq!(record.device_type, Some(DeviceType::Cuda));
    assert_eq!(record.payload_codec(), PayloadCodec::MessagePack);

    let mut built = EndpointRecord::new(
        &record.endpoint_id(),
        record.instance_id,
        record.transport.clone(),
    );
    built.device_type = Some(DeviceType::Cuda);
    built.request_plane_codec = Some(PayloadCodec::MessagePack);
    assert_eq!(built, record);
    record
}

#[test]
fn tcp_endpoint() {
    let records = records("etcd-worker-tcp.json");
    let (key, value) = &records[0];
    let record = endpoint(key, value);
    let Transport::Tcp(address) = &record.transport else {
        panic!("not TCP");
    };
    let transport = TcpTransport::parse(address).unwrap();
    let path = path::instance_path(record.instance_id, &record.endpoint_id());
    assert_eq!(transport.path, path);
    assert_eq!(transport.value(), *address);
}

#[test]
fn nats_endpoint() {
    let records = records("etcd-worker-nats-request-plane.json");
    let (key, value) = &records[0];
    let record = endpoint(key, value);
    let subject = path::instance_subject(record.instance_id, &record.endpoint_id());
    assert_eq!(record.transport, Transport::NatsTcp(subject));
}

#[test]
fn endpoint_and_model() {
    let records = records("etcd-worker-model.json");
    assert_eq!(records.len(), 2);
    let instance = endpoint(&records[0].0, &records[0].1);
    let (key, value) = &records[1];
    let model: ModelRecord = serde_json::from_str(value).unwrap();
    assert_eq!(serde_json::to_string(&model).unwrap(), *value);
    assert_eq!(model.key().to_string(), *key);
    assert_eq!(ModelKey::parse(key), Some(model.key()));
    assert_eq!(model.instance_id, instance.instance_id);
    let card = model.card().unwrap();
    assert_eq!(card.display_name, "demo-model");
    assert_eq!(card.source_path.as_deref(), Some("/models/tiny"));
    let built = ModelRecord::new(&instance.endpoint_id(), model.instance_id, model.card_json);
    assert_eq!(serde_json::to_string(&built).unwrap(), *value);
}
