//! `corelane gms` and `[gpu]` of `serve` as engines and operators meet them: real processes, real
//! sockets, killed and stopped. Lines of the conformance list (`spec/gpu-memory.md`, appendix B)
//! that concern processes are named; the others are in `gpu-mem/tests/`.

mod lab;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use corelane_gpu_mem::backend::choice::{self, BackendChoice};
use corelane_gpu_mem::backend::host::HostConfig;
use corelane_gpu_mem::client::{ClientError, Dial, Session, runtime_state};
use corelane_gpu_mem::lock::{Grant, LockType, State};
use lab::*;
use rustix::process::Signal;

/// Names the socket for the writer that this program plays when it is started again.
const ROLE: &str = "CORELANE_TEST_GMS_WRITER";

/// `corelane gms` on host memory, with its sockets in a folder of its own.
struct Service {
    program: Program,
    folder: tempfile::TempDir,
}

impl Service {
    fn start(more: &[&str]) -> Service {
        Service::start_in(tempfile::tempdir().unwrap(), more)
    }

    fn start_in(folder: tempfile::TempDir, more: &[&str]) -> Service {
        let dir = folder.path().to_string_lossy().into_owned();
        let line = [
            "gms",
            "--backend",
            "host",
            "--socket-dir",
            &dir,
            "--status-port",
            "0",
        ];
        let mut program = Program::command(&[&line, more].concat());
        let out = program.says("/metrics\n");
        let port = out.split("127.0.0.1:").nth(1).unwrap().split('/').next();
        program.status_port = port.unwrap().parse().unwrap();
        Service { program, folder }
    }

    fn socket(&self, device: u8, tag: &str) -> PathBuf {
        socket(self.folder.path(), device, tag)
    }

    fn dial(&self) -> Dial {
        Dial::new(self.socket(0, "weights"))
    }

    fn until(&self, state: State) {
        let dial = self.dial();
        wait_until("the pool is in the state", || {
            runtime_state(&dial).unwrap().state == state
        });
    }

    /// What `/metrics` says of the pool of weights of device 0.
    fn weights(&self, name: &str) -> f64 {
        let name = format!("corelane_gpu_mem_{name}{{");
        self.program.metric(&[&name, "0000\"", "tag=\"weights\""])
    }
}

fn socket(folder: &Path, device: u8, tag: &str) -> PathBuf {
    folder.join(format!(
        "gms_GPU-00000000-0000-0000-0000-00000000000{device}_{tag}.sock"
    ))
}

fn open(dial: &Dial, lock_type: LockType) -> Result<Session, ClientError> {
    Session::open(dial, lock_type, Some(PATIENCE))
}

fn publish(dial: &Dial) {
    let mut writer = open(dial, LockType::RwOrRo).unwrap();
    let made = writer.allocate(5, "weights").unwrap();
    writer
        .put("layer.0", &made.allocation_id, 0, b"{}")
        .unwrap();
    writer.commit().unwrap();
}

/// A process that holds the lock of a socket for writing, until it is killed.
fn writer(socket: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_writer_is_played", "--nocapture"])
        .env(ROLE, socket)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("holding") {
        line.clear();
        assert_ne!(std::io::BufRead::read_line(&mut out, &mut line).unwrap(), 0);
    }
    child
}

#[test]
fn a_writer_is_played() {
    let Some(socket) = std::env::var_os(ROLE) else {
        return;
    };
    let mut session = open(&Dial::new(socket), LockType::Rw).unwrap();
    session.allocate(1, "weights").unwrap();
    println!("holding");
    loop {
        std::thread::park();
    }
}

