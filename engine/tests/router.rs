//! A shard that routes, on real sockets, on every ring that the host allows.

mod common;

use std::time::Duration;

use common::*;
use corelane_engine::config::RingKind;
use corelane_engine::directory::{Ack, Policy};

#[test]
fn requests_reach_the_instance_under_its_own_path_and_nothing_else_changes() {
    for ring in rings() {
        for ack in [Ack::OnForward, Ack::OnAccept] {
            let (router, worker) = (Router::start(ring), Worker::start(0xab, Manner::Accept));
            router.route_to(Policy::RoundRobin, ack, &[&worker]);
            let mut caller = Caller::dial(router.address);
            caller.send(&frame(LISTEN_PATH, b"payload"));
            assert_eq!(caller.reply(), "");
            wait_until("the worker has it", || worker.taken() == 1);
            let frames = worker.frames.lock().unwrap();
            assert_eq!(frames[0], frame("ab/test/worker/generate", b"payload"));
        }
    }
}

#[test]
fn frames_cut_at_every_byte_arrive_whole() {
    for ring in rings() {
        let (router, worker) = (Router::start(ring), Worker::start(1, Manner::Accept));
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
        let whole = frame(LISTEN_PATH, b"0123456789");
        let mut caller = Caller::dial(router.address);
        for cut in 1..whole.len() {
            caller.send(&whole[..cut]);
            std::thread::sleep(Duration::from_micros(200));
            caller.send(&whole[cut..]);
            assert_eq!(caller.reply(), "");
        }
        assert_eq!(worker.taken(), whole.len() - 1);
        let frames = worker.frames.lock().unwrap();
        assert!(
            frames
                .iter()
                .all(|got| *got == frame("1/test/worker/generate", b"0123456789"))
        );
    }
}

#[test]
fn large_frames_are_cut_through_intact() {
    for ring in rings() {
        let (router, worker) = (Router::start(ring), Worker::start(1, Manner::Accept));
        router.route_to(Policy::RoundRobin, Ack::OnForward, &[&worker]);
        for bytes in [60_000, 65_536, 70_000, 300_000, 1 << 20, 5 << 20, 20 << 20] {
            let payload: Vec<u8> = (0..bytes)
                .map(|at: usize| (at * 7 + at / 251) as u8)
                .collect();
            let mut caller = Caller::dial(router.address);
            caller.send(&frame(LISTEN_PATH, &payload));
            assert_eq!(caller.reply(), "", "{bytes}");
            wait_until("the worker has it", || {
                !worker.frames.lock().unwrap().is_empty()
            });
            let got = worker.frames.lock().unwrap().pop().unwrap();
            assert!(got == frame("1/test/worker/generate", &payload), "{bytes}");
        }
        let stats = &router.handle.stats.shard;
        wait_until("all buffers are free", || stats.buffers_held.get() == 0);
    }
}

#[test]
fn replies_come_in_the_order_of_requests() {
    for ring in rings() {
        let (router, worker) = (Router::start(ring), Worker::start(1, Manner::Accept));
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
        let mut caller = Caller::dial(router.address);
        let mut all = Vec::new();
        for number in 0..2000 {
            match number % 3 {
                0 => all.extend(frame(LISTEN_PATH, b"x")),
                1 => all.extend(frame(&format!("0/no/such/{number}"), b"x")),
                _ => all.extend(frame(LISTEN_PATH, &[7; 3000])),
            }
        }
        let mut writer = caller.stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            std::io::Write::write_all(&mut writer, &all).unwrap();
        });
        for number in 0..2000 {
            let expected = match number % 3 {
                1 => format!("Server unavailable: unknown endpoint 0/no/such/{number}"),
                _ => String::new(),
            };
            assert_eq!(caller.reply(), expected);
        }
        sender.join().unwrap();
    }
}

