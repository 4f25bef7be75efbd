//! What lies in `deploy/` fits the program: units, the seccomp profile, manifests, dashboards and
//! alerts. No systemd, container or cluster has to run.

mod lab;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Command, Output};

use lab::*;
use rustix::process::Signal;
use serde_json::Value;

const LISTEN: &str = "routed/backend/generate";
const TARGET: &str = "dynamo/backend/generate";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(name: &str) -> String {
    let path = root().join("deploy").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml(name: &str) -> Vec<Value> {
    let text = read(name);
    let documents = serde_yaml_ng::Deserializer::from_str(&text);
    documents
        .map(|one| serde::Deserialize::deserialize(one).unwrap())
        .collect()
}

/// What a program that may be missing here says; `None`, and a word about it, where it is.
fn run(program: &str, args: &[&str]) -> Option<Output> {
    match Command::new(program).args(args).output() {
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("left out: {program}: {error}");
            None
        }
    }
}

/// The units in a folder of their own, with the program where it is here.
fn units() -> (tempfile::TempDir, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let names = [
        "corelane.service",
        "corelane.socket",
        "corelane-status.socket",
    ];
    let place = |name: &str| {
        let text = read(&format!("systemd/{name}")).replace("/usr/bin/corelane", PROGRAM);
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let paths = names.map(place).to_vec();
    (folder, paths)
}

fn said(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]]
        .map(String::from_utf8_lossy)
        .concat()
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let (_folder, units) = units();
    let units: Vec<&str> = units.iter().map(String::as_str).collect();
    let line = [&["verify", "--man=no", "--recursive-errors=no"], &units[..]].concat();
    let Some(verified) = run("systemd-analyze", &line) else {
        return;
    };
    assert!(verified.status.success(), "{}", said(&verified));
    assert_eq!(said(&verified), "");
    // Tenths: 1.5 of 10 is what systemd shows as OK.
    let line = [
        "security",
        "--no-pager",
        "--offline=true",
        "--threshold=15",
        units[0],
    ];
    let Some(secure) = run("systemd-analyze", &line) else {
        return;
    };
    assert!(secure.status.success(), "{}", said(&secure));
}

/// The names of a group of system calls, groups in it resolved.
fn group(name: &str, all: &BTreeMap<String, Vec<String>>) -> BTreeSet<String> {
    let Some(members) = all.get(name) else {
        return BTreeSet::from([name.to_owned()]);
    };
    members
        .iter()
        .flat_map(|member| group(member, all))
        .collect()
}

