//! `corelane doctor` as a shell sees it, on problems that are really there: a seccomp filter,
//! limits, a quota, a worker with Nagle's algorithm, an etcd whose clock is wrong.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use corelane_codec::{Decoded, reply_frame, request_frame};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_corelane");
/// Longest wait for anything; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(90);

/// A folder with a configuration.
struct Config {
    folder: tempfile::TempDir,
}

impl Config {
    /// With this text below a route.
    fn new(text: &str) -> Self {
        let route = "[[route]]\nlisten = \"a/r/e\"\ntarget = \"a/b/e\"\n";
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(
            folder.path().join("corelane.toml"),
            format!("{text}\n{route}"),
        )
        .unwrap();
        Self { folder }
    }

    fn path(&self) -> String {
        let path = self.folder.path().join("corelane.toml");
        path.to_string_lossy().into_owned()
    }

    /// Runs `WRAP... corelane doctor --config ... --json`.
    fn doctor(&self, wrap: &[&str], more: &[&str]) -> (i32, Value) {
        let path = self.path();
        let own = [
            PROGRAM,
            "doctor",
            "--config",
            &path,
            "--json",
            "--timeout-s",
            "300",
        ];
        let line = [wrap, &own[..], more].concat();
        let output = run(&line);
        let (out, log) = (text(&output.stdout), text(&output.stderr));
        let report = serde_json::from_str(&out);
        let report = report.unwrap_or_else(|error| panic!("{error}: {out}\n{log}"));
        (output.status.code().unwrap(), report)
    }
}

fn run(line: &[&str]) -> Output {
    let mut command = Command::new(line[0]);
    let path = std::env::var_os("PATH").unwrap_or_default();
    command.args(&line[1..]).env_clear().env("PATH", path);
    command.stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The findings of a check.
fn found(report: &Value, check: &str) -> Vec<Value> {
    let findings = report["findings"].as_array().unwrap().iter();
    findings
        .filter(|finding| finding["check"] == check)
        .cloned()
        .collect()
}

/// The one finding of a check; panics when there is none.
#[track_caller]
fn one(report: &Value, check: &str) -> Value {
    let found = found(report, check);
    assert_eq!(found.len(), 1, "{check}: {report:#}");
    found[0].clone()
}

/// That it was measured and where, and what to do.
#[track_caller]
fn says(finding: &Value, evidence: &str, at: &str, remedy: &str) {
    let seen = finding["evidence"].as_array().unwrap().iter();
    let has = |one: &Value| {
        let word = |key: &str| one[key].as_str().unwrap().to_owned();
        word("value").contains(evidence) && word("at").contains(at)
    };
    assert!(seen.clone().any(has), "{finding:#}");
    assert!(
        finding["remedy"].as_str().unwrap().contains(remedy),
        "{finding:#}"
    );
}

/// A check that is well, or unseen: what it said.
fn other(report: &Value, list: &str, check: &str) -> Option<String> {
    let found = report[list].as_array().unwrap().iter();
    let mut found = found.filter(|one| one["check"] == check);
    let one = found.next()?;
    one["what"]
        .as_str()
        .or(one["why"].as_str())
        .map(str::to_owned)
}

#[test]
fn every_check_answers_and_the_exit_code_says_how() {
    let config = Config::new("");
    let (code, report) = config.doctor(&[], &[]);
    assert_eq!(report["schema"], "corelane.doctor/1");
    assert_eq!(report["config"], config.path());
    let fault = |finding: &Value| finding["weight"] != "hint";
    let ok = !report["findings"].as_array().unwrap().iter().any(fault);
    assert_eq!((report["ok"] == true, code == 0), (ok, ok), "{report:#}");
    for check in corelane::doctor::CHECKS {
        let name = check.name;
        let said = found(&report, name).len()
            + usize::from(other(&report, "well", name).is_some())
            + usize::from(other(&report, "unseen", name).is_some());
        assert!(said > 0, "{name}: {report:#}");
    }
    // Without a file, and for people.
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["doctor", "--timeout-s", "300"]).env_clear();
    let output = command.current_dir(folder.path()).output().unwrap();
    let out = text(&output.stdout);
    assert!(out.contains("unseen  nagle: no worker to ask"), "{out}");
    assert!(
        out.lines().last().unwrap().contains(" checks well, "),
        "{out}"
    );
    assert!(matches!(output.status.code(), Some(0 | 1)), "{out}");
    // What the environment says of discovery counts without a file too.
    let mut command = Command::new(PROGRAM);
    command.args(["doctor", "--timeout-s", "300"]).env_clear();
    let endpoints = etcd(0);
    command
        .env("DYN_DISCOVERY_BACKEND", "etcd")
        .env("ETCD_ENDPOINTS", &endpoints);
    let output = command.current_dir(folder.path()).output().unwrap();
    let out = text(&output.stdout);
    assert!(
        out.contains(&format!("well    etcd: {endpoints} answers in ")),
        "{out}"
    );
    let bad = run(&[PROGRAM, "doctor", "--config", "/not/there.toml"]);
    assert_eq!(bad.status.code(), Some(2));
    assert!(bad.stdout.is_empty() && text(&bad.stderr).contains("no such file"));
}

