//! `corelane serve` as a whole: the real program, real sockets, and etcd where there is one.

mod lab;

use std::time::Duration;

use lab::*;
use rustix::process::Signal;

const LISTEN: &str = "dynamo/router/generate";
const TARGET: &str = "dynamo/backend/generate";
const UNKNOWN: &str = "Server unavailable: unknown endpoint ";

fn route(options: &str) -> String {
    format!("[[route]]\nlisten = \"{LISTEN}\"\ntarget = \"{TARGET}\"\n{options}\n")
}

/// A router in front of one worker, with discovery in memory.
fn one_worker(options: &str, more: &str, env: &[(&str, &str)]) -> (Program, Worker) {
    let worker = Worker::start();
    let text = [route(options), worker.instance(TARGET), more.to_owned()].concat();
    let mut router = Program::serve(&text, env);
    router.ready();
    (router, worker)
}

#[test]
fn a_request_reaches_the_worker_and_health_and_metrics_say_so() {
    let (mut router, worker) = one_worker("", "[drain]\ngrace_s = 0\n", &[]);
    let health = router.health();
    assert_eq!(health["status"], "ready");
    assert_eq!(health["endpoints"][LISTEN], "ready");
    let (mut caller, path) = router.dial(LISTEN);
    assert_eq!(path, format!("0/{LISTEN}"));
    assert_eq!(caller.ask(&path), "");
    wait_until("the worker has it", || worker.taken() == 1);
    assert_eq!(
        worker.frames.lock().unwrap()[0],
        frame(&format!("a1/{TARGET}"))
    );
    assert_eq!(
        caller.ask("0/no/such/one"),
        format!("{UNKNOWN}0/no/such/one")
    );

    wait_until("the answer is counted", || {
        router.metric(&["corelane_accepted_upstream_total"]) == 1.0
    });
    assert_eq!(router.metric(&["corelane_requests_total{"]), 1.0);
    assert_eq!(router.metric(&["corelane_hop_seconds_count"]), 1.0);
    assert_eq!(
        router.metric(&["corelane_refused_total", "unknown_endpoint"]),
        1.0
    );
    assert_eq!(
        router.metric(&["corelane_route_instances", LISTEN, TARGET]),
        1.0
    );
    assert_eq!(router.metric(&["corelane_build_info"]), 1.0);
    assert!(router.metric(&["corelane_ring_info"]) >= 1.0);
    assert_eq!(
        router.metric(&["corelane_directories_published_total"]),
        1.0
    );
    let local = router.metric(&["corelane_locality_ratio_all"]);
    assert!((0.0..=1.0).contains(&local), "{local}");
    assert_eq!(router.get("/live").unwrap().0, 200);
    assert_eq!(router.get("/other").unwrap().0, 404);

    router.signal(Signal::TERM);
    assert_eq!(router.ended(), 0);
    assert!(!router.log().contains(" ERROR "), "{}", router.log());
}

#[test]
fn a_drain_waits_for_what_is_in_flight_and_refuses_the_rest() {
    let options = "ack = \"on_accept\"\nack_timeout_ms = 60000";
    // Long enough to send a request in it on a busy machine.
    let drain = "[drain]\ngrace_s = 10\ntimeout_s = 600\n";
    let (mut router, worker) = one_worker(options, drain, &[]);
    worker.hold(true);
    let (mut held, path) = router.dial(LISTEN);
    held.send(&path);
    wait_until("the worker has it", || worker.taken() == 1);
    router.signal(Signal::TERM);
    wait_until("readiness is withdrawn", || {
        router.get("/health").unwrap().0 == 503
    });
    assert_eq!(router.get("/live").unwrap().0, 200);
    assert_eq!(router.metric(&["corelane_process_draining"]), 1.0);
    // While it is still known to callers it still accepts.
    let (mut late, _) = router.dial(LISTEN);
    late.send(&path);
    wait_until("the grace is over", || {
        router.log().contains("refusing new requests")
    });
    let refusal = wait_for("new requests are refused", || {
        let (mut new, _) = router.dial(LISTEN);
        new.send(&path);
        new.reply_within(Duration::from_secs(1))
    });
    assert_eq!(refusal, format!("{UNKNOWN}{path}"));
    assert!(router.is_alive(), "two requests are in flight");
    worker.hold(false);
    assert_eq!((held.reply(), late.reply()), (String::new(), String::new()));
    assert_eq!(router.ended(), 0);
    let log = router.log();
    let order = [
        "out of discovery",
        "still accepting",
        "refusing new",
        "nothing is in flight",
    ];
    let at = order.map(|step| log.find(step).unwrap_or_else(|| panic!("{step}: {log}")));
    assert!(at.is_sorted(), "{log}");
}

