//! `corelane top` and `corelane explain` beside a real `corelane serve`.

mod lab;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, spawn};

use lab::{Program, Worker, free_port, wait_for, wait_until};

/// Sends requests to an endpoint until it is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    fn on(router: &Program, endpoint: &str) -> Load {
        let (mut caller, path) = router.dial(endpoint);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let send = move || {
            while !stopped.load(Ordering::Relaxed) {
                assert_eq!(caller.ask(&path), "");
            }
        };
        let thread = Some(spawn(send));
        Load { stop, thread }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            joined.unwrap().unwrap();
        }
    }
}

/// What a command prints, and its exit code.
fn run(router: &Program, args: &[&str]) -> (String, String, i32) {
    let address = format!("127.0.0.1:{}", router.status_port);
    let mut command = Program::command(&[args, &["--address", &address]].concat());
    let code = command.ended();
    (command.out(), command.log(), code)
}

fn top(router: &Program, args: &[&str]) -> String {
    let (out, log, code) = run(router, &[&["top", "--once"], args].concat());
    assert_eq!(code, 0, "{log}");
    out
}

fn explain(router: &Program, args: &[&str]) -> (String, i32) {
    // A core of a busy machine may stand still for longer than it is waited for.
    wait_for("the core answers", || {
        let (out, log, code) = run(router, &[&["explain", "route"], args].concat());
        let said = out + &log;
        (!said.contains("does not answer; ")).then_some((said, code))
    })
}

/// The line that begins with this, in words.
fn words<'a>(page: &'a str, begin: &str) -> Vec<&'a str> {
    found(page, begin).unwrap_or_else(|| panic!("no {begin} in\n{page}"))
}

fn found<'a>(page: &'a str, begin: &str) -> Option<Vec<&'a str>> {
    let mut lines = page.lines().map(str::trim_start);
    let line = lines.find(|line| line.starts_with(begin))?;
    Some(line.split_whitespace().collect())
}

/// An instance that nobody is behind.
fn dead(endpoint: &str) -> String {
    let port = free_port();
    format!(
        "[[instance]]\nendpoint = \"{endpoint}\"\naddress = \"127.0.0.1:{port}/dead/{endpoint}\"\n"
    )
}

fn instance(worker: &Worker, endpoint: &str, id: u64) -> String {
    let address = worker.address;
    format!("[[instance]]\nendpoint = \"{endpoint}\"\naddress = \"{address}/{id:x}/{endpoint}\"\n")
}

#[test]
fn top_shows_a_router_under_load() {
    let (one, two) = (Worker::start(), Worker::start());
    let text = format!(
        "[[route]]\nlisten = \"t/router/g\"\ntarget = \"t/w/g\"\n\
         policy = \"round_robin\"\nack = \"on_accept\"\n\
         {}{}{}[core]\ncpus = \"0\"\nbuffers = 1024\n",
        instance(&one, "t/w/g", 0xa1),
        instance(&two, "t/w/g", 0xa2),
        dead("t/w/g"),
    );
    let mut router = Program::serve(&text, &[]);
    router.ready();
    let _load = Load::on(&router, "t/router/g");
    // However slow this machine is, at some time requests are seen to pass.
    let page = wait_for("requests are seen", || {
        let page = top(&router, &["--interval", "0.5"]);
        // Instances of a core that does not answer in time are not on the page.
        let passing = |begin: &str, column: usize| {
            let rate = found(&page, begin).map(|words| words[column].parse::<f64>().unwrap_or(1.0));
            rate.is_some_and(|rate| rate > 0.0)
        };
        let all = passing("0 ", 4) && passing("a1 ", 2) && passing("a2 ", 2);
        let is_whole = all && words(&page, "0 ")[3] != "still" && words(&page, "0 ")[5] != "-";
        is_whole.then_some(page)
    });
    assert!(page.starts_with("corelane "), "{page}");
    assert!(page.contains("/s requests, 0/s refused, "), "{page}");
    let core = words(&page, "0 ");
    assert!(["hot", "warm", "cold"].contains(&core[3]), "{page}");
    assert!(
        core[5].ends_with('s') && core[6].ends_with('s'),
        "hops: {page}"
    );
    assert!(
        core[7].parse::<f64>().unwrap() > 0.0,
        "system calls: {page}"
    );
    assert!(core[8].ends_with("/1024"), "buffers: {page}");
    let route = words(&page, "t/router/g");
    assert_eq!((route[6], route[7]), ("2/3", "round_robin"), "{page}");
    for worker in ["a1 ", "a2 "] {
        assert_eq!(words(&page, worker).last(), Some(&"ready"), "{page}");
    }
    assert_eq!(words(&page, "dead ").last(), Some(&"unreachable"), "{page}");
    let plane = words(&page, "discovery").join(" ");
    let said = "discovery memory, identity 0, 1 of 1 routes registered";
    assert_eq!(plane, said);
    assert!(
        page.lines().all(|line| line.chars().count() <= 80),
        "{page}"
    );
    // What scripts want: one view, wide.
    let page = top(
        &router,
        &["--interval", "0.1", "--view", "routes", "--width", "120"],
    );
    assert!(
        !page.contains("CORE CPU") && page.contains(&one.address.to_string()),
        "{page}"
    );
}

