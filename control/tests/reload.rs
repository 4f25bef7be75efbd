//! A changed configuration is taken over while requests run: nothing is lost, what is wrong is
//! refused with its place, and what makes things worse is taken back.

mod lab;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use corelane_codec::{Decoded, reply_frame, request_frame};
use corelane_engine::placement::{affinity, pin_current_thread};
use lab::*;
use rustix::process::Signal;
use serde_json::Value;

const LISTEN: &str = "dynamo/router/generate";
const TARGET: &str = "dynamo/backend/generate";
/// The receive queue of the device of loopback.
const LOOPBACK: &str = "/sys/class/net/lo/queues/rx-0";
/// No deadline of the program's may pass on a busy machine.
const CALM: &str = "[reload]\nwatch_ms = 20\ntaken_timeout_s = 600\n[drain]\ngrace_s = 0\n";

fn route(listen: &str, target: &str, options: &str) -> String {
    format!("[[route]]\nlisten = \"{listen}\"\ntarget = \"{target}\"\n{options}\n")
}

fn instance(worker: &Worker, id: &str, target: &str) -> String {
    let address = worker.address;
    format!("[[instance]]\nendpoint = \"{target}\"\naddress = \"{address}/{id}/{target}\"\n")
}

fn start(text: &str) -> Program {
    let mut router = Program::serve(text, &[]);
    router.ready();
    router
}

/// Status and body.
fn http(port: u16, line: &str, header: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!("{line} HTTP/1.1\r\nhost: x\r\n{header}connection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (
        head.split(' ').nth(1).unwrap().parse().unwrap(),
        body.to_owned(),
    )
}

/// Reloads, and answers the report.
fn reload(router: &Program) -> Value {
    let port = router.status_port;
    let (status, _) = http(
        port,
        "POST /reload",
        "x-corelane: 1\r\ncontent-length: 0\r\n",
    );
    assert!(matches!(status, 200 | 202), "{status}");
    wait_for("the reload ends", || {
        let report: Value = serde_json::from_str(&router.get("/reload")?.1).unwrap();
        (report["busy"] == false).then_some(report)
    })
}

/// `corelane reload`: its exit code and what it prints.
fn command(router: &Program) -> (i32, String) {
    let status = format!("127.0.0.1:{}", router.status_port);
    let mut program = Program::command(&["reload", "--status", &status]);
    (program.ended(), program.out())
}

#[test]
fn routes_come_change_and_go_while_it_runs() {
    let (first, second) = (Worker::start(), Worker::start());
    let base = route(LISTEN, TARGET, "") + &instance(&first, "a1", TARGET) + CALM;
    let router = start(&base);
    assert_eq!(router.health()["generation"], 1);
    let (mut caller, path) = router.dial(LISTEN);
    assert_eq!(caller.ask(&path), "");

    // Another policy, and another worker in place of the first.
    let moved = route(
        LISTEN,
        TARGET,
        "policy = \"round_robin\"\nack = \"on_accept\"",
    );
    let moved = moved + &instance(&second, "b2", TARGET) + CALM;
    router.rewrite(&moved);
    let (code, said) = command(&router);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("applied: generation 2"), "{said}");
    assert!(said.contains("route[0].policy"), "{said}");
    for _ in 0..4 {
        assert_eq!(caller.ask(&path), "", "the same connection");
    }
    wait_until("the new instance has them", || {
        (first.taken(), second.taken()) == (1, 4)
    });

    // A second route comes, by SIGHUP.
    let extra = ("dynamo/router/extra", "dynamo/extra/run");
    let more = route(extra.0, extra.1, "") + &instance(&first, "c3", extra.1);
    router.rewrite(&(moved.clone() + &more));
    router.signal(Signal::HUP);
    wait_until("it is taken over", || router.health()["generation"] == 3);
    let (mut other, extra_path) = router.dial(extra.0);
    assert_eq!(other.ask(&extra_path), "");
    wait_until("it is there", || first.taken() == 2);

    // And goes again: it leaves discovery, then its path is unknown.
    router.rewrite(&moved);
    assert_eq!(reload(&router)["result"], "applied");
    assert!(router.health()["paths"][extra.0].is_null());
    wait_until("its path is gone", || {
        other.ask(&extra_path).contains("unknown endpoint")
    });
    assert_eq!(caller.ask(&path), "");
    assert_eq!(reload(&router)["result"], "unchanged");
    assert_eq!(router.metric(&["corelane_config_generation"]), 4.0);
    assert_eq!(
        router.metric(&["corelane_config_reloads_total", "applied"]),
        3.0
    );
    assert_eq!(
        router.metric(&["corelane_config_reloads_total", "unchanged"]),
        1.0
    );
}