#[test]
fn refusals_are_told_in_words_that_dynamos_client_understands() {
    for ring in rings() {
        let router = Router::with(ring, |config| config.message_bytes_max = 100_000);
        router.publish(route(Policy::RoundRobin, Ack::OnForward, &[]));
        let mut caller = Caller::dial(router.address);
        caller.send(&frame(LISTEN_PATH, b"x"));
        assert_eq!(
            caller.reply(),
            "Server unavailable: no instance of test/worker/generate"
        );
        caller.send(&frame("", b"x"));
        assert_eq!(caller.reply(), "Server unavailable: unknown endpoint ");
        let mut bad = frame("abcd", b"x");
        bad[3] = 0xff;
        caller.send(&bad);
        assert_eq!(caller.reply(), "Server unavailable: invalid endpoint path");
        let long = "é".repeat(2000);
        caller.send(&frame(&long, b"x"));
        assert!(
            caller
                .reply()
                .starts_with("Server unavailable: unknown endpoint éé")
        );
        let large = frame(LISTEN_PATH, &[1; 100_000]);
        caller.send(&large);
        let text = format!(
            "message too large: {} bytes (max: 100000 bytes)",
            large.len()
        );
        assert_eq!(caller.reply(), format!("Server unavailable: {text}"));
        caller.send(&frame(LISTEN_PATH, b"x"));
        assert_eq!(
            caller.reply(),
            "Server unavailable: no instance of test/worker/generate"
        );
        let stats = &router.handle.stats.shard;
        assert_eq!(stats.refused_no_instance.get(), 2);
        assert_eq!(stats.refused_unknown_endpoint.get(), 2);
        assert_eq!(stats.refused_bad_frame.get(), 1);
        assert_eq!(stats.refused_frame_too_large.get(), 1);
    }
}

