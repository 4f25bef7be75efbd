//! `corelane serve` below a service manager: it is told how the router is, and hands sockets over.

mod lab;

use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use corelane_engine::executor::listen;
use lab::*;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Signal;

const LISTEN: &str = "dynamo/router/generate";
const TARGET: &str = "dynamo/backend/generate";

fn route(options: &str) -> String {
    format!("[[route]]\nlisten = \"{LISTEN}\"\ntarget = \"{TARGET}\"\n{options}\n")
}

/// What a service manager hears.
struct Manager {
    folder: tempfile::TempDir,
    socket: UnixDatagram,
    heard: String,
}

impl Manager {
    fn new() -> Manager {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        socket.set_nonblocking(true).unwrap();
        Manager {
            folder,
            socket,
            heard: String::new(),
        }
    }

    fn path(&self) -> String {
        self.folder.path().join("notify").display().to_string()
    }

    /// All that was said so far.
    fn hears(&mut self) -> &str {
        let mut bytes = [0; 4096];
        loop {
            match self.socket.recv(&mut bytes) {
                Ok(count) => self.heard += std::str::from_utf8(&bytes[..count]).unwrap(),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    return &self.heard;
                }
            }
        }
    }

    /// Whether a line has been said.
    fn has(&mut self, line: &str) -> bool {
        self.hears().lines().any(|said| said == line)
    }

    fn forget(&mut self) {
        self.hears();
        self.heard.clear();
    }
}

#[test]
fn ready_is_said_when_it_serves_and_stopping_as_long_as_it_drains() {
    let mut manager = Manager::new();
    let worker = Worker::start();
    let options = "ack = \"on_accept\"\nack_timeout_ms = 600000";
    let drain = "[drain]\ngrace_s = 0\ntimeout_s = 600\n";
    let text = [route(options), worker.instance(TARGET), drain.into()].concat();
    let mut router = Program::serve(&text, &[("NOTIFY_SOCKET", &manager.path())]);
    wait_until("it is ready", || {
        assert!(router.is_alive(), "{}", router.log());
        manager.has("READY=1")
    });
    assert_eq!(router.get("/health").unwrap().0, 200);
    let served = format!("STATUS=serving 1 routes at {}", router.path(LISTEN).0);
    wait_until("it says what it serves", || manager.has(&served));
    assert!(!manager.hears().contains("WATCHDOG"), "nobody asked for it");

    worker.hold(true);
    let (mut held, path) = router.dial(LISTEN);
    held.send(&path);
    wait_until("the worker has it", || worker.taken() == 1);
    router.signal(Signal::TERM);
    wait_until("it says that it leaves", || manager.has("STOPPING=1"));
    wait_until("and what it waits for", || {
        manager.has("STATUS=draining: 1 requests in flight")
    });
    assert!(
        manager.has("EXTEND_TIMEOUT_USEC=30000000"),
        "{}",
        manager.heard
    );
    worker.hold(false);
    assert_eq!(held.reply(), "");
    assert_eq!(router.ended(), 0);
    let ready = manager.hears().matches("READY=1").count();
    assert_eq!(ready, 1, "{}", manager.heard);
}

#[test]
fn a_reload_is_said_when_it_begins_and_when_it_has_ended() {
    let mut manager = Manager::new();
    let worker = Worker::start();
    let text = |options| [route(options), worker.instance(TARGET)].concat();
    let reload = "[reload]\nwatch_ms = 20\ntaken_timeout_s = 600\n";
    let mut router = Program::serve(&(text("") + reload), &[("NOTIFY_SOCKET", &manager.path())]);
    wait_until("it is ready", || {
        assert!(router.is_alive(), "{}", router.log());
        manager.has("READY=1")
    });
    // One that comes through, and one that is refused.
    for options in ["retries_max = 1", "retries_max = \"x\""] {
        manager.forget();
        router.rewrite(&(text(options) + reload));
        router.signal(Signal::HUP);
        wait_until("it has ended", || manager.has("READY=1"));
        let said = manager.hears();
        let begin = said.find("RELOADING=1\nMONOTONIC_USEC=");
        assert!(begin < said.find("READY=1\n") && begin.is_some(), "{said}");
    }
    assert_eq!(router.health()["generation"], 2);
}

#[test]
fn who_never_serves_never_says_ready() {
    let mut manager = Manager::new();
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let discovery = format!(
        "[discovery]\nbackend = \"etcd\"\nendpoints = [\"{nobody}\"]\nconnect_timeout_s = 1\n"
    );
    let text = [route(""), discovery].concat();
    let mut router = Program::serve(&text, &[("NOTIFY_SOCKET", &manager.path())]);
    assert_eq!(router.ended(), 1, "{}", router.log());
    assert!(!manager.has("READY=1"), "{}", manager.heard);
}

/// A thread of another process that stands still.
struct Frozen(libc::pid_t);

