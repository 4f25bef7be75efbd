//! The second generation: a commit into reading, identities, checkpoints.

use crate::common;
use crate::common::{PATIENCE, Raw, Service, until};
use corelane_gpu_mem::backend::host::GRANULARITY_BYTES;
use corelane_gpu_mem::client::{CheckpointControl, ClientError, SessionV2, checkpoint_control};
use corelane_gpu_mem::lock::{Grant, LockType};
use std::time::Duration;

#[test]
fn the_second_generation_commits_into_reading_and_checks_identities() {
    let service = Service::start();
    let dial = service.dial("weights-v2.sock");
    let open = |lock_type| SessionV2::open(&dial, lock_type, None, Some(PATIENCE));
    let mut writer = open(LockType::RwOrRo).expect("granted");
    assert_eq!(writer.grant(), Grant::Rw);
    assert_eq!(
        writer.identity(),
        &("nonce".to_owned(), common::GPU.to_owned())
    );
    assert!(
        matches!(writer.allocate("a", 100), Err(ClientError::Refused(_))),
        "misaligned"
    );
    writer.allocate("a", GRANULARITY_BYTES).expect("memory");
    assert!(matches!(
        writer.allocate("a", GRANULARITY_BYTES),
        Err(ClientError::Refused(_))
    ));
    writer.export("a").expect("a descriptor");
    writer.commit().expect("published");
    assert!(matches!(
        writer.allocate("b", GRANULARITY_BYTES),
        Err(ClientError::Refused(_))
    ));
    let mut reader = open(LockType::RwOrRo).expect("granted beside it");
    assert_eq!(reader.grant(), Grant::Ro);
    assert_eq!(reader.allocations().expect("a list").len(), 1);
    let other = Some(("other".to_owned(), common::GPU.to_owned()));
    let refused = SessionV2::open(&dial, LockType::Ro, other, Some(PATIENCE));
    assert!(matches!(refused, Err(ClientError::Refused(_))));
    let impatient = SessionV2::open(&dial, LockType::Rw, None, Some(Duration::from_millis(30)));
    assert!(matches!(impatient, Err(ClientError::NotGranted { .. })));
    drop((writer, reader));
    let writer = open(LockType::Rw).expect("granted");
    writer.abort().expect("given up");
    let mut raw = Raw::connect(&service.path("weights-v2.sock"));
    raw.say_payload(b"\x83\xa4type\xb1handshake_request\xa9lock_type\xa2rw\xaatimeout_ms\xc0");
    assert!(
        raw.is_dropped(),
        "the first generation's field is a stranger here"
    );
}

#[test]
fn a_checkpoint_keeps_both_pools_closed_until_it_is_resolved() {
    let service = Service::start();
    let (weights, cache) = (
        service.dial("weights-v2.sock"),
        service.dial("kv_cache-v2.sock"),
    );
    let refused = checkpoint_control(&weights, CheckpointControl::Prepare);
    assert!(
        matches!(refused, Err(ClientError::Refused(_))),
        "nothing is committed"
    );
    let mut writer =
        SessionV2::open(&weights, LockType::Rw, None, Some(PATIENCE)).expect("granted");
    writer.allocate("a", GRANULARITY_BYTES).expect("memory");
    writer.commit().expect("published");
    let refused = checkpoint_control(&cache, CheckpointControl::Prepare);
    assert!(
        matches!(refused, Err(ClientError::Refused(_))),
        "a session is open"
    );
    drop(writer);
    let ready = || checkpoint_control(&cache, CheckpointControl::Prepare).ok();
    until(|| ready().is_some(), || "the session never ended".into());
    let state = ready().expect("asking again is no error");
    let token = state.token.expect("a token");
    assert_eq!(state.state, "checkpoint_ready");
    for dial in [&weights, &cache] {
        let shut = SessionV2::open(dial, LockType::RwOrRo, None, Some(PATIENCE));
        assert!(matches!(shut, Err(ClientError::Refused(_))));
    }
    let resolve = |control| checkpoint_control(&weights, control).map(|state| state.state);
    assert!(resolve(CheckpointControl::Abort("wrong".into())).is_err());
    for _ in 0..2 {
        let done = resolve(CheckpointControl::Complete(token.clone())).expect("resolved");
        assert_eq!(done, "serving");
    }
    assert!(
        resolve(CheckpointControl::Abort(token)).is_err(),
        "it was completed"
    );
    assert_eq!(
        resolve(CheckpointControl::Query).expect("an answer"),
        "serving"
    );
    SessionV2::open(&weights, LockType::Ro, None, Some(PATIENCE)).expect("open again");
}