#[test]
fn who_is_not_there_is_said() {
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    for args in [
        &["top", "--once", "--address", &address][..],
        &["explain", "route", "--path", "a/b/c", "--address", &address],
    ] {
        let mut command = Program::command(args);
        assert_eq!(command.ended(), 1);
        let log = command.log();
        assert!(
            log.contains(&address) && log.contains("--address HOST:PORT"),
            "{log}"
        );
    }
}

#[test]
fn a_top_without_a_terminal_says_what_to_do() {
    let mut command = Program::command(&["top"]);
    assert_eq!(command.ended(), 2);
    assert!(command.log().contains("--once"), "{}", command.log());
}

const POLICIES: [&str; 7] = [
    "round_robin",
    "random",
    "power_of_two_choices",
    "least_loaded",
    "direct",
    "hash",
    "kv",
];

/// A router with a route for each policy, before two workers and one that is not there.
fn all_policies(workers: [&Worker; 2]) -> Program {
    let mut text = String::new();
    for policy in POLICIES {
        let header = match policy {
            "direct" | "hash" => "header = \"x-who\"\n",
            _ => "",
        };
        text += &format!(
            "[[route]]\nlisten = \"t/router/{policy}\"\ntarget = \"t/w/g\"\n\
             policy = \"{policy}\"\n{header}"
        );
    }
    text += &instance(workers[0], "t/w/g", 0xa1);
    text += &instance(workers[1], "t/w/g", 0xa2);
    text += &dead("t/w/g");
    text += "[core]\ncpus = \"0\"\nbuffers = 1024\n";
    let mut router = Program::serve(&text, &[]);
    router.ready();
    // Until the first attempt has failed it is waited for, as the others are.
    wait_until("nobody is there", || {
        let (said, _) = explain(&router, &["--path", "t/router/round_robin"]);
        said.contains("there is no connection to it")
    });
    router
}

/// Policy, header, what is said of the chosen one, and of the other one.
const SAID: [(&str, &str, &str, &str); 8] = [
    (
        "round_robin",
        "x=y",
        "it is next in turn",
        "its turn comes later",
    ),
    ("random", "x=y", "drawn by chance", "not drawn this time"),
    (
        "power_of_two_choices",
        "x=y",
        "drawn by chance, and not more loaded",
        "not drawn this time",
    ),
    (
        "least_loaded",
        "x=y",
        "it has the least load: 0",
        "ties go by chance",
    ),
    (
        "direct",
        "x-who=a2",
        "the header x-who names it",
        "not the one that is asked for",
    ),
    (
        "hash",
        "x-who=alice",
        "it scores highest",
        "it scores lower",
    ),
    (
        "hash",
        "x=y",
        "the request has no header x-who",
        "its turn comes later",
    ),
    ("kv", "x=y", "it costs least: 0", "ties go by chance"),
];

