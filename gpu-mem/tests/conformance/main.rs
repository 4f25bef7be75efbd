//! The conformance list of the specification (`spec/gpu-memory.md`, appendix B), line by line,
//! against a real service on real sockets. Each test is named for its line. Line 10 is in `kill`,
//! 29 in the library's own tests and in `kill`, 30 in `processes`.

#[path = "../common/mod.rs"]
mod common;

mod admission;
mod layouts;
mod requests;
mod second;
mod service;

use common::Service;
use corelane_gpu_mem::client::event_history;
use corelane_gpu_mem::lock::LockType;
use corelane_gpu_mem::protocol::v1::{
    Bytes, CommitRequest, ErrorResponse, MetadataPutRequest, Reply,
};

const EMPTY_HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn is_error(reply: &Reply, word: &str) -> bool {
    matches!(reply, Reply::Error(ErrorResponse { error, .. }) if error.contains(word))
}

fn kinds(service: &Service) -> Vec<String> {
    let events = event_history(&service.dial("weights.sock")).expect("the service answers");
    events.into_iter().map(|event| event.kind).collect()
}

/// Publishes one allocation; answers its id.
fn publish(service: &Service) -> String {
    let (mut writer, _) = service.holder(LockType::Rw);
    let made = writer.allocate(10);
    assert!(matches!(writer.ask(CommitRequest {}), Reply::Commit(_)));
    made.allocation_id
}

fn put(id: &str, offset_bytes: i128) -> MetadataPutRequest {
    let value = Bytes(vec![1]);
    MetadataPutRequest {
        key: "k".into(),
        allocation_id: id.into(),
        offset_bytes,
        value,
    }
}