#[test]
fn a_drain_does_not_wait_for_ever() {
    let options = "ack = \"on_accept\"\nack_timeout_ms = 600000";
    let (mut router, worker) = one_worker(options, "[drain]\ngrace_s = 0\ntimeout_s = 1\n", &[]);
    worker.hold(true);
    let (mut held, path) = router.dial(LISTEN);
    held.send(&path);
    wait_until("the worker has it", || worker.taken() == 1);
    router.signal(Signal::INT);
    assert_eq!(router.ended(), 0);
    assert!(router.log().contains("time is up"), "{}", router.log());
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let (mut router, _worker) = one_worker("", "[drain]\ngrace_s = 3600\n", &[]);
    router.signal(Signal::TERM);
    wait_until("readiness is withdrawn", || {
        router.get("/health").unwrap().0 == 503
    });
    assert!(router.is_alive());
    router.signal(Signal::TERM);
    assert_eq!(router.ended(), 1);
}

#[test]
fn two_routes_have_a_worker_each() {
    let (first, second) = (Worker::start(), Worker::start());
    let text = [
        route("policy = \"round_robin\""),
        "[[route]]\nlisten = \"dynamo/router/embed\"\ntarget = \"dynamo/embedder/run\"\n".into(),
        first.instance(TARGET),
        second.instance("dynamo/embedder/run"),
    ];
    let mut router = Program::serve(&text.concat(), &[]);
    router.ready();
    let (mut caller, generate) = router.dial(LISTEN);
    let (_, embed) = router.path("dynamo/router/embed");
    for _ in 0..3 {
        assert_eq!(caller.ask(&generate), "");
    }
    assert_eq!(caller.ask(&embed), "");
    wait_until("both have theirs", || {
        (first.taken(), second.taken()) == (3, 1)
    });
}

#[test]
fn epoll_is_used_where_it_is_asked_for() {
    let configured = one_worker("", "[core]\nio = \"epoll\"\n", &[("CORELANE_IO", "")]);
    let environment = one_worker("", "", &[("CORELANE_IO", "epoll")]);
    for (router, worker) in [configured, environment] {
        let ring = [
            "corelane_ring_info",
            "ring=\"epoll\"",
            "cause=\"configured\"",
        ];
        assert!(router.metric(&ring) >= 1.0);
        assert!(
            router
                .log()
                .contains("ring epoll: the configuration asks for epoll")
        );
        let (mut caller, path) = router.dial(LISTEN);
        assert_eq!(caller.ask(&path), "");
        wait_until("the worker has it", || worker.taken() == 1);
    }
}

/// A limit of locked memory that is too low for io_uring.
const LITTLE_MEMORY: [&str; 4] = ["/bin/sh", "-c", "ulimit -l 64 && exec \"$@\"", "sh"];