#[test]
fn every_policy_is_explained() {
    let (one, two) = (Worker::start(), Worker::start());
    let router = all_policies([&one, &two]);
    for (policy, header, all, other) in SAID {
        let path = format!("t/router/{policy}");
        let (said, code) = explain(&router, &["--path", &path, "--header", header]);
        assert_eq!(code, 0, "{policy}: {said}");
        let head = format!("{path} -> t/w/g, policy {policy}, core 0\n");
        assert!(said.starts_with(&head), "{said}");
        let chosen: Vec<&str> = said.lines().filter(|line| line.starts_with("* ")).collect();
        assert!(
            chosen.len() == 1 && chosen[0].contains(all),
            "{policy}: {said}"
        );
        let rest = said.lines().filter(|line| line.starts_with("  a"));
        assert!(rest.clone().count() == 1, "{policy}: {said}");
        assert!(
            rest.clone().all(|line| line.contains(other)),
            "{policy}: {said}"
        );
        let dead = said.lines().find(|line| line.starts_with("  dead "));
        let why = "there is no connection to it";
        assert!(
            dead.is_some_and(|line| line.contains(why)),
            "{policy}: {said}"
        );
        if policy == "direct" {
            assert!(said.contains("goes to a2: "), "{said}");
        }
    }
    // Asking changes nothing: nobody has got a request, and the turn is the same as before.
    assert_eq!((one.taken(), two.taken()), (0, 0));
    let turn = || explain(&router, &["--path", "t/router/round_robin"]).0;
    assert_eq!(turn(), turn());
}

#[test]
fn a_choice_is_what_happens_and_nobody_is_told_why() {
    let (one, two) = (Worker::start(), Worker::start());
    let router = all_policies([&one, &two]);
    // The path as it stands in frames, with the address of the router before it.
    let (address, path) = router.path("t/router/round_robin");
    let whole = format!("{address}/{path}");
    for _ in 0..4 {
        let (json, code) = explain(&router, &["--path", &whole, "--json"]);
        assert_eq!(code, 0, "{json}");
        let json = json.lines().find(|line| line.starts_with('{')).unwrap();
        let said: serde_json::Value = serde_json::from_str(json).unwrap();
        let before = (one.taken(), two.taken());
        let (mut caller, path) = router.dial("t/router/round_robin");
        assert_eq!(caller.ask(&path), "");
        let after = wait_for("a worker takes it", || {
            let after = (one.taken(), two.taken());
            (after != before).then_some(after)
        });
        let taker = if after.0 > before.0 { "a1" } else { "a2" };
        assert_eq!(said["chosen"], taker, "{said}");
    }
    for (header, why) in [
        ("x-who=dead", "the one that is asked for gets nothing now"),
        (
            "x-who=77",
            "the header x-who asks for 77, which discovery does not know",
        ),
        ("x=y", "the header x-who is missing, or names no instance"),
    ] {
        let (said, code) = explain(&router, &["--path", "t/router/direct", "--header", header]);
        assert_eq!(code, 1, "{said}");
        assert!(said.contains(&format!("goes to nobody: {why}\n")), "{said}");
    }
    let (said, code) = explain(&router, &["--path", "t/router/none"]);
    assert_eq!(code, 1);
    assert!(
        said.contains("no route has the path t/router/none"),
        "{said}"
    );
    assert!(said.contains("t/router/hash"), "{said}");
    let (said, code) = explain(&router, &["--path", "t/router/kv", "--core", "9"]);
    assert!(
        code == 1 && said.contains("there is no core 9; there are 1"),
        "{said}"
    );
}
