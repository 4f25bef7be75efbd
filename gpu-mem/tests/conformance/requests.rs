//! What a session may ask and what it is answered (lines 4, 5, 12 to 19, 27, 28).

use std::os::fd::AsFd;

use crate::common::Service;
use crate::{EMPTY_HASH, is_error, publish, put};
use corelane_gpu_mem::backend::host::GRANULARITY_BYTES;
use corelane_gpu_mem::lock::{LockType, State};
use corelane_gpu_mem::protocol::fd_pass;
use corelane_gpu_mem::protocol::v1::{
    AllocateRequest, ClearAllRequest, CommitLayoutRequest, CommitRequest, ExportAllocationRequest,
    ExportRequest, FreeAllocationRequest, FreeRequest, GetLockStateRequest, GetRuntimeStateRequest,
    HandshakeRequest, MetadataGetRequest, Reply, Request,
};
use corelane_gpu_mem::stats::Counter;

#[test]
fn b04_a_commit_answers_closes_and_publishes() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    let made = writer.allocate(10);
    assert_eq!(
        (made.aligned_size, made.layout_slot.0),
        (GRANULARITY_BYTES, Some(0))
    );
    assert!(matches!(
        writer.ask(put(&made.allocation_id, 0)),
        Reply::MetadataPut(_)
    ));
    assert!(matches!(writer.ask(CommitRequest {}), Reply::Commit(_)));
    assert!(writer.is_dropped());
    let state = service.state();
    assert_eq!((state.state, state.is_ready), (State::Committed, true));
    use sha2::Digest;
    let text = [&b"0:10:2097152:tk:0:0:"[..], &[1]].concat();
    let own: String = sha2::Sha256::digest(text)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert_eq!(state.memory_layout_hash, own);
}

#[test]
fn b05_nothing_can_be_published_too() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    writer.ask(CommitRequest {});
    let state = service.state();
    assert_eq!(
        (state.state, state.memory_layout_hash.as_str()),
        (State::Committed, EMPTY_HASH)
    );
}

#[test]
fn b12_a_reader_may_not_write_and_goes_on() {
    let service = Service::start();
    publish(&service);
    let (mut reader, _) = service.holder(LockType::Ro);
    let requests: [Request; 3] = [
        AllocateRequest {
            size: 1,
            tag: "t".into(),
        }
        .into(),
        CommitRequest {}.into(),
        CommitLayoutRequest {}.into(),
    ];
    for request in requests {
        assert!(is_error(&reader.ask(request), "not allowed"));
    }
    assert!(matches!(reader.ask(GetLockStateRequest {}), Reply::LockState(s) if s.is_ready));
}

#[test]
fn b13_probes_and_handshakes_do_not_belong_into_a_session() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    assert!(is_error(
        &writer.ask(GetRuntimeStateRequest {}),
        "not allowed"
    ));
    let again = HandshakeRequest {
        lock_type: LockType::Rw,
        timeout_ms: None,
    };
    assert!(is_error(&writer.ask(again), "not allowed"));
    assert_eq!(service.state().state, State::Rw);
}

#[test]
fn b14_an_export_carries_exactly_one_descriptor() {
    let service = Service::start();
    let id = publish(&service);
    let (mut reader, _) = service.holder(LockType::Ro);
    for count in 1..=3 {
        let request = ExportAllocationRequest {
            allocation_id: id.clone(),
        };
        assert!(matches!(reader.ask(request), Reply::ExportAllocation(_)));
        assert_eq!(reader.descriptors.len(), count);
    }
    let unknown = ExportAllocationRequest {
        allocation_id: "nope".into(),
    };
    assert!(is_error(&reader.ask(unknown), "Unknown allocation"));
    assert_eq!(reader.descriptors.len(), 3);
}

#[test]
fn b15_a_free_takes_metadata_along_and_the_slot_is_not_used_again() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    let id = writer.allocate(10).allocation_id;
    writer.ask(put(&id, 0));
    let free = || FreeAllocationRequest {
        allocation_id: id.clone(),
    };
    assert!(matches!(writer.ask(free()), Reply::FreeAllocation(f) if f.success));
    assert!(matches!(writer.ask(free()), Reply::FreeAllocation(f) if !f.success));
    let got = writer.ask(MetadataGetRequest { key: "k".into() });
    assert!(matches!(got, Reply::MetadataGet(got) if !got.found && got.value.is_none()));
    assert_eq!(writer.allocate(10).layout_slot.0, Some(1));
}

#[test]
fn b16_offsets_outside_the_allocation_are_refused() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    let id = writer.allocate(10).allocation_id;
    assert!(is_error(
        &writer.ask(put(&id, GRANULARITY_BYTES.into())),
        "out of range"
    ));
    assert!(is_error(&writer.ask(put(&id, -1)), "out of range"));
    assert!(is_error(&writer.ask(put("nope", 0)), "Unknown allocation"));
    let got = writer.ask(MetadataGetRequest { key: "k".into() });
    assert!(matches!(got, Reply::MetadataGet(got) if !got.found));
    assert!(matches!(
        writer.ask(put(&id, GRANULARITY_BYTES as i128 - 1)),
        Reply::MetadataPut(_)
    ));
}