#[test]
fn the_unit_allows_every_system_call_of_the_profile() {
    let Some(listed) = run("systemd-analyze", &["syscall-filter", "--no-pager"]) else {
        return;
    };
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut at = String::new();
    for line in String::from_utf8(listed.stdout).unwrap().lines() {
        match line.trim() {
            comment if comment.starts_with('#') || comment.is_empty() => {}
            name if !line.starts_with(' ') => at = name.to_owned(),
            name => groups.entry(at.clone()).or_default().push(name.to_owned()),
        }
    }
    let mut allowed = BTreeSet::new();
    for line in read("systemd/corelane.service").lines() {
        let Some(filter) = line.strip_prefix("SystemCallFilter=") else {
            continue;
        };
        let names = filter.trim_start_matches('~').split_whitespace();
        for name in names.flat_map(|name| group(name, &groups)) {
            match filter.starts_with('~') {
                true => allowed.remove(&name),
                false => allowed.insert(name),
            };
        }
    }
    assert!(allowed.contains("io_uring_setup"), "{groups:?}");
    let missing: Vec<String> = profile()
        .into_iter()
        .filter(|call| !allowed.contains(call))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// The system calls that the profile allows.
fn profile() -> BTreeSet<String> {
    let profile: Value = serde_json::from_str(&read("seccomp/corelane.json")).unwrap();
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
    let rules = profile["syscalls"].as_array().unwrap();
    let allowed = rules
        .iter()
        .filter(|rule| rule["action"] == "SCMP_ACT_ALLOW");
    let names = allowed.flat_map(|rule| rule["names"].as_array().unwrap());
    let names: Vec<String> = names
        .map(|name| name.as_str().unwrap().to_owned())
        .collect();
    let set: BTreeSet<String> = names.iter().cloned().collect();
    assert_eq!(set.len(), names.len(), "a name stands twice");
    set
}

#[test]
fn the_profile_has_io_uring_and_nothing_that_rules_a_host() {
    let names = profile();
    for wanted in [
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "epoll_pwait",
    ] {
        assert!(names.contains(wanted), "{wanted}");
    }
    for banned in [
        "mount",
        "ptrace",
        "bpf",
        "setns",
        "unshare",
        "reboot",
        "init_module",
        "kexec_load",
    ] {
        assert!(!names.contains(banned), "{banned}");
    }
}

/// A router with all that a router can have, and what is to end with it.
struct Everything {
    router: Program,
    _workers: [Worker; 2],
    _folder: tempfile::TempDir,
}

impl Everything {
    fn start(wrap: &[&str], env: &[(&str, &str)]) -> Everything {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let workers = [Worker::start(), Worker::start()];
        let relayed = "relayed/backend/generate";
        let text = [
            format!("[[route]]\nlisten = \"{LISTEN}\"\ntarget = \"{TARGET}\"\n"),
            format!("[[route]]\nlisten = \"{relayed}\"\ntarget = \"dynamo/other/generate\"\n"),
            "response = \"relay\"\n".into(),
            "[[route]]\nlisten = \"laned/backend/generate\"\n".into(),
            format!(
                "target = \"dynamo/lane/generate\"\nlane = \"{}\"\n",
                path("lane.sock")
            ),
            workers[0].instance(TARGET),
            workers[1].instance("dynamo/other/generate"),
            "[drain]\ngrace_s = 0\n".into(),
            format!("[planner]\nsocket = \"{}\"\n", path("planner.sock")),
            "[events]\nbroker = true\nxsub = \"tcp://127.0.0.1:0\"\n".into(),
            "xpub = \"tcp://127.0.0.1:0\"\n".into(),
            format!(
                "[gpu]\ndevices = \"0\"\nbackend = \"host\"\nsocket_dir = \"{}\"\n",
                path("")
            ),
            format!(
                "[discovery]\nbackend = \"file\"\npath = \"{}\"\n",
                path("store")
            ),
        ];
        let router = Program::wrapped(wrap, &text.concat(), env);
        Everything {
            router,
            _workers: workers,
            _folder: folder,
        }
    }

    /// Uses it a little.
    fn use_it(&mut self) {
        let router = &mut self.router;
        wait_until("the endpoint is ready", || {
            assert!(router.is_alive(), "{}", router.log());
            let health = router.get("/health");
            health.is_some_and(|(_, body)| body.contains(&format!("\"{LISTEN}\":\"ready\"")))
        });
        let (mut caller, path) = router.dial(LISTEN);
        for _ in 0..10 {
            assert_eq!(caller.ask(&path), "");
        }
        assert!(
            caller
                .ask("0/no/such/one")
                .starts_with("Server unavailable")
        );
    }
}

#[test]
fn a_router_lives_under_the_profile() {
    let script = root().join("scripts/with-seccomp").display().to_string();
    let json = root()
        .join("deploy/seccomp/corelane.json")
        .display()
        .to_string();
    let wrap = ["/usr/bin/python3", &script, "--kill", &json];
    let tried = run(wrap[0], &[&wrap[1..], &["/bin/true"]].concat());
    if tried.is_none_or(|tried| !tried.status.success()) {
        eprintln!("left out: the profile cannot be loaded here");
        return;
    }
    for io in ["auto", "epoll"] {
        let mut all = Everything::start(&wrap, &[("CORELANE_IO", io)]);
        all.use_it();
        let status = format!("127.0.0.1:{}", all.router.status_port);
        let mut dump = Program::command(&["dump", "--status", &status]);
        assert_eq!(dump.ended(), 0, "{}", dump.log());
        all.router.signal(Signal::TERM);
        assert_eq!(all.router.ended(), 0, "{io}: {}", all.router.log());
    }
}

#[test]
fn the_manifest_fits_the_program() {
    let documents = yaml("kubernetes/corelane.yaml");
    let kind = |kind: &str| documents.iter().find(|one| one["kind"] == kind).unwrap();
    let config = kind("ConfigMap")["data"]["corelane.toml"].as_str().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("corelane.toml");
    std::fs::write(&file, config).unwrap();
    let mut check = Program::command(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(check.ended(), 0, "{}{}", check.out(), check.log());
    let config: toml::Table = config.parse().unwrap();
    let number = |section: &str, key: &str| config[section][key].as_integer().unwrap();

    let pod = &kind("Deployment")["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let ports = container["ports"].as_array().unwrap();
    let port = |name: &str| ports.iter().find(|port| port["name"] == name).unwrap();
    assert_eq!(port("requests")["containerPort"], number("server", "port"));
    assert_eq!(
        port("status")["containerPort"],
        number("server", "status_port")
    );
    for (probe, path) in [
        ("startupProbe", "/live"),
        ("readinessProbe", "/health"),
        ("livenessProbe", "/live"),
    ] {
        assert_eq!(container[probe]["httpGet"]["path"], path);
        assert_eq!(container[probe]["httpGet"]["port"], "status");
    }
    let pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        .as_i64()
        .unwrap();
    let drain = number("drain", "grace_s") + number("drain", "timeout_s");
    let granted = pod["terminationGracePeriodSeconds"].as_i64().unwrap();
    assert!(
        granted >= pause + drain + 10,
        "{granted} s for {pause} + {drain}"
    );
    assert_eq!(
        container["resources"]["requests"],
        container["resources"]["limits"]
    );

    let seccomp = &pod["securityContext"]["seccompProfile"];
    assert_eq!(seccomp["type"], "Localhost");
    let installer = &yaml("kubernetes/seccomp.yaml")[0]["spec"]["template"]["spec"];
    let folder = installer["volumes"][1]["hostPath"]["path"]
        .as_str()
        .unwrap();
    let profile = seccomp["localhostProfile"].as_str().unwrap();
    let wanted = format!("/var/lib/kubelet/seccomp/{profile}");
    assert_eq!(format!("{folder}/corelane.json"), wanted);
}

/// The series of a scrape: name, and the labels that it has anywhere.
fn series(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, labels) = line.split_once(['{', ' ']).unwrap();
        let entry = all.entry(name.to_owned()).or_default();
        if line.as_bytes()[name.len()] == b'{' {
            let pairs = labels.split("=\"");
            let ends = pairs.filter_map(|part| part.rsplit([',', '{']).next());
            entry.extend(ends.filter(|label| is_name(label)).map(str::to_owned));
        }
    }
    all
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

/// Names of our metrics in an expression, and the labels that it asks for.
fn asked(expression: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (mut names, mut labels) = (BTreeSet::new(), BTreeSet::new());
    for token in expression
        .split(|c: char| !word(c))
        .filter(|token| token.starts_with("corelane_"))
    {
        names.insert(token.to_owned());
    }
    for (open, close) in [("by (", ')'), ("on (", ')')] {
        for part in expression.split(open).skip(1) {
            let list = part.split(close).next().unwrap();
            labels.extend(list.split(',').map(|label| label.trim().to_owned()));
        }
    }
    for part in expression.split('{').skip(1) {
        let selector = part.split('}').next().unwrap();
        for matcher in selector.split(',') {
            let label = matcher.split(['=', '!']).next().unwrap().trim();
            labels.insert(label.to_owned());
        }
    }
    (names, labels)
}

/// The expressions of all panels with their legends.
fn panels() -> Vec<(String, String)> {
    let dashboard: Value = serde_json::from_str(&read("grafana/corelane.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels
        .filter_map(|panel| panel["targets"].as_array())
        .flatten();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    targets
        .map(|target| (text(&target["expr"]), text(&target["legendFormat"])))
        .collect()
}

/// The expressions of all alerts with their texts.
fn alerts() -> Vec<(String, String)> {
    let rules = yaml("prometheus/corelane.rules.yaml");
    let groups = rules[0]["groups"].as_array().unwrap().iter();
    let rules = groups.flat_map(|group| group["rules"].as_array().unwrap());
    let alert = |rule: &Value| {
        assert!(rule["alert"].as_str().unwrap().starts_with("Corelane"));
        let expression = rule["expr"].as_str().unwrap().to_owned();
        let severity = rule["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning", "info"].contains(&severity));
        (expression, rule["annotations"].to_string())
    };
    rules.map(alert).collect()
}

/// What a template names: `{{label}}`, or `{{ $labels.label }}`.
fn templates(text: &str) -> Vec<String> {
    let parts = text
        .split("{{")
        .skip(1)
        .filter_map(|part| part.split("}}").next());
    let names = parts.map(|part| part.trim().trim_start_matches("$labels."));
    names
        .filter(|name| *name != "$value")
        .map(str::to_owned)
        .collect()
}

/// What a router with TLS shows.
fn scrape_with_tls() -> String {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let cert = file("cert.pem", made.cert.pem());
    let key = file("key.pem", made.key_pair.serialize_pem());
    let text = format!(
        "[[route]]\nlisten = \"{LISTEN}\"\ntarget = \"{TARGET}\"\n\
         [tls]\ncert = \"{cert}\"\nkey = \"{key}\"\n"
    );
    let router = Program::serve(&text, &[]);
    let mut scrape = None;
    wait_until("there are numbers", || {
        scrape = router.get("/metrics").map(|(_, scrape)| scrape);
        scrape.is_some()
    });
    scrape.unwrap_or_default()
}

#[test]
fn dashboards_and_alerts_ask_for_what_is_there() {
    let mut all = Everything::start(&[], &[]);
    all.use_it();
    let (_, scrape) = all.router.get("/metrics").unwrap();
    let series = series(&(scrape + &scrape_with_tls()));
    // What Prometheus adds, and the places of histograms.
    let added = ["instance", "job", "le"].map(str::to_owned);
    let both = [panels(), alerts()].concat();
    assert!(both.len() > 40, "{}", both.len());
    for (expression, text) in both {
        let (names, labels) = asked(&expression);
        assert!(!names.is_empty(), "{expression}");
        let mut there: BTreeSet<String> = added.iter().cloned().collect();
        for name in names {
            let found = series
                .get(&name)
                .unwrap_or_else(|| panic!("no {name}: {expression}"));
            there.extend(found.iter().cloned());
        }
        assert!(
            labels.is_subset(&there),
            "{labels:?} of {there:?}: {expression}"
        );
        for name in templates(&text) {
            assert!(labels.contains(&name), "{name} in {text}: {expression}");
        }
    }
}

/// What a dashboard says of cores and network queues, and whether it does so for each core.
const PLACED: [(&str, bool); 7] = [
    ("corelane_locality_ratio", true),
    ("corelane_locality_ratio_all", false),
    ("corelane_receive_queues", true),
    ("corelane_callers", true),
    ("corelane_connections_local_total", true),
    ("corelane_connections_handed_over_total", true),
    ("corelane_connections_taken_over_total", true),
];

#[test]
fn the_dashboard_shows_who_gets_connections() {
    let panels = panels();
    for (name, by_core) in PLACED {
        let shows = |(expression, _): &&(String, String)| {
            let (names, labels) = asked(expression);
            names.contains(name) && labels.contains("core") == by_core
        };
        assert!(panels.iter().any(|panel| shows(&panel)), "{name}");
    }
    // No panel lies on another.
    let dashboard: Value = serde_json::from_str(&read("grafana/corelane.json")).unwrap();
    let mut covered = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let place = |name: &str| panel["gridPos"][name].as_u64().unwrap();
        for x in place("x")..place("x") + place("w") {
            let column = place("y")..place("y") + place("h");
            column.for_each(|y| assert!(covered.insert((x, y)), "{}", panel["title"]));
        }
    }
}

/// Labels and what bounds the number of their values. A label that peers could fill at will must
/// not come to be by accident.
const BOUNDED: &[(&str, &str)] = &[
    ("core", "cores of this host"),
    ("cpu", "CPUs of this host"),
    ("ring", "two rings"),
    ("cause", "words of preflight"),
    ("reason", "words of refusals and of TLS"),
    ("version", "one"),
    ("listen", "routes of the configuration"),
    ("target", "routes of the configuration"),
    ("le", "fixed buckets"),
    ("side", "two"),
    ("result", "outcomes of a reload"),
    ("topic", "TOPICS_MAX, then one for all others"),
    ("gpu", "devices of the configuration"),
    ("tag", "pools of the configuration"),
    ("generation", "two"),
    ("backend", "two"),
    ("socket", "pools of the configuration"),
    ("state", "states of a pool"),
    ("worker_id", "one: this process"),
    ("dynamo_namespace", "endpoints of this process"),
    ("dynamo_component", "endpoints of this process"),
    ("dynamo_endpoint", "endpoints of this process"),
];

#[test]
fn every_label_is_bounded() {
    let mut all = Everything::start(&[], &[]);
    all.use_it();
    let (_, scrape) = all.router.get("/metrics").unwrap();
    for (name, labels) in series(&scrape) {
        for label in labels {
            let known = BOUNDED.iter().any(|(bounded, _)| *bounded == label);
            assert!(
                known,
                "{name} has the label {label}; say what bounds it, or leave it out"
            );
        }
    }
}