#[test]
fn a_seccomp_filter_is_the_cause() {
    let filter = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/interop/forbid_uring.py");
    let filter = filter.to_string_lossy();
    let wrap = ["python3", &*filter];
    let config = Config::new("[core]\nio = \"uring\"");
    let (code, report) = config.doctor(&wrap, &[]);
    let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    if sysctl.is_ok_and(|text| text.trim() != "0") {
        eprintln!("skipped: a sysctl forbids io_uring here already");
        return;
    }
    assert_eq!(code, 78, "{report:#}");
    let finding = one(&report, "io_uring");
    assert_eq!(
        (&finding["weight"], &finding["required"]),
        (&"fault".into(), &true.into())
    );
    says(
        &finding,
        "Seccomp: 2, a filter",
        "/proc/self/status",
        "seccomp profile",
    );
    // The same is no fault where epoll will do.
    let (_, report) = config.doctor(&wrap, &["--set", "core.io=auto"]);
    assert_eq!(one(&report, "io_uring")["weight"], "cost");
    let (_, report) = config.doctor(&wrap, &["--set", "core.io=epoll"]);
    assert!(
        other(&report, "well", "io_uring")
            .unwrap()
            .contains("epoll")
    );
}

#[test]
fn limits_of_the_process_are_read() {
    let config = Config::new("");
    let low = "ulimit -n 400 && ulimit -l 64 && exec \"$0\" \"$@\"";
    let (code, report) = config.doctor(&["sh", "-c", low], &[]);
    assert_eq!(code, 1);
    let files = one(&report, "nofile");
    says(
        &files,
        "Max open files: 400",
        "/proc/self/limits",
        "LimitNOFILE=",
    );
    let locked = one(&report, "memlock");
    says(
        &locked,
        "Max locked memory: 64 KiB",
        "/proc/self/limits",
        "LimitMEMLOCK=",
    );
    assert_eq!(locked["weight"], "fault");
}

#[test]
fn cpus_that_nobody_has_are_named() {
    let config = Config::new("[core]\ncpus = \"1000-1001\"");
    let (code, report) = config.doctor(&[], &[]);
    assert_eq!(code, 1);
    let finding = one(&report, "cores");
    assert!(
        finding["what"].as_str().unwrap().contains("1000-1001"),
        "{finding:#}"
    );
    says(
        &finding,
        "CPUs that this process may use: ",
        "/proc/self/status",
        "Write cpus = ",
    );
}

/// A control group with a quota of half a CPU, gone when this goes. None where none can be made.
struct Group(PathBuf);

impl Group {
    fn new() -> Option<Group> {
        let name = format!("corelane-doctor-{}", std::process::id());
        let mounts = [
            ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "50000"),
            ("/sys/fs/cgroup", "cpu.max", "50000 100000"),
        ];
        for (mount, file, quota) in mounts {
            let group = Path::new(mount).join(&name);
            if std::fs::create_dir(&group).is_err() {
                continue;
            }
            let group = Group(group);
            let here = group.0.join("cgroup.procs").exists() && group.0.join(file).exists();
            if here && std::fs::write(group.0.join(file), quota).is_ok() {
                return Some(group);
            }
        }
        eprintln!("skipped: no control group with a quota can be made here");
        None
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn a_quota_is_read_from_the_control_group() {
    let Some(group) = Group::new() else { return };
    let folder = group.0.to_string_lossy();
    let enter = format!("echo $$ > {folder}/cgroup.procs && exec \"$0\" \"$@\"");
    let (_, report) = Config::new("").doctor(&["sh", "-c", &enter], &[]);
    let finding = one(&report, "quota");
    says(
        &finding,
        "0.50 CPUs: 50000 us in each 100000 us",
        &folder,
        "CPUQuota=",
    );
    says(&finding, "nr_throttled: ", "cpu.stat", "CPUQuota=");
}

/// A worker that knows no endpoint; each answer is a write of its own, as Dynamo's.
fn worker(nodelay: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            stream.set_nodelay(nodelay).unwrap();
            std::thread::spawn(move || refuse(stream));
        }
    });
    address
}