#[test]
fn b17_b19_a_frame_that_is_no_message_costs_the_session_and_nothing_else() {
    let service = Service::start();
    let mut put =
        b"\x85\xa4type\xb4metadata_put_request\xa3key\xa1k\xadallocation_id\xa1a".to_vec();
    put.extend_from_slice(b"\xacoffset_bytes\x00\xa5value\xa1x");
    let payloads: [&[u8]; 8] = [
        b"\xc1",
        b"",
        b"\x90",
        b"\x81\xa4type\xa4nope",
        b"\x81\xa4type\xb0allocate_request",
        b"\x82\xa4type\xb0allocate_request\xa4size\xa1x",
        b"\x82\xa4type\xb0allocate_request\xa4size\xcb\x40\x00\x00\x00\x00\x00\x00\x00",
        &put,
    ];
    for payload in payloads {
        let (mut writer, _) = service.holder(LockType::Rw);
        writer.say_payload(payload);
        assert!(writer.is_dropped(), "{payload:02x?}");
        service.until(|state| state.state == State::Empty);
    }
    let (mut writer, _) = service.holder(LockType::Rw);
    writer.say_bytes(&[0xff; 4]);
    assert!(
        writer.is_dropped(),
        "a frame of 4 GiB is refused from its length alone"
    );
    service.until(|state| state.state == State::Empty);
    assert_eq!(service.handle.count(Counter::FramesBad), 9);
}

#[test]
fn b18_shuffled_keys_strangers_and_wide_numbers_are_welcome() {
    let service = Service::start();
    let mut raw = service.raw();
    let mut payload = vec![0xde, 0, 4];
    payload.extend_from_slice(b"\xaatimeout_ms\xcf\x00\x00\x00\x00\x00\x00\x03\xe8");
    payload.extend_from_slice(b"\xa8stranger\x91\xc0\xa9lock_type\xa2rw\xa4type");
    payload.extend_from_slice(b"\xb1handshake_request");
    raw.say_payload(&payload);
    assert!(matches!(raw.hear(), Some(Reply::Handshake(answer)) if answer.success));
}

#[test]
fn b27_a_first_frame_that_is_no_message_is_answered_by_a_close() {
    let service = Service::start();
    let mut raw = service.raw();
    raw.say_payload(b"\xc1");
    assert!(raw.is_dropped());
    let mut raw = service.raw();
    assert!(is_error(
        &raw.ask(CommitRequest {}),
        "Expected HandshakeRequest"
    ));
    assert!(raw.is_dropped());
}

#[test]
fn b28_the_seed_dialect_is_answered_on_the_same_socket() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    let id = writer.allocate(10).allocation_id;
    let cleared = writer.ask(ClearAllRequest {});
    assert!(matches!(cleared, Reply::ClearAll(cleared) if cleared.cleared_count == 1));
    let unknown = writer.ask(ExportRequest {
        allocation_id: id.clone(),
    });
    assert!(is_error(&unknown, "Unknown allocation"));
    let id = writer.allocate(10).allocation_id;
    let Reply::GetAllocation(exported) = writer.ask(ExportRequest {
        allocation_id: id.clone(),
    }) else {
        panic!()
    };
    assert_eq!(
        (exported.aligned_size, writer.descriptors.len()),
        (GRANULARITY_BYTES, 1)
    );
    let freed = writer.ask(FreeRequest { allocation_id: id });
    assert!(matches!(freed, Reply::Free(freed) if freed.success));
}

#[test]
fn frames_in_one_write_are_answered_in_order() {
    let service = Service::start();
    let mut raw = service.raw();
    let allocate = || {
        Request::from(AllocateRequest {
            size: 1,
            tag: "t".into(),
        })
        .encode()
    };
    let handshake = HandshakeRequest {
        lock_type: LockType::Rw,
        timeout_ms: None,
    };
    let frames = [
        Request::from(handshake).encode(),
        allocate(),
        allocate(),
        Request::from(CommitRequest {}).encode(),
        allocate(),
    ];
    raw.say_bytes(&frames.concat());
    assert!(matches!(raw.hear(), Some(Reply::Handshake(_))));
    for slot in 0..2 {
        let Some(Reply::Allocate(made)) = raw.hear() else {
            panic!()
        };
        assert_eq!(made.layout_slot.0, Some(slot));
    }
    assert!(matches!(raw.hear(), Some(Reply::Commit(_))));
    assert!(
        raw.hear().is_none(),
        "what follows a commit is not answered"
    );
    assert_eq!(service.state().allocation_count, 2);
}

#[test]
fn what_a_waiter_asks_too_early_is_answered_when_it_holds_the_lock() {
    let service = Service::start();
    let (holder, _) = service.holder(LockType::Rw);
    let mut eager = service.raw();
    eager.say(HandshakeRequest {
        lock_type: LockType::Rw,
        timeout_ms: None,
    });
    service.until(|state| state.waiting_writers == 1);
    let size = AllocateRequest {
        size: 1,
        tag: "t".into(),
    };
    eager.say(size.clone());
    // It goes on serving others meanwhile, and the waiter has not lost its place.
    service.until(|state| state.waiting_writers == 1 && state.has_rw_session);
    eager.say(size);
    drop(holder);
    assert!(matches!(eager.hear(), Some(Reply::Handshake(answer)) if answer.success));
    for slot in 0..2 {
        let Some(Reply::Allocate(made)) = eager.hear() else {
            panic!("no memory");
        };
        assert_eq!(made.layout_slot.0, Some(slot));
    }
}

#[test]
fn a_client_may_not_send_descriptors() {
    let service = Service::start();
    let (writer, _) = service.holder(LockType::Rw);
    let frame = Request::from(GetLockStateRequest {}).encode();
    let (gift, _keep) = std::os::unix::net::UnixStream::pair().expect("a pair");
    fd_pass::send(&writer.stream, &frame, Some(gift.as_fd())).expect("it is sent");
    service.until(|state| state.state == State::Empty);
}
