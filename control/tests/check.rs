//! The configuration as a user meets it: good examples pass, and what is wrong with a broken one
//! is said at the right place in the right words.

#[path = "check/cores.rs"]
mod cores;
#[path = "check/corpus.rs"]
mod corpus;
#[path = "check/examples.rs"]
mod examples;
#[path = "check/faults.rs"]
mod faults;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use corelane::config::{
    Backend, Checked, Config, Host, Idle, Inputs, Io, Kind, Main, Override, Policy, Purpose, find,
    keys, load,
};
use corelane::env::Env;
use faults::{AFTER_ROUTE, IN_ROUTE, WHOLE};

fn host(cpus: impl IntoIterator<Item = usize>) -> Host {
    Host {
        cpus: cpus.into_iter().collect(),
        ..Host::default()
    }
}

fn inputs(text: &str) -> Inputs {
    Inputs {
        purpose: Purpose::Serve,
        main: Main::Text {
            name: "c.toml".into(),
            text: text.into(),
        },
        overrides: Vec::new(),
        env: Env::default(),
        host: host(0..4),
    }
}

fn env(pairs: &[(&str, &str)]) -> Env {
    Env::of(
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    )
}

fn set(path: &str, text: &str) -> Override {
    let key = find(path).unwrap_or_else(|| panic!("no key {path}"));
    Override {
        flag: format!("--set {path}"),
        key,
        text: text.into(),
    }
}

fn lines(checked: &Checked) -> Vec<String> {
    checked.problems.iter().map(ToString::to_string).collect()
}

fn good(inputs: &Inputs) -> Config {
    let checked = load(inputs);
    let lines = lines(&checked);
    checked.config.unwrap_or_else(|| panic!("{lines:#?}"))
}

/// A route and its instance, so that a case is about one thing only. Six lines.
const ROUTE: &str = r#"[[route]]
listen = "a/r/g"
target = "a/b/g"
[[instance]]
endpoint = "a/b/g"
address = "127.0.0.1:9/1/a/b/g"
"#;