fn refuse(mut stream: TcpStream) {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut chunk) {
        bytes.extend_from_slice(&chunk[..read]);
        while let Decoded::Frame(prefix) = request_frame::decode_prefix(&bytes) {
            let end = prefix.frame_bytes() as usize;
            if end > bytes.len() {
                break;
            }
            bytes.drain(..end);
            let mut answer = Vec::new();
            reply_frame::write_unknown_endpoint("x", &mut answer);
            if stream.write_all(&answer).is_err() {
                return;
            }
        }
    }
}

#[test]
fn a_worker_with_nagles_algorithm_is_told_from_one_without() {
    let config = Config::new("[core]\nio = \"epoll\"");
    let (slow, quick) = (worker(false).to_string(), worker(true).to_string());
    let peers = ["--peer", &slow, "--peer", &quick];
    // Who is not scheduled for 40 ms sees no pause, or one: then it is asked again.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, report) = config.doctor(&[], &peers);
        let told = found(&report, "nagle");
        if let [finding] = &told[..]
            && finding["what"].as_str().unwrap().contains(&slow)
        {
            says(
                finding,
                "6 requests at once: ",
                &slow,
                "ack = \"on_forward\"",
            );
            says(finding, "acknowledges at once", "measured", "quickack 1");
            return;
        }
        assert!(Instant::now() < deadline, "{report:#}");
    }
}

#[test]
fn instances_of_the_configuration_are_asked() {
    let address = worker(true);
    let config = Config::new(&format!(
        "[[instance]]\nendpoint = \"a/b/e\"\naddress = \"{address}/1/a/b/e\""
    ));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, report) = config.doctor(&[], &[]);
        if let Some(well) = other(&report, "well", "nagle") {
            assert!(well.starts_with("1 asked"), "{well}");
            return;
        }
        assert!(Instant::now() < deadline, "{report:#}");
    }
}

/// Answers HTTP as etcd does, with a clock that is wrong by so many seconds.
fn etcd(wrong_s: i64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut asked = Vec::new();
                let mut chunk = [0; 1024];
                while !asked.ends_with(b"\r\n\r\n") {
                    match stream.read(&mut chunk) {
                        Ok(read @ 1..) => asked.extend_from_slice(&chunk[..read]),
                        _ => return,
                    }
                }
                let now = SystemTime::now()
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .unwrap();
                let date = http_date(i64::try_from(now.as_secs()).unwrap() + wrong_s);
                let head = format!("HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Length: 2\r\n\r\n");
                let _ = stream.write_all(format!("{head}{{}}").as_bytes());
            });
        }
    });
    format!("http://{address}")
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`, by the days of the Gregorian calendar.
fn http_date(unix_s: i64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec", "Jan", "Feb",
    ];
    let (days, second) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
    // Eras of 400 years, years from March on.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let year = year_of_era + era * 400 + i64::from(month >= 10);
    format!(
        "{}, {day:02} {} {year} {:02}:{:02}:{:02} GMT",
        DAYS[days.rem_euclid(7) as usize],
        MONTHS[month as usize],
        second / 3_600,
        second / 60 % 60,
        second % 60
    )
}

#[test]
fn the_clock_of_etcd_is_compared() {
    assert_eq!(http_date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
    let ask = |endpoints: &[String]| {
        let list: Vec<String> = endpoints.iter().map(|e| format!("\"{e}\"")).collect();
        let text = format!(
            "[discovery]\nbackend = \"etcd\"\nendpoints = [{}]",
            list.join(",")
        );
        Config::new(&text).doctor(&[], &[]).1
    };
    let (right, behind) = (etcd(0), etcd(-3_600));
    let report = ask(std::slice::from_ref(&right));
    assert!(
        other(&report, "well", "etcd").is_some_and(|well| well.contains(&right)),
        "{report:#}"
    );
    let report = ask(&[right.clone(), behind.clone()]);
    let finding = one(&report, "etcd");
    assert_eq!(finding["weight"], "fault");
    let what = finding["what"].as_str().unwrap();
    assert!(
        what.contains(&behind) && what.contains("behind ours"),
        "{what}"
    );
    says(
        &finding,
        "its clock less ours: -36",
        "Date of GET http://",
        "chronyc makestep",
    );
    let report = ask(&[etcd(3_600)]);
    let finding = one(&report, "etcd");
    assert!(
        finding["what"].as_str().unwrap().contains("ahead of ours"),
        "{finding:#}"
    );

    // One that is gone.
    let gone = TcpListener::bind("127.0.0.1:0").unwrap();
    let gone_at = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    let report = ask(&[gone_at.clone(), right]);
    let finding = one(&report, "etcd");
    assert_eq!(finding["weight"], "cost");
    says(&finding, "refused", &gone_at, "etcdctl endpoint health");
    assert_eq!(one(&ask(&[gone_at]), "etcd")["weight"], "fault");
}