#[test]
fn what_is_under_way_keeps_its_route() {
    let worker = Worker::start();
    let options = "ack = \"on_accept\"\nack_timeout_ms = 600000";
    let base = route(LISTEN, TARGET, options) + &instance(&worker, "a1", TARGET) + CALM;
    let kept = route("dynamo/router/kept", TARGET, "");
    let router = start(&(base.clone() + &kept));
    let (mut caller, path) = router.dial(LISTEN);
    worker.hold(true);
    caller.send(&path);
    wait_until("the worker has it", || worker.taken() == 1);
    // Its route goes, and the instance with it, while it waits for its answer.
    router.rewrite(&(kept + CALM));
    let report = reload(&router);
    assert_eq!(report["result"], "applied", "{report}");
    let (mut late, _) = (Caller::dial(router.path("dynamo/router/kept").0), ());
    wait_until("the path is gone", || {
        late.ask(&path).contains("unknown endpoint")
    });
    worker.hold(false);
    assert_eq!(caller.reply(), "", "it is answered all the same");
}

/// Edits, and what is said of them.
const BAD: [(&str, &str); 9] = [
    // Lines 1 and 2 are [server] of the laboratory, 3 to 5 the route.
    (
        "policy = \"lest_loaded\"",
        "corelane.toml:6:10: unknown policy \"lest_loaded\"",
    ),
    ("policy = 5", "corelane.toml:6:10: policy must be a string"),
    (
        "policy = \"kv\"",
        "corelane.toml:6:10: nothing is heard of the workers of",
    ),
    (
        "response = \"relay\"",
        "corelane.toml:6:12: response = \"relay\" where no route",
    ),
    (
        "retries_max = 3\nlane = \"/x\"",
        "corelane.toml:7:8: route[0].lane cannot change from",
    ),
    (
        "[core]\nbuffers = 64",
        "corelane.toml:7:11: core[0].buffers cannot change from 4096",
    ),
    (
        "[core]\nring_depth = 128",
        "corelane.toml:7:14: core[0].ring_depth cannot change from 512 to 128",
    ),
    (
        "[core]\nin_flight_max = 100000",
        "corelane.toml:7:17: core[0].in_flight_max is 100000",
    ),
    ("[server]", "corelane.toml:6:"),
];

#[test]
fn a_bad_edit_is_refused_with_its_place_and_nothing_is_changed() {
    let worker = Worker::start();
    let base = route(LISTEN, TARGET, "") + &instance(&worker, "a1", TARGET) + CALM;
    let router = start(&base);
    let (mut caller, path) = router.dial(LISTEN);
    for (edit, says) in BAD {
        router.rewrite(&base.replacen("\n\n", &format!("\n{edit}\n"), 1));
        let (code, said) = command(&router);
        assert_eq!(code, 2, "{edit}: {said}");
        assert!(said.contains(says), "{edit}: {said}");
        assert!(
            said.contains("refused, nothing is changed: generation 1"),
            "{said}"
        );
        assert_eq!(caller.ask(&path), "");
    }
    let count = BAD.len() as f64;
    assert_eq!(
        router.metric(&["corelane_config_reloads_total", "refused"]),
        count
    );
    assert_eq!(
        router.metric(&["corelane_config_last_reload_successful"]),
        0.0
    );
    assert!(
        router.log().contains("reload refused: "),
        "{}",
        router.log()
    );
    // Who is not told to act does not.
    router.rewrite(&base.replacen("\n\n", "\nretries_max = 7\n", 1));
    assert_eq!(
        http(router.status_port, "POST /reload", "content-length: 0\r\n").0,
        403
    );
    assert_eq!(router.health()["generation"], 1);
    assert_eq!(reload(&router)["result"], "applied");
    assert_eq!(
        router.metric(&["corelane_config_last_reload_successful"]),
        1.0
    );
}