fn corelane(args: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command
        .args(args)
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn many_devices_and_pools_are_served_and_counted() {
    let mut service = Service::start(&["--device", "0-1", "--generation", "both"]);
    let out = service.program.out();
    assert_eq!(out.matches("(host memory)").count(), 8, "{out}");
    service.program.ready();
    let dial = service.dial();
    assert_eq!(runtime_state(&dial).unwrap().state, State::Empty);
    publish(&dial);
    let reader = open(&dial, LockType::RwOrRo).unwrap();
    assert_eq!(reader.grant(), Grant::Ro);
    let pool = |words: &[&str]| service.program.metric(words);
    wait_until("the scrape shows the reader", || {
        service.weights("readers") == 1.0
    });
    for (name, value) in [
        ("commits_total", 1.0),
        ("grants_writer_total", 1.0),
        ("grants_reader_total", 1.0),
        ("aborts_total", 0.0),
        ("allocation_oom_total", 0.0),
        ("allocations_held", 1.0),
        ("bytes_held", 2_097_152.0),
        ("writer_pid", 0.0),
    ] {
        assert_eq!(service.weights(name), value, "{name}");
    }
    assert_eq!(
        pool(&["corelane_gpu_mem_state{", "weights", "0000\"", "\"RO\""]),
        1.0
    );
    assert_eq!(
        pool(&["corelane_gpu_mem_state{", "kv_cache"]),
        4.0,
        "one state of each pool"
    );
    assert_eq!(
        pool(&[
            "corelane_gpu_mem_pool_info{",
            "0001\"",
            "second",
            "kv_cache"
        ]),
        1.0
    );
    assert_eq!(pool(&["corelane_gpu_mem_up"]), 1.0);
    let other = Dial::new(service.socket(1, "weights"));
    assert_eq!(
        runtime_state(&other).unwrap().state,
        State::Empty,
        "devices are apart"
    );
}

#[test]
fn b10_a_killed_writer_makes_room_for_the_one_that_waits() {
    let service = Service::start(&[]);
    let dial = service.dial();
    let mut first = writer(&service.socket(0, "weights"));
    wait_until("the scrape shows the writer", || {
        service.weights("writer_pid") == f64::from(first.id())
    });
    let waiting = std::thread::spawn(move || open(&dial, LockType::Rw).map(|held| held.grant()));
    wait_until("the other one waits", || {
        service.weights("waiting_writers") == 1.0
    });
    first.kill().unwrap();
    first.wait().unwrap();
    assert_eq!(waiting.join().unwrap().unwrap(), Grant::Rw);
    service.until(State::Empty);
    let probed = corelane(&[
        "gms",
        "probe",
        "--history",
        "--json",
        &service.socket(0, "weights").to_string_lossy(),
    ]);
    let state: serde_json::Value = serde_json::from_slice(&probed.stdout).unwrap();
    assert_eq!(
        (state["state"].as_str(), state["allocations"].as_u64()),
        (Some("EMPTY"), Some(0))
    );
    let events = state["events"].as_array().unwrap();
    let kinds: Vec<_> = events
        .iter()
        .map(|event| event["kind"].as_str().unwrap())
        .collect();
    let life = ["rw_connected", "rw_aborted", "allocations_cleared"];
    assert_eq!(kinds, [life, life].concat());
    assert_eq!(events[0]["pid"].as_u64(), Some(first.id().into()));
    assert_eq!(service.weights("aborts_total"), 2.0);
    // Who, from where to where, and when; the log is written in a pause.
    let uid = rustix::process::getuid().as_raw();
    let words = [
        "RW_ABORT".to_owned(),
        format!("pid={} uid={uid}", first.id()),
        "from=RW to=EMPTY".to_owned(),
        "unix_ms=1".to_owned(),
    ];
    wait_until("the audit is in the log", || {
        let log = service.program.log();
        log.lines()
            .any(|line| words.iter().all(|word| line.contains(word)))
    });
}

#[test]
fn b24_a_stop_tells_waiters_and_a_kill_leaves_sockets_that_are_replaced() {
    let mut service = Service::start(&[]);
    let path = service.socket(0, "weights");
    publish(&service.dial());
    let second = corelane(&[
        "gms",
        "--backend",
        "host",
        "--socket-path",
        &path.to_string_lossy(),
        "--tag",
        "weights",
    ]);
    assert_eq!(second.status.code(), Some(1));
    assert!(
        text(&second.stderr).contains("already running"),
        "{}",
        text(&second.stderr)
    );
    service.program.signal(Signal::KILL);
    let _ = service.program.child.wait();
    assert!(path.exists(), "nobody was there to remove it");

    let Service { folder, program } = service;
    drop(program);
    let mut service = Service::start_in(folder, &[]);
    let dial = service.dial();
    assert_eq!(
        runtime_state(&dial).unwrap().state,
        State::Empty,
        "memory went with its owner"
    );
    let waiting = std::thread::spawn(move || open(&dial, LockType::Ro).map(|held| held.grant()));
    wait_until("a reader waits", || service.weights("waiters") == 1.0);
    service.program.signal(Signal::TERM);
    assert_eq!(service.program.ended(), 0);
    let told = waiting.join().unwrap();
    assert!(
        matches!(told, Err(ClientError::NotGranted { committed: false })),
        "{told:?}"
    );
    assert_eq!(std::fs::read_dir(service.folder.path()).unwrap().count(), 0);
}

#[test]
fn probes_find_pools_and_say_whether_they_are_ready() {
    let service = Service::start(&["--tag", "weights"]);
    let folder = service.folder.path().to_string_lossy().into_owned();
    let probe = |more: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command
            .args(["gms", "probe"])
            .args(more)
            .env_clear()
            .env("GMS_SOCKET_DIR", &folder);
        command.output().unwrap()
    };
    let ready = probe(&["--ready"]);
    assert_eq!(ready.status.code(), Some(1));
    assert!(
        text(&ready.stdout).contains("EMPTY"),
        "{}",
        text(&ready.stdout)
    );
    assert!(text(&ready.stderr).contains("nothing is published"));
    publish(&service.dial());
    let ready = probe(&["--ready", "--history"]);
    assert_eq!(ready.status.code(), Some(0), "{}", text(&ready.stderr));
    let said = text(&ready.stdout);
    assert!(said.contains("COMMITTED, readers 0, waiting 0, allocations 1 of 2097152 bytes"));
    assert!(
        said.contains("rw_connected") && said.contains("committed"),
        "{said}"
    );
    let nowhere = probe(&["/no/such/socket", "--timeout-ms", "50"]);
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(text(&nowhere.stderr).contains("cannot reach the service on /no/such/socket"));
}

