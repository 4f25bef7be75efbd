//! Payloads by themselves: items, prologues, connection infos, the catalogue of errors.

use corelane_codec::call_home::Prologue;
use corelane_codec::control_message::{
    ConnectionInfo, PayloadCodec, StreamType, TcpConnection, TcpConnectionInfo,
};
use corelane_codec::error::DynamoError;
use corelane_codec::item::{self, Annotated, StreamItem};
use serde_json::Value;

use crate::common::Vector;

pub(crate) fn check(vector: &Vector) {
    let name = vector.name.as_str();
    match name {
        "json_prologue_ok" | "json_prologue_err" => prologue(vector),
        _ if name.starts_with("json_connection_info") => connection_info(vector),
        "payload_errors_all_classes_json" => errors(vector),
        _ => wrapped(vector),
    }
}

fn prologue(vector: &Vector) {
    let prologue = Prologue::decode(&vector.bytes).unwrap();
    let whole: Value = serde_json::from_slice(&vector.bytes).unwrap();
    assert_eq!(
        whole["error"].as_str(),
        prologue.error.and_then(|text| text.as_str())
    );
    assert_eq!(prologue.typed_error, None);
    if let Some(error) = prologue.error {
        let mut again = vec![];
        corelane_codec::call_home::write_prologue_error(&error.to_cow(), None, &mut again);
        assert_eq!(&again[24..], vector.bytes);
    }
}

fn connection_info(vector: &Vector) {
    let view = ConnectionInfo::decode(&vector.bytes).unwrap();
    let mut scratch = [0; 512];
    let info = TcpConnectionInfo::parse(&view, &mut scratch).unwrap();
    let request = vector.name.ends_with("request");
    assert_eq!(info.stream_type == StreamType::Request, request);
    assert_eq!(info.socket_addr().unwrap().port(), 40111);
    let connection = TcpConnection {
        address: info.address.as_str().unwrap(),
        subject: info.subject.as_str().unwrap(),
        context: info.context.as_str().unwrap(),
        stream_type: info.stream_type,
    };
    let mut again = vec![];
    connection.write(&mut again);
    assert_eq!(again, vector.bytes, "{}", vector.name);
}

fn errors(vector: &Vector) {
    let rows: Vec<Value> = serde_json::from_slice(&vector.bytes).unwrap();
    assert_eq!(Some(rows.len() as u64), vector.fields()["count"].as_u64());
    for row in rows {
        let json = row["json"].as_str().unwrap();
        let error: DynamoError = serde_json::from_str(json).unwrap();
        assert_eq!(row["decoded_class"], error.class().name(), "{row}");
        assert_eq!(row["decoded_reason"], error.reason().name(), "{row}");
        assert_eq!(row["display"], error.to_string(), "{row}");
        assert_eq!(serde_json::to_string(&error).unwrap(), json);
        let packed = rmp_serde::to_vec_named(&error).unwrap();
        assert_eq!(
            rmp_serde::from_slice::<DynamoError>(&packed).unwrap(),
            error
        );
    }
}

fn wrapped(vector: &Vector) {
    let (name, bytes) = (vector.name.as_str(), &vector.bytes[..]);
    let codec = PayloadCodec::from_name(vector.row["codec"].as_str().expect(name)).expect(name);
    let want: Value = match &vector.expect()["decode"]["ok"] {
        Value::Null => {
            serde_json::from_str(vector.fields()["json"].as_str().expect(name)).expect(name)
        }
        ok => ok.clone(),
    };

    let item = item::decode(bytes, codec).expect(name);
    assert_eq!(want["complete_final"], item.complete_final, "{name}");
    let data = want.get("data").filter(|data| !data.is_null());
    assert_eq!(data.is_some(), item.data.is_some(), "{name}");

    // An array or explicit nulls are read, never written.
    let reproducible = !name.contains("array") && !name.contains("nulls");
    if let Some(range) = item.data.clone() {
        let data: Value = item::from_bytes(&bytes[range.clone()], codec).expect(name);
        if reproducible {
            assert_eq!(want["data"], data, "{name}");
            let mut again = vec![];
            item::write_body(&bytes[range], codec, &mut again);
            assert_eq!(again, bytes, "{name}");
        }
    }
    let again = if name.contains("plain_value") {
        typed::<Value>(name, bytes, codec, &want)
    } else {
        typed::<Annotated<Value>>(name, bytes, codec, &want)
    };
    if reproducible {
        assert_eq!(again, bytes, "{name}");
    }
}

fn typed<T>(name: &str, bytes: &[u8], codec: PayloadCodec, want: &Value) -> Vec<u8>
where
    T: serde::Serialize + serde::de::DeserializeOwned,
{
    let item: StreamItem<T> = item::from_bytes(bytes, codec).expect(name);
    let mut without_nulls = want.clone();
    if let Some(data) = without_nulls["data"].as_object_mut() {
        data.retain(|_, value| !value.is_null());
    } else if without_nulls["data"].is_null() {
        without_nulls.as_object_mut().unwrap().remove("data");
    }
    assert_eq!(
        serde_json::to_value(&item).unwrap(),
        without_nulls,
        "{name}"
    );
    let mut again = vec![];
    item::write_value(&item, codec, &mut again).expect(name);
    again
}