/// Callers on connections of their own, one request after the other, until told to end.
struct Load {
    stop: Arc<AtomicBool>,
    callers: Vec<JoinHandle<()>>,
    sent: Arc<AtomicU64>,
    /// Requests that were answered with anything but an acknowledgement.
    failed: Arc<AtomicU64>,
}

impl Load {
    fn start(address: SocketAddr, path: &str, callers: usize) -> Load {
        let (stop, sent) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let failed = Arc::<AtomicU64>::default();
        let mut frame = Vec::new();
        let headers = b"{\"request-id\":\"r\",\"x-corelane-instance\":\"a1\",\"x-s\":\"7\"}";
        request_frame::write_frame(path.as_bytes(), headers, b"payload", &mut frame).unwrap();
        let call = |_| {
            let (stop, sent, failed) = (Arc::clone(&stop), Arc::clone(&sent), Arc::clone(&failed));
            let frame = frame.clone();
            std::thread::spawn(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.set_nodelay(true).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    stream.write_all(&frame).unwrap();
                    sent.fetch_add(1, Ordering::Relaxed);
                    if !reply(&mut stream).is_empty() {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                    std::thread::sleep(Duration::from_micros(100));
                }
            })
        };
        let callers = (0..callers).map(call).collect();
        Load {
            stop,
            callers,
            sent,
            failed,
        }
    }

    /// How many were sent, and how many failed.
    fn end(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.callers
            .into_iter()
            .for_each(|caller| caller.join().unwrap());
        (
            self.sent.load(Ordering::Relaxed),
            self.failed.load(Ordering::Relaxed),
        )
    }
}

fn reply(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        if let Decoded::Frame(text) = reply_frame::decode(&bytes, 1 << 20) {
            return bytes[text].to_vec();
        }
        let mut chunk = [0; 1024];
        let read = stream.read(&mut chunk).unwrap();
        assert!(read > 0, "the router closed the connection");
        bytes.extend_from_slice(&chunk[..read]);
    }
}

#[test]
fn a_core_that_is_worse_off_gets_back_what_it_had() {
    let worker = Worker::start();
    let reload_rules = "[reload]\nwatch_ms = 600000\ntaken_timeout_s = 600\n";
    let base = route(LISTEN, TARGET, "ack = \"on_accept\"") + reload_rules;
    let router = start(&(base.clone() + &instance(&worker, "a1", TARGET)));
    let (address, path) = router.path(LISTEN);
    // So many that the first core of four has one of them, whatever the kernel's hash says.
    let callers = 32;
    let load = Load::start(address, &path, callers);
    wait_until("requests flow", || load.sent.load(Ordering::Relaxed) > 100);
    // Nobody listens there.
    let dead = format!("127.0.0.1:{}", free_port());
    let dead = format!("[[instance]]\nendpoint = \"{TARGET}\"\naddress = \"{dead}/a1/{TARGET}\"\n");
    router.rewrite(&(base.clone() + &dead));
    let report = reload(&router);
    assert_eq!(report["result"], "rolled_back", "{report}");
    assert_eq!(report["generation"], 1);
    let why = report["reasons"][0].as_str().unwrap();
    assert!(why.contains("requests failed"), "{why}");
    let failed = load.failed.load(Ordering::Relaxed);
    let sent = load.sent.load(Ordering::Relaxed);
    wait_until("requests flow again", || {
        load.sent.load(Ordering::Relaxed) > sent + 200
    });
    let (_, after) = load.end();
    // Each caller may have had one under way.
    let most = failed + callers as u64;
    assert!(failed > 0 && after <= most, "{failed} {after}");
    assert_eq!(
        router.metric(&["corelane_config_reloads_total", "rolled_back"]),
        1.0
    );
    assert_eq!(router.health()["generation"], 1);
}