#[test]
fn the_caller_of_a_frame_too_large_is_called_home() {
    for ring in rings() {
        let router = Router::with(ring, |config| config.message_bytes_max = 100_000);
        router.publish(route(Policy::RoundRobin, Ack::OnForward, &[]));
        let home = Home::listen();
        let mut caller = Caller::dial(router.address);
        caller.send(&frame(
            LISTEN_PATH,
            &envelope(&home.address, "subject-1", &[0; 200_000]),
        ));
        assert_eq!(caller.reply(), "");
        wait_until("the caller is called home", || home.texts().len() == 1);
        let text = &home.texts()[0];
        assert!(
            text.contains(r#"{"subject":"subject-1","stream_type":"response"}"#),
            "{text}"
        );
        assert!(text.contains("request.invalid_argument") && text.contains("\"sentinel\""));
    }
}

#[test]
fn a_refused_forward_is_tried_on_another_instance() {
    for ring in rings() {
        for manner in [Manner::Overloaded, Manner::Unavailable] {
            let router = Router::start(ring);
            let workers = [Worker::start(1, manner), Worker::start(2, Manner::Accept)];
            router.route_to(
                Policy::RoundRobin,
                Ack::OnAccept,
                &[&workers[0], &workers[1]],
            );
            let mut caller = Caller::dial(router.address);
            for _ in 0..10 {
                caller.send(&frame(LISTEN_PATH, b"x"));
                assert_eq!(caller.reply(), "");
            }
            assert_eq!(workers[1].taken(), 10);
            assert_eq!(
                workers[0].taken() as u64,
                router.handle.stats.shard.retried.get()
            );
            assert!(workers[0].taken() >= 1);
        }
    }
}

#[test]
fn when_all_refuse_the_caller_hears_it_on_accept_and_is_called_home_on_forward() {
    for ring in rings() {
        let router = Router::start(ring);
        let worker = Worker::start(1, Manner::Overloaded);
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
        let mut caller = Caller::dial(router.address);
        caller.send(&frame(LISTEN_PATH, b"x"));
        assert_eq!(caller.reply(), "Server overloaded: worker at capacity");
        // For a second it is known to be overloaded, and not asked.
        caller.send(&frame(LISTEN_PATH, b"x"));
        assert_eq!(caller.reply(), "Server overloaded: worker at capacity");
        assert_eq!(worker.taken(), 1);

        let (router, home) = (Router::start(ring), Home::listen());
        router.route_to(Policy::RoundRobin, Ack::OnForward, &[&worker]);
        let mut caller = Caller::dial(router.address);
        caller.send(&frame(LISTEN_PATH, &envelope(&home.address, "s", b"x")));
        assert_eq!(caller.reply(), "");
        wait_until("the caller is called home", || home.texts().len() == 1);
        assert!(
            home.texts()[0].contains("capacity.worker_overloaded"),
            "{:?}",
            home.texts()
        );
    }
}

#[test]
fn an_instance_that_never_answers_is_left_and_its_requests_go_to_another() {
    for ring in rings() {
        for ack in [Ack::OnForward, Ack::OnAccept] {
            with_growing_times(&TIMES, |time| a_silent_one_is_left(ring, ack, time));
        }
    }
}

fn a_silent_one_is_left(ring: RingKind, ack: Ack, time: Duration) {
    let router = Router::start(ring);
    let workers = [
        Worker::start(1, Manner::Silent),
        Worker::start(2, Manner::Accept),
    ];
    let mut route = route(Policy::RoundRobin, ack, &[&workers[0], &workers[1]]);
    route.ack_timeout_ns = ns(time);
    router.publish(route);
    let stats = &router.handle.stats.shard;
    wait_until("both are connected", || stats.instances_ready.get() == 2);
    let mut caller = Caller::dial(router.address);
    for _ in 0..10 {
        caller.send(&frame(LISTEN_PATH, b"x"));
        assert_eq!(caller.reply(), "");
    }
    // One that was late is asked twice.
    wait_until("the good one has all", || workers[1].taken() >= 10);
    assert_eq!(workers[1].taken(), 10);
    assert!(stats.ack_timeouts.get() >= 1);
}

#[test]
fn a_killed_workers_callers_are_told_and_unanswered_requests_move() {
    for ring in rings() {
        let (router, home) = (Router::start(ring), Home::listen());
        let workers = [
            Worker::start(1, Manner::Accept),
            Worker::start(2, Manner::Accept),
        ];
        router.route_to(
            Policy::RoundRobin,
            Ack::OnForward,
            &[&workers[0], &workers[1]],
        );
        let mut caller = Caller::dial(router.address);
        for number in 0..10 {
            let payload = envelope(&home.address, &format!("subject-{number}"), b"x");
            caller.send(&frame(LISTEN_PATH, &payload));
            assert_eq!(caller.reply(), "");
        }
        let accepted = &router.handle.stats.shard.accepted_upstream;
        wait_until("all are accepted", || accepted.get() == 10);
        workers[0].kill();
        // Five were accepted by the dead one, and nobody will call their callers.
        wait_until("its callers are told", || home.texts().len() == 5);
        assert!(
            home.texts()
                .iter()
                .all(|text| text.contains("transport.disconnected"))
        );
        for _ in 0..10 {
            caller.send(&frame(LISTEN_PATH, b"x"));
            assert_eq!(caller.reply(), "");
        }
        wait_until("the survivor has the rest", || workers[1].taken() == 15);
    }
}

#[test]
fn a_caller_who_never_reads_is_held_back_and_others_are_not() {
    for ring in rings() {
        let (router, worker) = (Router::start(ring), Worker::start(1, Manner::Accept));
        router.route_to(Policy::RoundRobin, Ack::OnForward, &[&worker]);
        let mut rude = Caller::dial(router.address);
        rude.stream
            .set_write_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let refused = frame(&"x".repeat(400), b"").repeat(1000);
        let stats = &router.handle.stats.shard;
        let mut written = 0usize;
        // A router that is kept from its CPU reads nothing for a while either.
        wait_until("he is held back", || {
            let rest = &refused[written % refused.len()..];
            match std::io::Write::write(&mut rude.stream, rest) {
                Ok(bytes) => written += bytes,
                Err(_) => return stats.receives_paused.get() >= 1,
            }
            assert!(written < 256 << 20, "never held back");
            false
        });
        assert!(
            stats.buffers_held.get() < 64,
            "{}",
            stats.buffers_held.get()
        );
        let mut polite = Caller::dial(router.address);
        for _ in 0..100 {
            polite.send(&frame(LISTEN_PATH, b"x"));
            assert_eq!(polite.reply(), "");
        }
    }
}

#[test]
fn a_deaf_instance_holds_back_its_own_callers_only() {
    for ring in rings() {
        let router = Router::with(ring, |config| config.upstream_queue_bytes = 1 << 20);
        let worker = Worker::start(1, Manner::Deaf);
        let mut route = route(Policy::RoundRobin, Ack::OnForward, &[&worker]);
        route.ack_timeout_ns = 60_000_000_000;
        router.publish(route);
        let ready = &router.handle.stats.shard.instances_ready;
        wait_until("it is connected", || ready.get() == 1);
        // More than sockets and queue can take: refused with a reason, not swallowed.
        let mut caller = Caller::dial(router.address);
        let mut writer = caller.stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            let frames = frame(LISTEN_PATH, &[0; 30_000]).repeat(100);
            (0..20).all(|_| std::io::Write::write_all(&mut writer, &frames).is_ok())
        });
        let stats = &router.handle.stats.shard;
        wait_until("a request is refused", || {
            stats.refused_overloaded.get() > 0
        });
        assert_eq!(caller.reply(), "");
        // Others are served, by an instance that listens, as soon as the flood is over.
        drop(caller.stream.shutdown(std::net::Shutdown::Both));
        sender.join().unwrap();
        let second = Worker::start(2, Manner::Accept);
        let workers = [&worker, &second];
        router.publish(common::route(Policy::RoundRobin, Ack::OnForward, &workers));
        wait_until("both are connected", || stats.instances_ready.get() == 2);
        let mut other = Caller::dial(router.address);
        wait_until("a request is served", || {
            other.send(&frame(LISTEN_PATH, b"x"));
            other.reply().is_empty()
        });
    }
}

