//! What the driver may do to a service: run out of memory for a while or for good, and refuse.

use corelane_gpu_mem::client::{ClientError, Session};
use corelane_gpu_mem::lock::{LockType, State};
use corelane_gpu_mem::protocol::v1::AllocateRequest;

use crate::common::{PATIENCE, Raw};
use crate::roles::Stage;

fn writer(stage: &Stage) -> Session {
    Session::open(&stage.dial(), LockType::Rw, Some(PATIENCE)).expect("granted")
}

fn refusal(refused: Result<impl Sized, ClientError>) -> String {
    match refused {
        Err(ClientError::Refused(text)) => text,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was not refused"),
    }
}

#[test]
fn memory_that_is_short_for_a_while_is_waited_for_and_recorded_once() {
    let stage = Stage::stand_in(&[("STAND_IN_CREATE_OOM", "3")]);
    let service = stage.serve();
    let mut session = writer(&stage);
    session.allocate(1, "t").expect("the fourth try finds some");
    assert_eq!(stage.events("allocation_oom"), 1);
    session.allocate(1, "t").expect("and so does the next");
    assert_eq!(stage.events("allocation_oom"), 1);
    drop(session);
    service.finish();
}

#[test]
fn memory_that_stays_short_is_an_error_and_comes_back_by_a_free() {
    let stage = Stage::stand_in(&[("STAND_IN_CAPACITY", "4194304")]);
    let service = stage.serve_with(&[("RETRY_TIMEOUT_MS", "100")]);
    let mut session = writer(&stage);
    let first = session.allocate(1, "t").expect("memory").allocation_id;
    session.allocate(1, "t").expect("memory");
    let text = refusal(session.allocate(1, "t"));
    assert!(text.contains("Timed out"), "{text}");
    assert_eq!(stage.state().allocation_count, 2, "the session goes on");
    assert!(session.free(&first).expect("allowed"));
    session.allocate(1, "t").expect("there is room again");
    session.commit().expect("published");
    service.finish();
}

#[test]
fn a_client_that_dies_while_it_waits_for_memory_ends_the_wait() {
    let stage = Stage::stand_in(&[("STAND_IN_CREATE_OOM", "1000000")]);
    let service = stage.serve();
    let mut raw = Raw::connect(&stage.dial().path);
    raw.handshake(LockType::Rw, None);
    let (size, tag) = (1, "t".into());
    raw.say(AllocateRequest { size, tag });
    crate::common::until(
        || stage.events("allocation_oom") == 1,
        || "no shortage".into(),
    );
    drop(raw);
    stage.until(|state| state.state == State::Empty);
    assert_eq!(stage.events("rw_aborted"), 1);
    service.finish();
}

/// Hazard H7: one bad call costs a request, and not the weights of all engines.
#[test]
fn a_driver_that_refuses_costs_a_request_and_not_the_service() {
    let faults = [
        ("STAND_IN_CREATE_FAILS", "2"),
        ("STAND_IN_EXPORT_FAILS", "1"),
    ];
    let stage = Stage::stand_in(&faults);
    let service = stage.serve();
    let mut session = writer(&stage);
    let id = session.allocate(1, "t").expect("memory").allocation_id;
    let text = refusal(session.allocate(1, "t"));
    assert!(text.contains("NOT_PERMITTED"), "{text}");
    assert_eq!(stage.events("allocation_oom"), 0, "that is no shortage");
    let text = refusal(session.export(&id));
    assert!(text.contains("NOT_SUPPORTED"), "{text}");
    session.allocate(1, "t").expect("it goes on");
    assert_eq!(session.allocations(None).expect("it goes on").len(), 2);
    drop(session);
    service.finish();
}

/// A driver that takes its time holds up its own service only, and nothing is lost.
#[test]
fn a_slow_driver_is_waited_for() {
    let stage = Stage::stand_in(&[("STAND_IN_CREATE_SLEEPS_MS", "50")]);
    let service = stage.serve();
    let mut session = writer(&stage);
    for _ in 0..3 {
        session.allocate(1, "t").expect("memory");
    }
    session.commit().expect("published");
    assert_eq!(stage.state().allocation_count, 3);
    service.finish();
}