impl Frozen {
    /// Stops the thread with this name; `None` where that is not allowed.
    fn thread(pid: u32, name: &str) -> Option<Frozen> {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let named = tasks.map(|task| task.unwrap().path()).find(|task| {
            std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name)
        });
        let thread: libc::pid_t = named?.file_name()?.to_str()?.parse().ok()?;
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: these calls take no memory of ours.
        let seized = unsafe {
            libc::ptrace(libc::PTRACE_SEIZE, thread, none, none) == 0
                && libc::ptrace(libc::PTRACE_INTERRUPT, thread, none, none) == 0
        };
        if !seized {
            return None;
        }
        let mut status = 0;
        // SAFETY: the status is ours.
        let stopped = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
        assert_eq!(stopped, thread);
        Some(Frozen(thread))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: the call takes no memory of ours.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, none, none) };
    }
}

#[test]
fn signs_of_life_end_with_the_progress_of_one_core() {
    let mut manager = Manager::new();
    let logs = tempfile::tempdir().unwrap();
    let worker = Worker::start();
    let drain = "[drain]\ngrace_s = 0\n[core]\ncpus = \"0\"\n";
    let text = [route(""), worker.instance(TARGET), drain.into()].concat();
    let env = [
        ("NOTIFY_SOCKET", &*manager.path()),
        ("WATCHDOG_USEC", "6000000"),
        ("LOGS_DIRECTORY", logs.path().to_str().unwrap()),
    ];
    let mut router = Program::serve(&text, &env);
    router.ready();
    let (mut caller, path) = router.dial(LISTEN);
    assert_eq!(caller.ask(&path), "");
    let beats = |manager: &mut Manager| manager.hears().matches("WATCHDOG=1").count();
    wait_until("it lives, and goes on living", || beats(&mut manager) >= 2);

    let Some(frozen) = Frozen::thread(router.child.id(), "shard-0") else {
        eprintln!("left out: no thread of another process can be stopped here");
        return;
    };
    wait_until("it is noticed", || {
        router.metric(&["corelane_process_stuck "]) == 1.0
    });
    assert!(
        router.log().contains("core 0 makes no progress"),
        "{}",
        router.log()
    );
    manager.forget();
    wait_until("the records are saved", || {
        router.log().contains("flight records saved")
    });
    assert_eq!(beats(&mut manager), 0, "{}", manager.heard);
    drop(frozen);
    wait_until("it lives again", || beats(&mut manager) > 0);
    wait_until("that is said", || router.log().contains("core 0 goes on"));

    let saved = std::fs::read_dir(logs.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let saved = saved.path().display().to_string();
    let mut dump = Program::command(&["dump", &saved, "--json"]);
    assert_eq!(dump.ended(), 0, "{}", dump.log());
    for kind in ["begun", "routed", "forwarded", "answered", "replied"] {
        let word = format!("\"kind\":\"{kind}\"");
        assert_eq!(
            dump.out().matches(&word).count(),
            1,
            "{kind}: {}",
            dump.out()
        );
    }
    router.signal(Signal::TERM);
    assert_eq!(router.ended(), 0);
}

/// CPUs that the shards of these tests may have: two, where one more is left for control.
fn cpus() -> Vec<usize> {
    let mut cpus = corelane_engine::placement::affinity().unwrap();
    cpus.truncate(cpus.len().saturating_sub(1).clamp(1, 2));
    cpus
}

fn on_cpus(cpus: &[usize]) -> String {
    let cpus: Vec<String> = cpus.iter().map(ToString::to_string).collect();
    format!(
        "[drain]\ngrace_s = 0\n[core]\ncpus = \"{}\"\n",
        cpus.join(",")
    )
}

/// Sockets to be handed over.
struct Sockets(Vec<TcpListener>);

impl Sockets {
    fn new(sockets: Vec<TcpListener>) -> Sockets {
        for socket in &sockets {
            fcntl_setfd(socket, FdFlags::empty()).unwrap();
        }
        Sockets(sockets)
    }

    /// A router that has them from descriptor 3 on.
    fn serve(&self, names: &str, text: &str) -> Program {
        let mut script = String::new();
        // Over 100 first: a descriptor must not be overwritten before it is moved.
        for (index, socket) in self.0.iter().enumerate() {
            script += &format!("exec {}<&{}; ", 100 + index, socket.as_raw_fd());
        }
        for index in 0..self.0.len() {
            script += &format!("exec {}<&{from} {from}<&-; ", 3 + index, from = 100 + index);
        }
        script += "export LISTEN_PID=$$; exec \"$@\"";
        let count = self.0.len().to_string();
        let env = [("LISTEN_FDS", &*count), ("LISTEN_FDNAMES", names)];
        Program::wrapped(&["/bin/bash", "-c", &script, "bash"], text, &env)
    }

    fn port(&self, index: usize) -> u16 {
        self.0[index].local_addr().unwrap().port()
    }
}

#[test]
fn handed_sockets_are_served_and_outlive_the_router() {
    let worker = Worker::start();
    let text = [route(""), worker.instance(TARGET), on_cpus(&cpus())].concat();
    let any = || TcpListener::bind("127.0.0.1:0").unwrap();
    let sockets = Sockets::new(vec![any(), any()]);
    let mut router = sockets.serve("requests:status", &text);
    router.status_port = sockets.port(1);
    router.ready();
    let (address, path) = router.path(LISTEN);
    assert_eq!(address.port(), sockets.port(0));
    for _ in 0..20 {
        assert_eq!(Caller::dial(address).ask(&path), "");
    }
    router.signal(Signal::TERM);
    assert_eq!(router.ended(), 0, "{}", router.log());

    // Nobody is there, and nobody is refused.
    let mut early = Caller::dial(address);
    early.send(&path);
    let mut next = sockets.serve("requests:status", &text);
    next.status_port = sockets.port(1);
    next.ready();
    assert_eq!(early.reply(), "");
    assert_eq!(worker.taken(), 21);
}

#[test]
fn with_a_socket_for_each_core_every_one_is_served() {
    let worker = Worker::start();
    let cpus = cpus();
    let text = [route(""), worker.instance(TARGET), on_cpus(&cpus)].concat();
    let first = listen("127.0.0.1:0".parse().unwrap(), true, false).unwrap();
    let address = first.local_addr().unwrap();
    let more = cpus
        .iter()
        .skip(1)
        .map(|_| listen(address, true, false).unwrap());
    let sockets = Sockets::new(std::iter::once(first).chain(more).collect());
    let mut router = sockets.serve("", &text);
    router.ready();
    let (told, path) = router.path(LISTEN);
    assert_eq!(told, address);
    // A socket that nobody accepts from would leave some without an answer.
    let mut callers: Vec<Caller> = (0..40).map(|_| Caller::dial(address)).collect();
    callers.iter_mut().for_each(|caller| caller.send(&path));
    assert!(callers.iter_mut().all(|caller| caller.reply().is_empty()));
}

#[test]
fn sockets_that_make_no_sense_are_named() {
    let any = || TcpListener::bind("127.0.0.1:0").unwrap();
    let text = [route(""), on_cpus(&cpus()[..1])].concat();
    let shared = listen("127.0.0.1:0".parse().unwrap(), true, false).unwrap();
    let again = listen(shared.local_addr().unwrap(), true, false).unwrap();
    let connected = std::net::TcpStream::connect(shared.local_addr().unwrap()).unwrap();
    let connected = TcpListener::from(std::os::fd::OwnedFd::from(connected));
    for (sockets, names, words) in [
        (vec![any()], "other", "FileDescriptorName=requests"),
        (vec![any(), any()], "requests:requests", "write one address"),
        (
            vec![shared, again],
            "requests:requests",
            "2 sockets for the requests of 1 data cores",
        ),
        (vec![connected], "requests", "no listening TCP socket"),
    ] {
        let mut router = Sockets::new(sockets).serve(names, &text);
        assert_eq!(router.ended(), 2, "{names}: {}", router.log());
        assert!(router.log().contains(words), "{words}: {}", router.log());
    }
}

#[test]
fn a_running_router_is_asked_for_its_last_records() {
    let worker = Worker::start();
    let text = [route(""), worker.instance(TARGET), on_cpus(&cpus()[..1])].concat();
    let mut router = Program::serve(&text, &[]);
    router.ready();
    let (mut caller, path) = router.dial(LISTEN);
    assert_eq!(caller.ask(&path), "");
    assert!(
        caller
            .ask("0/no/such/one")
            .starts_with("Server unavailable")
    );
    wait_until("the answer is counted", || {
        router.metric(&["corelane_accepted_upstream_total"]) == 1.0
    });
    let status = format!("127.0.0.1:{}", router.status_port);
    let dumped = |more: &[&str]| {
        let line = [&["dump", "--status", &*status, "--last", "60m"], more].concat();
        let mut dump = Program::command(&line);
        assert_eq!(dump.ended(), 0, "{}", dump.log());
        dump.out()
    };
    let text = dumped(&[]);
    for word in [
        "begun      request 0, route 0",
        "instance a1",
        "answer accepted",
        "reply accepted",
        "why unknown_endpoint",
        "side downstream",
        "order directory",
    ] {
        assert!(text.contains(word), "{word}\n{text}");
    }
    let lines = dumped(&["--json", "--core", "0"]);
    let records: Vec<serde_json::Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let times: Vec<u64> = records
        .iter()
        .map(|one| one["unix_ns"].as_u64().unwrap())
        .collect();
    assert!(times.is_sorted() && times.len() >= 9, "{lines}");

    let mut nobody = Program::command(&["dump", "--status", &format!("127.0.0.1:{}", free_port())]);
    assert_eq!(nobody.ended(), 1);
    assert!(
        nobody.log().contains("name its status server"),
        "{}",
        nobody.log()
    );
    let mut none = Program::command(&["dump", "--status", &status, "--core", "7"]);
    assert_eq!(none.ended(), 1);
    assert!(
        none.log().contains("there is no core 7; there are 1"),
        "{}",
        none.log()
    );
}