#[test]
fn a_new_instance_is_used_and_a_removed_one_is_not() {
    for ring in rings() {
        let router = Router::start(ring);
        let workers = [
            Worker::start(1, Manner::Accept),
            Worker::start(2, Manner::Accept),
        ];
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&workers[0]]);
        let mut caller = Caller::dial(router.address);
        let mut ten = || {
            for _ in 0..10 {
                caller.send(&frame(LISTEN_PATH, b"x"));
                assert_eq!(caller.reply(), "");
            }
        };
        ten();
        router.route_to(
            Policy::RoundRobin,
            Ack::OnAccept,
            &[&workers[0], &workers[1]],
        );
        ten();
        assert_eq!((workers[0].taken(), workers[1].taken()), (15, 5));
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&workers[1]]);
        ten();
        assert_eq!((workers[0].taken(), workers[1].taken()), (15, 15));
    }
}

#[test]
fn an_answer_that_was_waited_for_when_the_route_changed_is_not_left_unread() {
    for ring in rings() {
        let (router, worker) = (Router::start(ring), Worker::start(1, Manner::Late));
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
        let mut caller = Caller::dial(router.address);
        caller.send(&frame(LISTEN_PATH, b"x"));
        wait_until("the worker has it", || worker.taken() == 1);
        // From now on a few answers do not wake the router, and nothing more is sent.
        router.route_to(Policy::RoundRobin, Ack::OnForward, &[&worker]);
        assert_eq!(caller.reply(), "");
        assert_eq!(router.handle.stats.shard.ack_timeouts.get(), 0);
    }
}

#[test]
fn direct_and_hash_follow_the_header() {
    for ring in rings() {
        let router = Router::start(ring);
        let workers = [
            Worker::start(0xa, Manner::Accept),
            Worker::start(0xb, Manner::Accept),
        ];
        router.route_to(Policy::Direct, Ack::OnAccept, &[&workers[0], &workers[1]]);
        let mut caller = Caller::dial(router.address);
        for _ in 0..5 {
            caller.send(&frame_with(
                LISTEN_PATH,
                b"{\"a\":\"1\",\"x-test\":\"b\"}",
                b"x",
            ));
            assert_eq!(caller.reply(), "");
        }
        assert_eq!(workers[1].taken(), 5);
        caller.send(&frame_with(LISTEN_PATH, b"{\"x-test\":\"c\"}", b"x"));
        assert!(
            caller
                .reply()
                .contains("the instance asked for is not among those of")
        );
        router.route_to(Policy::Hash, Ack::OnAccept, &[&workers[0], &workers[1]]);
        for session in 0..20 {
            let headers = format!("{{\"x-test\":\"session-{session}\"}}");
            let before = [workers[0].taken(), workers[1].taken()];
            for _ in 0..4 {
                caller.send(&frame_with(LISTEN_PATH, headers.as_bytes(), b"x"));
                assert_eq!(caller.reply(), "");
            }
            let gained = [
                workers[0].taken() - before[0],
                workers[1].taken() - before[1],
            ];
            assert!(gained == [4, 0] || gained == [0, 4], "{gained:?}");
        }
        assert!(workers[0].taken() >= 4 && workers[1].taken() >= 9);
    }
}

#[test]
fn an_idle_shard_goes_cold_and_wakes_up() {
    for ring in rings() {
        let (router, worker) = (Router::start(ring), Worker::start(1, Manner::Accept));
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
        let stats = &router.handle.stats.shard;
        if ring == RingKind::Uring {
            wait_until("it sleeps in its executor", || stats.parks.get() >= 2);
        }
        let mut caller = Caller::dial(router.address);
        caller.send(&frame(LISTEN_PATH, b"x"));
        assert_eq!(caller.reply(), "");
    }
}