#[test]
fn strangers_are_turned_away_and_bad_usage_is_two() {
    let stranger = rustix::process::getuid().as_raw() + 1;
    let service = Service::start(&["--uid", &stranger.to_string()]);
    assert!(open(&service.dial(), LockType::Rw).is_err());
    wait_until("it is counted", || {
        service.weights("connections_refused_total") == 1.0
    });
    for (line, said) in [
        (vec!["--backend", "rocm"], "unknown backend \"rocm\""),
        (
            vec!["--device", "0-1", "--gpu-uuid", "x"],
            "--gpu-uuid names one device",
        ),
        (
            vec!["--backend", "host", "--socket-path", "/x"],
            "--socket-path names one socket",
        ),
        (vec!["--config", "/no/such/file"], "cannot be read"),
    ] {
        let output = corelane(&[&["gms"], line.as_slice()].concat());
        assert_eq!(
            output.status.code(),
            Some(2),
            "{line:?}: {}",
            text(&output.stderr)
        );
        assert!(
            text(&output.stderr).contains(said),
            "{}",
            text(&output.stderr)
        );
    }
}

#[test]
fn b30_without_a_driver_cuda_is_78_and_auto_is_host_memory() {
    if choice::open(BackendChoice::Cuda, 0, HostConfig::default()).is_ok() {
        println!("left out: this machine has a GPU");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_string_lossy();
    let demanded = corelane(&["gms", "--backend", "cuda", "--socket-dir", &dir]);
    assert_eq!(
        demanded.status.code(),
        Some(78),
        "{}",
        text(&demanded.stderr)
    );
    let said = text(&demanded.stderr);
    assert!(said.contains("GPU memory of device 0: "), "{said}");
    assert!(
        !said.contains("panic") && demanded.stdout.is_empty(),
        "{said}"
    );
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    let mut auto = Program::command(&["gms", "--socket-dir", &dir]);
    auto.says("(host memory)");
    assert!(
        auto.log().contains("serving host memory, not a GPU's: "),
        "{}",
        auto.log()
    );
}

#[test]
fn serve_lends_memory_beside_its_routes_until_it_has_drained() {
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "[gpu]\ndevices = 0\nbackend = \"host\"\nsocket_dir = {:?}\n[drain]\ngrace_s = 0\n\
         [[route]]\nlisten = \"a/b/c\"\ntarget = \"a/w/c\"\n",
        folder.path()
    );
    let mut router = Program::serve(&config, &[]);
    let dial = Dial::new(socket(folder.path(), 0, "weights"));
    publish(&dial);
    wait_until("both are in one scrape", || {
        let (_, text) = router.get("/metrics").unwrap_or_default();
        text.contains("corelane_gpu_mem_commits_total") && text.contains("corelane_route_instances")
    });
    assert_eq!(
        router.metric(&["corelane_gpu_mem_commits_total{", "tag=\"weights\""]),
        1.0
    );
    let (_, metrics) = router.get("/metrics").unwrap();
    assert!(metrics.ends_with("# EOF\n") && metrics.matches("# EOF").count() == 1);
    router.signal(Signal::TERM);
    assert_eq!(router.ended(), 0);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_log_that_nobody_reads_holds_up_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_string_lossy();
    let mut child = Command::new(PROGRAM)
        .args(["gms", "--backend", "host", "--socket-dir", &dir])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = child.stderr.take().unwrap();
    rustix::pipe::fcntl_setpipe_size(&log, 4096).unwrap();
    let path = socket(folder.path(), 0, "weights");
    wait_until("it listens", || {
        UnixStream::connect(&path).is_ok() || !matches!(child.try_wait(), Ok(None))
    });
    // Some lines for each: far more than the pipe takes.
    let dial = Dial::new(&path);
    for _ in 0..100 {
        drop(open(&dial, LockType::Rw).unwrap());
    }
    let told = std::thread::spawn(move || {
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(log));
        let words = ["WARN", "missed=", "lines of the log were dropped"];
        lines.any(|line| line.is_ok_and(|line| words.iter().all(|word| line.contains(word))))
    });
    wait_until("somebody reads again, and is told", || {
        drop(open(&dial, LockType::Rw).unwrap());
        told.is_finished()
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(told.join().unwrap());
}

#[test]
fn an_independent_peer_finds_every_answer_right() {
    let Some(python) = std::env::var_os("CORELANE_TEST_PYTHON").filter(|path| !path.is_empty())
    else {
        println!("left out: CORELANE_TEST_PYTHON names no interpreter that has msgspec");
        return;
    };
    let service = Service::start(&["--generation", "both"]);
    let names = tempfile::tempdir().unwrap();
    let second = service.folder.path().join("gms_0_weights.sock");
    for (name, socket) in [
        ("weights.sock", service.socket(0, "weights")),
        ("kv_cache.sock", service.socket(0, "kv_cache")),
        ("weights-v2.sock", second),
    ] {
        std::os::unix::fs::symlink(socket, names.path().join(name)).unwrap();
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gpu-mem/tests/peer/peer.py");
    let done = Command::new(python)
        .arg(script)
        .arg(names.path())
        .output()
        .unwrap();
    let said = text(&done.stdout) + &text(&done.stderr);
    assert!(
        done.status.success() && said.contains("all answers were right"),
        "{said}"
    );
}