#[test]
fn what_is_wrong_is_said_where_it_is() {
    let mut cases = 0;
    let mut wrong = Vec::new();
    let mut case = |text: String, expected: &[&str]| {
        let checked = load(&inputs(&text));
        let errors = checked.errors().count();
        assert_eq!(checked.config.is_none(), errors > 0, "{text}");
        let found = lines(&checked);
        if found != expected {
            wrong.push(format!("{text}\nexpected {expected:#?}\nfound {found:#?}"));
        }
        cases += 1;
    };
    for (text, expected) in AFTER_ROUTE {
        case(format!("{ROUTE}{text}"), expected);
    }
    for (text, expected) in WHOLE {
        case((*text).to_owned(), expected);
    }
    for (text, expected) in IN_ROUTE {
        let before = "[discovery]\nbackend = \"file\"\n[[route]]\nlisten = \"a/r/g\"\n";
        case(format!("{before}target = \"a/b/g\"\n{text}\n"), expected);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    assert!(cases >= 40);
}

#[test]
fn defaults_are_those_of_the_table() {
    let config = good(&inputs(ROUTE));
    assert_eq!(config.server.host, IpAddr::from([127, 0, 0, 1]));
    assert_eq!(
        (config.server.port, config.server.status_port),
        (0, Some(9_090))
    );
    assert_eq!(config.server.message_bytes_max, 33_554_432);
    assert_eq!(config.discovery.backend, Backend::Memory);
    assert_eq!(config.discovery.endpoints, ["http://localhost:2379"]);
    assert_eq!(config.routes[0].policy, Policy::LeastLoaded);
    assert_eq!(config.routes[0].ack_timeout_ms, 5_000);
    assert_eq!(config.instances[0].id, 1);
    assert_eq!(config.cores.len(), 4);
    assert_eq!(config.cores[3].cpu, 3);
    assert_eq!(
        (config.cores[0].idle, config.cores[0].io),
        (Idle::Block, Io::Auto)
    );
    assert_eq!(
        (config.cores[0].buffers, config.cores[0].in_flight_max),
        (4_096, 65_536)
    );
    assert_eq!((config.drain.grace_s, config.drain.timeout_s), (5, 900));
}

/// Every key of the table is asked for, and what is asked for stands in the table.
#[test]
fn every_key_is_read() {
    let checked = load(&inputs(&format!("{ROUTE}[gpu]\ndevices = 0\n")));
    let plain = |path: &str| match path.split_once('[') {
        Some((section, rest)) => {
            format!(
                "{section}.{}",
                rest.split_once('.').map_or("", |(_, name)| name)
            )
        }
        None => path.to_owned(),
    };
    let read: BTreeSet<String> = checked.settings.iter().map(|s| plain(&s.path)).collect();
    let table: BTreeSet<String> = keys().iter().map(|key| key.path()).collect();
    assert_eq!(read, table);
}

/// The greatest and the least number of every key fit into the configuration's own types.
#[test]
fn every_bound_fits() {
    for key in keys() {
        let (Kind::Int { min, max, .. } | Kind::PowerOfTwo { min, max, .. }) = key.kind else {
            continue;
        };
        for number in [min, max] {
            let mut inputs = inputs(ROUTE);
            inputs.overrides.push(Override {
                flag: "--x".into(),
                key,
                text: number.to_string(),
            });
            let checked = load(&inputs);
            assert!(
                checked.config.is_some(),
                "{} = {number}: {:?}",
                key.path(),
                lines(&checked)
            );
            for (key, text) in [(key, (min - 1).to_string()), (key, (max + 1).to_string())] {
                inputs.overrides = vec![Override {
                    flag: "--x".into(),
                    key,
                    text,
                }];
                assert!(
                    load(&inputs).config.is_none(),
                    "{} takes too much",
                    key.path()
                );
            }
        }
    }
}

#[test]
fn a_missing_cpu_of_the_default_is_nobodys_fault() {
    let mut inputs = inputs(ROUTE);
    for (cpus, data, control) in [
        (vec![0, 1], vec![0, 1], 1),
        (vec![0], vec![0], 0),
        (vec![0, 1, 2, 3, 4, 5, 6, 7], vec![0, 1, 2, 3], 7),
        (vec![8, 9], vec![8, 9], 9),
    ] {
        inputs.host = host(cpus);
        let checked = load(&inputs);
        assert_eq!(lines(&checked), Vec::<String>::new());
        let config = checked.config.unwrap();
        let found: Vec<usize> = config.cores.iter().map(|core| core.cpu).collect();
        assert_eq!((found, config.control.cpu), (data, control));
    }
}

/// A folder with `corelane.toml` and files in `cores.d`.
fn folder(main: &str, cores: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("corelane.toml");
    std::fs::write(&path, main).unwrap();
    std::fs::create_dir(folder.path().join("cores.d")).unwrap();
    for (name, text) in cores {
        std::fs::write(folder.path().join("cores.d").join(name), text).unwrap();
    }
    (folder, path)
}

/// Where a value came from, with the folder cut off.
fn origin(config: &Config, path: &str, folder: &Path) -> (String, String) {
    let found = config
        .settings
        .iter()
        .find(|setting| setting.path == path)
        .unwrap();
    let at = found
        .origin
        .to_string()
        .replace(&format!("{}/", folder.display()), "");
    (found.value.clone().unwrap_or_default(), at)
}

#[test]
fn flag_over_environment_over_core_file_over_file_over_default() {
    let main = format!("{ROUTE}[core]\nio = \"uring\"\n");
    let (folder, path) = folder(
        &main,
        &[("1.toml", "[core]\nio = \"epoll\"\nidle = \"spin\"\n")],
    );
    let mut inputs = inputs("");
    inputs.main = Main::File(path);
    let of = |inputs: &Inputs, path: &str| {
        let (value, at) = origin(&good(inputs), path, folder.path());
        format!("{value} ({at})")
    };
    assert_eq!(of(&inputs, "core[0].io"), "uring (corelane.toml:8:6)");
    assert_eq!(of(&inputs, "core[1].io"), "epoll (cores.d/1.toml:2:6)");
    assert_eq!(of(&inputs, "core[1].idle"), "spin (cores.d/1.toml:3:8)");
    assert_eq!(of(&inputs, "core[0].idle"), "block (default)");
    inputs.env = env(&[("CORELANE_IO", "auto")]);
    assert_eq!(of(&inputs, "core[1].io"), "auto (environment CORELANE_IO)");
    inputs.overrides = vec![set("core.io", "uring"), set("core.io", "epoll")];
    assert_eq!(of(&inputs, "core[1].io"), "epoll (flag --set core.io)");
    assert_eq!(good(&inputs).cores[1].io, Io::Epoll);
}

#[test]
fn core_files_are_held_to_their_table() {
    let (folder, path) = folder(
        ROUTE,
        &[
            ("0.toml", "[core]\ncpus = \"0\"\n"),
            ("1.toml", "[server]\nport = 1\n"),
            ("2.toml", "idle = \"spin\"\n"),
            ("3.toml", "[core]\nbusy_poll_us = -5\n"),
            ("9.toml", "[core]\nidle = \"spin\"\n"),
            ("01.toml", ""),
            ("README", "not read"),
        ],
    );
    let mut inputs = inputs("");
    inputs.main = Main::File(path);
    let cut = format!("{}/cores.d/", folder.path().display());
    let found: Vec<String> = lines(&load(&inputs))
        .iter()
        .map(|l| l.replace(&cut, ""))
        .collect();
    assert_eq!(
        found,
        [
            "0.toml:2:1: cpus is the same for every core; move it to the main file",
            "01.toml:1:1: is not named after a CPU; \
         name it like 0.toml or 12.toml, or give it another ending",
            "1.toml:1:2: [server] is not for a file of one core; move it to the main file",
            "2.toml:1:1: unknown key \"idle\" outside any table; write it under [core]",
            "3.toml:2:16: busy_poll_us is -5, outside 0 to 10000 (microseconds); write 0",
            "9.toml:1:1: warning: CPU 9 is no data core, so this file does nothing; \
         add 9 to cpus under [core], or remove the file",
        ]
    );
}

#[test]
fn files_that_cannot_be_read() {
    let (folder, path) = folder("[server]\nhost = \"\u{fc}", &[]);
    let mut inputs = inputs("");
    let mut first = |path: &Path| {
        inputs.main = Main::File(path.to_owned());
        let found = lines(&load(&inputs)).remove(0);
        found.replace(&format!("{}/", folder.path().display()), "")
    };
    let missing = first(&folder.path().join("none.toml"));
    assert!(
        missing.starts_with("none.toml:1:1: cannot be read: no such file"),
        "{missing}"
    );
    assert!(first(folder.path()).contains(":1:1: cannot be read: is a directory"));
    std::fs::write(&path, b"[server]\nhost = \"\xff\"").unwrap();
    assert_eq!(
        first(&path),
        "corelane.toml:2:9: is not UTF-8; save the file as UTF-8"
    );
    std::fs::write(&path, "#".repeat((1 << 20) + 1)).unwrap();
    assert!(first(&path).starts_with("corelane.toml:1:1: is longer than 1 MiB; "));
}

#[test]
fn dynamos_names_mean_the_same() {
    let mut inputs = inputs(&ROUTE[..ROUTE.find("[[instance]]").unwrap()]);
    inputs.env = env(&[
        ("DYN_DISCOVERY_BACKEND", "etcd"),
        ("ETCD_ENDPOINTS", "http://a:1, b:2"),
        ("ETCD_LEASE_TTL", "60"),
        ("ETCD_AUTH_USERNAME", "me"),
        ("ETCD_AUTH_PASSWORD", "hunter2"),
        ("DYN_TCP_RPC_HOST", "[::1]"),
        ("DYN_TCP_RPC_PORT", "7000"),
        ("DYN_SYSTEM_PORT", "-5"),
        ("DYN_SYSTEM_HOST", "0.0.0.0"),
        ("DYN_TCP_MAX_MESSAGE_SIZE", "65536"),
        ("DYN_TCP_REQUEST_TIMEOUT", "7"),
        ("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "30"),
        ("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "1"),
        ("DYN_FILE_KV", "/kv"),
    ]);
    let config = good(&inputs);
    assert_eq!(config.discovery.backend, Backend::Etcd);
    assert_eq!(config.discovery.endpoints, ["http://a:1", "b:2"]);
    assert_eq!(config.discovery.lease_ttl_s, 60);
    assert_eq!(config.discovery.path, Path::new("/kv"));
    assert_eq!(config.server.host.to_string(), "::1");
    assert_eq!(
        (config.server.port, config.server.status_port),
        (7_000, None)
    );
    assert!(config.server.status_host.is_unspecified());
    assert_eq!(config.server.message_bytes_max, 65_536);
    assert_eq!(config.routes[0].ack_timeout_ms, 7_000);
    assert_eq!((config.drain.grace_s, config.drain.timeout_s), (1, 30));
    // What Dynamo's own reader would be told is what was resolved.
    assert_eq!(
        config.discovery.variable("ETCD_ENDPOINTS").as_deref(),
        Some("http://a:1,b:2")
    );
    assert_eq!(
        config.discovery.variable("ETCD_AUTH_PASSWORD").as_deref(),
        Some("hunter2")
    );
    assert!(
        !format!("{config:?}").contains("hunter2"),
        "a password is never shown"
    );
    inputs.env = env(&[("DYN_DISCOVERY_BACKEND", "mem")]);
    assert_eq!(good(&inputs).discovery.backend, Backend::Memory);
}

#[test]
fn faults_of_environment_and_flags_name_them() {
    let mut inputs = inputs(ROUTE);
    inputs.env = env(&[
        ("CORELANE_SERVER_PORT", "tcp://10.0.0.1:80"),
        ("DYN_TCP_RPC_PORT", "http"),
        ("DYN_REQUEST_PLANE", "http"),
        ("CORELANE_BUFFERS", "  "),
    ]);
    inputs.overrides = vec![set("core.io", "fast")];
    assert_eq!(
        lines(&load(&inputs)),
        [
            "flag --set core.io: unknown io \"fast\"; write \"auto\" | \"uring\" | \"epoll\"",
            "environment CORELANE_SERVER_PORT: port is tcp://10.0.0.1:80, a service link of \
         Kubernetes; set enableServiceLinks: false in the pod, or rename the service",
            "environment DYN_REQUEST_PLANE: the request plane is tcp or nats, not \"http\"; \
         write tcp or nats, or unset it",
            "environment DYN_TCP_RPC_PORT: port is \"http\", not a number that fits; \
         write a whole number (port, 0 to 65535)",
        ]
    );
}

#[test]
fn etcds_times_and_certificates() {
    let mut inputs = inputs(&ROUTE[..ROUTE.find("[[instance]]").unwrap()]);
    inputs.overrides = vec![
        set("discovery.backend", "etcd"),
        set("discovery.keepalive_interval_s", "4"),
        set("discovery.lease_ttl_s", "10"),
        set("discovery.client_cert", "-----BEGIN x"),
        set("discovery.client_key", "/no/such/file"),
    ];
    assert_eq!(
        lines(&load(&inputs)),
        [
            "flag --set discovery.client_cert: client_cert without ca; \
         write ca too, or leave client_cert out",
            "flag --set discovery.client_key: client_key is neither PEM text nor a file \
             that can be \
         read; write the path of a PEM file",
            "flag --set discovery.keepalive_interval_s: warning: keepalive_interval_s is 4, which \
         etcd may refuse; write 5 or more",
            "flag --set discovery.lease_ttl_s: warning: a dead connection to etcd is seen after \
             14 s, \
         the lease ends after 10; write a longer lease_ttl_s, or a shorter keepalive_interval_s",
        ]
    );
}

#[test]
fn open_files_are_counted_when_someone_asked() {
    let mut inputs = inputs(&format!("{ROUTE}[core]\nconnections_max = 1000\n"));
    inputs.host.files_max = Some(4_000);
    assert_eq!(
        lines(&load(&inputs)),
        [
            "c.toml:8:19: warning: connections_max of all cores is 4000, open files 4000; \
         raise the limit (ulimit -n 4064)",
        ]
    );
    inputs.host.files_max = Some(4_064);
    assert!(lines(&load(&inputs)).is_empty());
}

#[test]
fn a_peer_reads_only_what_concerns_it() {
    let mut inputs = inputs("");
    inputs.purpose = Purpose::Peer;
    inputs.main = Main::Nothing;
    inputs.env = env(&[("CORELANE_IO", "nonsense"), ("DYN_FILE_KV", "/kv")]);
    let config = good(&inputs);
    assert!(config.routes.is_empty());
    assert_eq!(config.discovery.path, Path::new("/kv"));
}

#[test]
fn behind_a_wildcard_an_address_that_can_be_dialled_is_advertised() {
    let mut inputs = inputs(&format!("{ROUTE}[server]\nhost = \"0.0.0.0\"\n"));
    let advertised = good(&inputs).server.advertised();
    assert!(!advertised.is_unspecified() && advertised.is_ipv4());
    inputs.overrides = vec![set("server.advertise_host", "10.9.8.7")];
    assert_eq!(good(&inputs).server.advertised().to_string(), "10.9.8.7");
}