/// A router on the first and the last CPU, whose placing is edited.
struct Placed {
    router: Program,
    worker: Worker,
    first: usize,
    last: usize,
}

impl Placed {
    /// None, and a word about it, on a host with one CPU.
    fn start() -> Option<Placed> {
        let cpus = affinity().unwrap();
        let [first, .., last] = cpus[..] else {
            eprintln!("left out: it takes two CPUs");
            return None;
        };
        let worker = Worker::start();
        let router = start(&Placed::text("", "", &worker, (first, last)));
        Some(Placed {
            router,
            worker,
            first,
            last,
        })
    }

    fn text(server: &str, core: &str, worker: &Worker, cpus: (usize, usize)) -> String {
        let rest = route(LISTEN, TARGET, "") + &worker.instance(TARGET) + CALM;
        let (first, last) = cpus;
        format!(
            "{server}\n{rest}[core]\ncpus = \"{first},{last}\"\nbuffers = 256\n{core}\n\
             [control]\ncpu = {last}\nshare = \"on\"\n"
        )
    }

    /// Other lines of `[server]` and of `[core]`, and what is said to have changed.
    fn edit(&self, server: &str, core: &str, changed: &[&str]) {
        let text = Placed::text(server, core, &self.worker, (self.first, self.last));
        self.router.rewrite(&text);
        let report = reload(&self.router);
        assert_eq!(report["result"], "applied", "{report}");
        assert_eq!(report["changed"], serde_json::json!(changed), "{report}");
    }

    /// Connections made on one CPU, over loopback: that CPU handles their packets.
    fn dial_on(&self, cpu: usize, count: usize) -> Vec<TcpStream> {
        let (address, _) = self.router.path(LISTEN);
        let dial = move || {
            pin_current_thread(cpu).unwrap();
            let dial = |_| TcpStream::connect(address).unwrap();
            (0..count).map(dial).collect()
        };
        std::thread::spawn(dial).join().unwrap()
    }

    /// A number of both cores.
    fn of(&self, name: &str) -> [usize; 2] {
        let name = format!("corelane_{name}{{");
        [self.first, self.last].map(|cpu| {
            let cpu = format!("cpu=\"{cpu}\"");
            self.router.metric(&[&name, &cpu]) as usize
        })
    }

    /// Local and remote connections of both, once there were so many.
    fn taken(&self, count: usize) -> ([usize; 2], [usize; 2]) {
        wait_for("all connections are counted", || {
            let local = self.of("connections_local_total");
            let remote = self.of("connections_remote_total");
            let all = local.iter().chain(&remote).sum::<usize>();
            (all == count).then_some((local, remote))
        })
    }
}

#[test]
fn steering_changes_while_it_runs() {
    let Some(placed) = Placed::start() else {
        return;
    };
    let (first, last) = (placed.first, placed.last);
    let mut open = placed.dial_on(first, 8);
    let (local, remote) = placed.taken(8);
    placed.edit("steering = \"cpu\"", "", &["server.steering"]);
    open.extend(placed.dial_on(first, 20));
    open.extend(placed.dial_on(last, 20));
    let by_cpu = ([local[0] + 20, local[1] + 20], remote);
    assert_eq!(placed.taken(48), by_cpu, "each core has those of its CPU");

    placed.edit("steering = \"off\"", "", &["server.steering"]);
    open.extend(placed.dial_on(first, 64));
    let (local, remote) = placed.taken(112);
    // The kernel's hash deals them out.
    assert!(local[0] > by_cpu.0[0] && remote[1] > by_cpu.1[1]);
}