#[test]
fn where_io_uring_is_refused_the_cause_is_named() {
    let worker = Worker::start();
    let text = [route(""), worker.instance(TARGET)].concat();
    let mut router = Program::wrapped(&LITTLE_MEMORY, &text, &[("CORELANE_IO", "auto")]);
    router.ready();
    let refused = |line: &str| line.contains("WARN") && line.contains("ring epoll");
    let log = router.log();
    let told = log.lines().find(|line| refused(line)).expect(&log);
    let words = ["RLIMIT_MEMLOCK is 64 KiB", "Raise RLIMIT_MEMLOCK"];
    // A host may refuse io_uring for other reasons, which come first.
    if told.contains("MEMLOCK") {
        assert!(words.iter().all(|word| told.contains(word)), "{told}");
        assert_eq!(router.metric(&["ring=\"epoll\"", "cause=\"memlock\""]), 1.0);
    }
    let (mut caller, path) = router.dial(LISTEN);
    assert_eq!(caller.ask(&path), "");

    let mut router = Program::wrapped(&LITTLE_MEMORY, &text, &[("CORELANE_IO", "uring")]);
    assert_eq!(router.ended(), 78);
    assert!(
        router.log().contains("io_uring is required"),
        "{}",
        router.log()
    );
}

#[test]
fn a_planner_tells_its_intervals_and_metrics_show_them() {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;

    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("planner.sock");
    let options = format!(
        "[drain]\ngrace_s = 0\n[planner]\nsocket = \"{}\"\nnames = \"both\"\n",
        socket.display()
    );
    let (mut router, _worker) = one_worker("", &options, &[]);
    let planner = UnixStream::connect(&socket).unwrap();
    planner
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut answers = BufReader::new(planner.try_clone().unwrap()).lines();
    let mut say = |line: &str| {
        writeln!(&planner, "{line}").unwrap();
        answers.next().unwrap().unwrap()
    };
    let whole = r#"{"interval_s":180,"prefill":{"replicas":2,"gpus":1},
        "decode":{"replicas":4,"gpus":2},"observed":{"ttft_ms":200,"itl_ms":12,
        "request_duration_s":3.5,"requests":900,"input_tokens":3000,"output_tokens":150},
        "plugins":[{"plugin_id":"cap","stage":"reconcile","result":"at_most","latency_s":0.02}],
        "ticks":[{"duration_s":0.2}]}"#;
    assert_eq!(say(&whole.replace('\n', " ")), r#"{"ok":true}"#);
    assert!(say(r#"{"interval_s":0}"#).contains(r#""ok":false"#));
    for (words, value) in [
        (&["planner:observed_ttft "][..], 200.0),
        (&["dynamo_planner_observed_ttft_ms "], 200.0),
        (&["planner:num_d_workers "], 4.0),
        (&["dynamo_planner_num_decode_replicas "], 4.0),
        (&["planner:gpu_hours "], 0.5),
        (&["dynamo_planner_gpu_hours "], 0.5),
        (
            &["dynamo_planner_plugin_evaluations_total{", "\"at_most\""],
            1.0,
        ),
        (&["dynamo_planner_tick_duration_seconds_count "], 1.0),
        (&["corelane_planner_refused_total "], 1.0),
        // Beside the router's own.
        (&["corelane_build_info"], 1.0),
    ] {
        assert_eq!(router.metric(words), value, "{words:?}");
    }

    router.signal(Signal::TERM);
    assert_eq!(router.ended(), 0);
    assert!(!socket.exists(), "the socket goes with the router");
}

#[test]
fn taken_ports_are_said() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let line = |key: &str| format!("[drain]\ngrace_s = 0\n{}", route("")) + key;
    for (name, say) in [
        ("CORELANE_SERVER_PORT", "port = 0"),
        ("CORELANE_SERVER_STATUS_PORT", "-1"),
    ] {
        let mut router = Program::serve(&line(""), &[(name, &port.to_string())]);
        assert_eq!(router.ended(), 1, "{name}");
        let log = router.log();
        assert!(log.contains("in use") && log.contains(say), "{log}");
    }
}

#[test]
fn a_request_that_is_routed_has_a_line_when_it_is_over() {
    let env = [
        ("DYN_LOGGING_JSONL", "1"),
        ("DYN_LOGGING_SPAN_EVENTS", "1"),
        ("OTEL_TRACES_SAMPLE_RATIO", "1"),
    ];
    let (router, _worker) = one_worker("ack = \"on_accept\"", "", &env);
    let (mut caller, path) = router.dial(LISTEN);
    assert_eq!(caller.ask(&path), "");
    let line = wait_for("the line of its span", || {
        let log = router.log();
        let lines = log.lines().filter(|line| line.contains("corelane.route"));
        let read = |line| serde_json::from_str::<serde_json::Value>(line).ok();
        lines.filter_map(read).next()
    });
    for (name, value) in [
        ("message", "SPAN_CLOSED"),
        ("span_name", "corelane.route"),
        ("request.outcome", "accepted"),
        ("route", LISTEN),
        ("namespace", "dynamo"),
        ("component", "backend"),
        ("endpoint", "generate"),
        ("response", "direct"),
        ("transport", "tcp"),
        ("trace_flags", "01"),
    ] {
        assert_eq!(line[name], value, "{name} in {line}");
    }
    let address = line["worker_address"].as_str().unwrap();
    assert!(address.starts_with("127.0.0.1:"), "{line}");
    assert_eq!(line["attempts"], 1, "{line}");
    let time = |name: &str| {
        line[name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name} in {line}"))
    };
    assert!(time("time.forwarded_us") <= time("time.acknowledged_us"));
    assert!(time("time.acknowledged_us") <= time("time.duration_us"));
    assert!(
        line.get("parent_id").is_none(),
        "a trace of its own: {line}"
    );
    assert_eq!(router.metric(&["corelane_spans_routed_total"]), 1.0);
}

#[test]
fn another_router_on_the_same_port_is_no_partner() {
    let (first, _worker) = one_worker("", "", &[]);
    let port = first.path(LISTEN).0.port().to_string();
    let mut second = Program::serve(&route(""), &[("CORELANE_SERVER_PORT", &port)]);
    assert_eq!(second.ended(), 1);
    assert!(second.log().contains("in use"), "{}", second.log());
}

#[test]
fn up_says_one_command_and_it_gets_answers_from_both_workers() {
    let mut up = Program::command(&["up", "--items", "3"]);
    let out = up.says(" call ");
    assert_eq!(out.matches("worker  127.0.0.1:").count(), 2, "{out}");
    let line = out.lines().find(|line| line.contains(" call ")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!((words[0], words[1]), (PROGRAM, "call"));
    let more = ["--count", "10", "--body", r#"{"prompt":"hi"}"#];
    let mut call = Program::command(&[&words[1..], &more].concat());
    assert_eq!(call.ended(), 0, "{}", call.log());
    assert!(call.out().contains("prompt"), "{}", call.out());
    let status = out.split("http://").nth(1).unwrap();
    let address = status.split('/').next().unwrap();
    up.status_port = address.rsplit(':').next().unwrap().parse().unwrap();
    assert_eq!(up.metric(&["corelane_requests_total{"]), 10.0);
    assert_eq!(up.metric(&["corelane_route_instances"]), 2.0);
    up.signal(Signal::INT);
    assert_eq!(up.ended(), 0);
    assert!(up.log().contains("workers stopped"), "{}", up.log());
}

// --- etcd ------------------------------------------------------------------------------

/// A router that finds its instances in etcd. Its lease outlives any time that this process or etcd
/// stands still; it is refreshed every 2 s all the same.
fn router_on(etcd: &Etcd, options: &str) -> Program {
    Program::serve(&config_on(etcd, options), &[])
}

fn config_on(etcd: &Etcd, options: &str) -> String {
    let discovery = format!(
        "[discovery]\nbackend = \"etcd\"\nendpoints = [\"{}\"]\nlease_ttl_s = 120\n",
        etcd.endpoint()
    );
    [discovery, route(options), "[drain]\ngrace_s = 1\n".into()].concat()
}

/// A model card of an instance of the target: the base model's, or an adapter's.
fn put_card(etcd: &Etcd, id: u64, adapter: Option<&str>) {
    let (name, suffix) = (adapter.unwrap_or("m"), adapter.unwrap_or(""));
    let card = format!(
        r#"{{"type":"Model","namespace":"dynamo","component":"backend","endpoint":"generate","instance_id":{id},"model_suffix":"{suffix}","card_json":{{"display_name":"{name}","source_path":"/m","x":[1, 2]}}}}"#
    );
    let suffix = adapter.map(|adapter| format!("/{adapter}"));
    let suffix = suffix.unwrap_or_default();
    etcd.put(&format!("v1/mdc/{TARGET}/{id:x}{suffix}"), &card);
}

fn offered(etcd: &Etcd) -> Vec<serde_json::Value> {
    let keys = etcd.keys(&format!("v1/instances/{LISTEN}/"));
    let value = |(_, value): &(String, String)| serde_json::from_str(value).unwrap();
    keys.iter().map(value).collect()
}

#[test]
fn instances_are_found_and_ours_is_offered_until_the_drain() {
    let Some(etcd) = Etcd::start() else { return };
    let worker = Worker::start();
    etcd.register(TARGET, 0xa1, &worker);
    put_card(&etcd, 0xa1, None);
    let mut router = router_on(&etcd, "ack = \"on_accept\"\nack_timeout_ms = 60000");
    router.ready();

    let records = offered(&etcd);
    assert_eq!(records.len(), 1);
    let (address, path) = router.path(LISTEN);
    assert_eq!(records[0]["transport"]["tcp"], format!("{address}/{path}"));
    assert_eq!(records[0]["request_plane_codec"], "msgpack");
    assert_eq!(records[0]["device_type"], "cuda");
    let id = records[0]["instance_id"].as_u64().unwrap();
    assert_eq!(path, format!("{id:x}/{LISTEN}"));
    let card = wait_for("the card is republished", || {
        let cards = etcd.keys(&format!("v1/mdc/{LISTEN}/"));
        cards.into_iter().next()
    });
    assert_eq!(card.0, format!("v1/mdc/{LISTEN}/{id:x}"));
    assert!(
        card.1
            .contains(r#""card_json":{"display_name":"m","source_path":"/m","x":[1, 2]}"#),
        "{}",
        card.1
    );

    worker.hold(true);
    let (mut caller, _) = router.dial(LISTEN);
    caller.send(&path);
    wait_until("the worker has it", || worker.taken() == 1);
    router.signal(Signal::TERM);
    wait_until("it has left etcd", || offered(&etcd).is_empty());
    wait_until("its cards have left too", || {
        etcd.keys(&format!("v1/mdc/{LISTEN}/")).is_empty()
    });
    assert!(router.is_alive(), "a request is in flight");
    worker.hold(false);
    assert_eq!(caller.reply(), "");
    assert_eq!(router.ended(), 0);
    assert!(router.log().contains("lease revoked"), "{}", router.log());
}

/// The watch of a route that has changed is new, and knew of no card at first: all were withdrawn
/// for a moment, and clients lost the model.
#[test]
fn cards_stay_while_their_route_changes() {
    let Some(etcd) = Etcd::start() else { return };
    let worker = Worker::start();
    etcd.register(TARGET, 0xa1, &worker);
    put_card(&etcd, 0xa1, None);
    let mut router = router_on(&etcd, "");
    router.ready();
    let cards = || etcd.keys(&format!("v1/mdc/{LISTEN}/"));
    wait_until("the card is republished", || cards().len() == 1);

    router.rewrite(&config_on(&etcd, "retries_max = 5"));
    router.signal(Signal::HUP);
    wait_until("it is taken over", || router.health()["generation"] == 2);
    // The new watch works.
    put_card(&etcd, 0xa1, Some("adapter"));
    wait_until("another card is republished", || cards().len() == 2);
    let log = router.log();
    assert!(!log.contains("model card withdrawn"), "{log}");
}

#[test]
fn a_codec_that_not_all_instances_read_is_not_advertised() {
    let Some(etcd) = Etcd::start() else { return };
    let (worker, old) = (Worker::start(), Worker::start());
    etcd.register(TARGET, 1, &worker);
    let mut router = router_on(&etcd, "");
    router.ready();
    assert_eq!(offered(&etcd)[0]["request_plane_codec"], "msgpack");
    let address = old.address;
    let value = format!(
        r#"{{"type":"Endpoint","component":"backend","endpoint":"generate","namespace":"dynamo","instance_id":2,"transport":{{"tcp":"{address}/2/x"}}}}"#
    );
    etcd.put(&format!("v1/instances/{TARGET}/2"), &value);
    wait_until("the record is changed in place", || {
        offered(&etcd)[0]["request_plane_codec"] == "json"
    });
    assert_eq!(offered(&etcd).len(), 1);
    assert_eq!(router.metric(&["corelane_route_instances"]), 2.0);
}

#[test]
fn etcd_may_go_and_come_back() {
    let Some(mut etcd) = Etcd::start() else {
        return;
    };
    let (worker, second) = (Worker::start(), Worker::start());
    etcd.register(TARGET, 1, &worker);
    let mut router = router_on(&etcd, "policy = \"round_robin\"");
    router.ready();
    let (mut caller, path) = router.dial(LISTEN);
    assert_eq!(caller.ask(&path), "");
    etcd.kill();
    wait_until("the loss is noticed", || {
        router.metric(&["corelane_discovery_stale_watches"]) > 0.0
    });
    for _ in 0..10 {
        assert_eq!(caller.ask(&path), "");
    }
    assert_eq!(
        router.get("/health").unwrap().0,
        200,
        "the last known directory serves"
    );
    etcd.restart(true);
    etcd.register(TARGET, 2, &second);
    wait_until("the new worker is reached", || {
        router.metric(&["corelane_instances_ready"]) == 2.0
    });
    for _ in 0..4 {
        assert_eq!(caller.ask(&path), "");
    }
    wait_until("both are used", || second.taken() >= 2);
    assert!(router.metric(&["corelane_discovery_reconnects_total"]) >= 1.0);
    // A store that is away does not keep us from leaving.
    etcd.kill();
    router.signal(Signal::TERM);
    assert_eq!(router.ended(), 0);
}

#[test]
fn a_lost_lease_gives_a_new_path_and_the_old_one_is_still_served() {
    let Some(mut etcd) = Etcd::start() else {
        return;
    };
    let worker = Worker::start();
    etcd.register(TARGET, 1, &worker);
    let mut router = router_on(&etcd, "");
    router.ready();
    let (mut caller, old) = router.dial(LISTEN);
    etcd.kill();
    etcd.restart(false);
    etcd.register(TARGET, 1, &worker);
    let record = wait_for("it is registered again", || offered(&etcd).pop());
    let id = record["instance_id"].as_u64().unwrap();
    let new = format!("{id:x}/{LISTEN}");
    assert_ne!(new, old);
    wait_until("health knows", || router.get("/health").unwrap().0 == 200);
    assert_eq!(router.path(LISTEN).1, new);
    assert_eq!(caller.ask(&old), "");
    assert_eq!(caller.ask(&new), "");
    assert_eq!(
        router.metric(&["corelane_discovery_lease_losses_total"]),
        1.0
    );
}

#[test]
fn a_store_that_is_not_there_can_be_left() {
    let port = free_port();
    let text = format!(
        "[discovery]\nbackend = \"etcd\"\nendpoints = [\"http://127.0.0.1:{port}\"]\n{}",
        route("")
    );
    let mut router = Program::serve(&text, &[]);
    wait_until("it is alive and not ready", || {
        router
            .get("/health")
            .is_some_and(|(status, _)| status == 503)
    });
    assert_eq!(router.get("/live").unwrap().0, 200);
    router.signal(Signal::TERM);
    assert_eq!(router.ended(), 0);
    let short = [("ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS", "1")];
    let mut router = Program::serve(&text, &short);
    assert_eq!(router.ended(), 1);
    assert!(
        router.log().contains("no contact with etcd at"),
        "{}",
        router.log()
    );
}