#[test]
fn the_queue_of_a_core_changes_while_it_runs() {
    let (Some(placed), true) = (Placed::start(), Path::new(LOOPBACK).exists()) else {
        eprintln!("left out: it takes {LOOPBACK}");
        return;
    };
    let (first, last) = (placed.first, placed.last);
    let file = |cpu| format!("cores.d/{cpu}.toml");
    let key = |cpu| format!("core[{cpu}].nic_queue");
    // Loopback has one queue. Its packets have no CPU of their own, so that the core stays.
    let queue = "[core]\nnic_queue = \"lo:0\"\n";
    placed.router.write(&file(last), queue);
    placed.edit("", "", &[&key(last)]);
    let mut open = placed.dial_on(first, 20);
    assert_eq!(placed.taken(20), ([0, 0], [0, 20]));
    placed.router.remove(&file(last));
    placed.router.write(&file(first), queue);
    placed.edit("", "", &[&key(first), &key(last)]);
    open.extend(placed.dial_on(first, 20));
    assert_eq!(placed.taken(40), ([20, 0], [0, 20]));
    placed
        .router
        .write(&file(first), &format!("{queue}cpu = {first}\n"));
    assert_eq!(reload(&placed.router)["result"], "unchanged");
}

#[test]
fn what_becomes_of_an_imbalance_changes_while_it_runs() {
    let Some(placed) = Placed::start() else {
        return;
    };
    let first = placed.first;
    let server = |policy: &str| format!("steering = \"cpu\"\nimbalance = \"{policy}\"");
    let both = ["server.imbalance", "server.steering"];
    placed.edit(&server("least_connections"), "", &both);
    let mut open = placed.dial_on(first, 40);
    placed.taken(40);
    let [stayed, moved] = placed.of("callers");
    let handed = || placed.of("connections_handed_over_total");
    wait_until("all are counted", || handed() == [moved, 0]);
    // Until they differ by less than four, or a few more: a core that looks while its neighbour
    // takes one counts it twice.
    assert!(
        (14..=18).contains(&moved) && stayed + moved == 40,
        "{moved}"
    );
    placed.edit(&server("keep"), "", &both[..1]);
    open.extend(placed.dial_on(first, 20));
    placed.taken(60);
    assert_eq!(handed(), [moved, 0], "they stay again");
    assert_eq!(placed.of("callers"), [stayed + 20, moved]);
}

#[test]
fn polling_of_receive_queues_changes_while_it_runs() {
    let Some(placed) = Placed::start() else {
        return;
    };
    let polled = || placed.of("busy_poll_us");
    assert_eq!(polled(), [0, 0]);
    let keys = [placed.first, placed.last].map(|core| format!("core[{core}].busy_poll_us"));
    let keys = [&*keys[0], &*keys[1]];
    placed.edit("", "busy_poll_us = 20", &keys);
    wait_until("they poll, or cannot", || {
        let log = placed.router.log();
        polled() == [20, 20] || log.contains("busy_poll_us is not in force")
    });
    placed.edit("", "", &keys);
    wait_until("they have ceased to", || polled() == [0, 0]);
    let (mut caller, path) = placed.router.dial(LISTEN);
    assert_eq!(caller.ask(&path), "", "it serves");
}

/// Numbers that follow from a seed.
struct Dice(u64);

impl Dice {
    fn up_to(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.up_to(words.len() as u64) as usize]
    }
}

/// A valid configuration in which the route of the load is always there, and the first worker is
/// always among its instances.
fn some(dice: &mut Dice, workers: &[Worker]) -> String {
    let policies = [
        "least_loaded",
        "power_of_two_choices",
        "round_robin",
        "random",
        "direct",
        "hash",
    ];
    let policy = dice.of(&policies);
    let header = if policy == "hash" {
        "header = \"x-s\"\n"
    } else {
        ""
    };
    let ack = dice.of(&["on_forward", "on_accept"]);
    let (timeout, retries) = (600_000 - dice.up_to(9), dice.up_to(4));
    let hold = [0, 4_096, 1 << 20][dice.up_to(3) as usize];
    let options = format!(
        "policy = \"{policy}\"\n{header}ack = \"{ack}\"\nack_timeout_ms = {timeout}\n\
         retries_max = {retries}\nhold_bytes = {hold}"
    );
    let mut text = route(LISTEN, TARGET, &options) + &instance(&workers[0], "a1", TARGET);
    for (index, worker) in workers.iter().enumerate().skip(1) {
        if dice.up_to(2) == 0 {
            text += &instance(worker, &format!("a{}", index + 1), TARGET);
        }
    }
    for other in 0..dice.up_to(4) {
        let target = format!("dynamo/other{}/run", dice.up_to(6));
        text += &route(&format!("dynamo/router/other{other}"), &target, "");
    }
    let (connections, in_flight) = (1_000 + dice.up_to(2_000), 1_000 + dice.up_to(2_000));
    let (queue, idle) = (
        1 << (20 + dice.up_to(4)),
        dice.of(&["block", "block", "spin"]),
    );
    let server = format!(
        "steering = \"{}\"\nimbalance = \"{}\"\n",
        dice.of(&["auto", "off", "cpu"]),
        dice.of(&["keep", "least_connections"])
    );
    text += &format!(
        "[core]\nbusy_poll_us = {}\nidle = \"{idle}\"\nconnections_max = {connections}\n\
         in_flight_max = {in_flight}\n\
         upstream_queue_bytes = {queue}\n[drain]\ngrace_s = 0\ntimeout_s = {}\n\
         [control]\nflight_dir = \"/nonexistent/{}\"\n\
         [reload]\nwatch_ms = {}\ntaken_timeout_s = 600\n",
        20 * dice.up_to(2),
        dice.up_to(900),
        dice.up_to(3),
        dice.up_to(30),
    );
    server + &text
}

#[test]
fn random_edits_under_load_lose_nothing() {
    let edits = std::env::var("CORELANE_RELOAD_EDITS").map_or(100, |text| text.parse().unwrap());
    let seed =
        std::env::var("CORELANE_RELOAD_SEED").map_or(20_261_122, |text| text.parse().unwrap());
    let mut dice = Dice(seed);
    let workers = [Worker::start(), Worker::start(), Worker::start()];
    let first = route(LISTEN, TARGET, "") + &instance(&workers[0], "a1", TARGET) + CALM;
    let router = start(&first);
    let (address, path) = router.path(LISTEN);
    let load = Load::start(address, &path, 6);
    let (mut took, mut generation) = (Vec::new(), 1);
    for edit in 0..edits {
        router.rewrite(&some(&mut dice, &workers));
        match dice.up_to(3) {
            0 => router.remove("cores.d/0.toml"),
            1 => router.write("cores.d/0.toml", "[core]\nidle = \"block\"\n"),
            _ => router.write("cores.d/0.toml", "[core]\nconnections_max = 900\n"),
        }
        let began = Instant::now();
        let report = reload(&router);
        took.push(began.elapsed());
        let result = report["result"].as_str().unwrap();
        assert!(
            matches!(result, "applied" | "unchanged"),
            "edit {edit}, seed {seed}: {report}"
        );
        generation += u64::from(result == "applied");
        assert_eq!(report["generation"], generation);
    }
    let (sent, failed) = load.end();
    assert_eq!(failed, 0, "of {sent}, seed {seed}");
    let taken = || {
        workers
            .iter()
            .map(|worker| worker.taken() as u64)
            .sum::<u64>()
    };
    wait_until("the last one is counted", || taken() >= sent);
    assert_eq!(taken(), sent, "each went to one worker");
    took.sort();
    let (median, most) = (took[took.len() / 2], took[took.len() - 1]);
    println!(
        "{edits} edits, {generation} generations, {sent} requests, {failed} lost; \
         an edit took {median:?}, {most:?} at most"
    );
    assert_eq!(
        router.metric(&["corelane_config_generation"]),
        generation as f64
    );
    assert_eq!(router.health()["status"], "ready");
}
