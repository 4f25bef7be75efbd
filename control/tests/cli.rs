//! The program as a shell sees it: exit codes, what goes to which output, and the form of JSON.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn corelane(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    command
        .args(args)
        .env_clear()
        .envs(env.iter().copied())
        .stdin(Stdio::null());
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn example(name: &str) -> String {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../examples")
        .join(name);
    path.to_string_lossy().into_owned()
}

/// A file with this text, and its path.
fn file(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("corelane.toml");
    std::fs::write(&path, text).unwrap();
    let path = path.to_string_lossy().into_owned();
    (folder, path)
}

#[test]
fn every_command_helps_with_examples() {
    let commands: [&[&str]; 12] = [
        &[],
        &["up"],
        &["serve"],
        &["check"],
        &["env"],
        &["worker", "echo"],
        &["call"],
        &["gms"],
        &["gms", "probe"],
        &["trace", "extract"],
        &["doctor"],
        &["reload"],
    ];
    for command in commands {
        let output = corelane(&[command, &["--help"]].concat(), &[]);
        assert_eq!(output.status.code(), Some(0), "{command:?}");
        let help = text(&output.stdout);
        assert!(
            help.contains("\nExamples:\n  corelane "),
            "{command:?}: {help}"
        );
        assert!(
            help.lines().all(|line| line.chars().count() <= 100),
            "{help}"
        );
        assert!(output.stderr.is_empty());
    }
}

#[test]
fn bad_usage_is_two_and_goes_to_standard_error() {
    let lines: [&[&str]; 7] = [
        &[],
        &["chek"],
        &["up", "--worker"],
        &["call", "--endpoint", "a/b/c", "--count", "many"],
        &["call", "--endpoint", "a/b/c"],
        &["worker", "echo"],
        &["check", "--set", "core.io"],
    ];
    for line in lines {
        let output = corelane(line, &[]);
        assert_eq!(output.status.code(), Some(2), "{line:?}");
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{line:?}"
        );
    }
}

#[test]
fn check_passes_every_example() {
    for entry in std::fs::read_dir(example("")).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            let path = path.to_string_lossy().into_owned();
            // A machine may have other CPUs than the examples name.
            let cpus = corelane::config::Host::current().cpu_list();
            let output = corelane(&["check", "--config", &path], &[("CORELANE_CPUS", &cpus)]);
            let out = text(&output.stdout);
            assert_eq!(output.status.code(), Some(0), "{out}");
            assert!(out.contains(&format!("{path}: ok")), "{out}");
            assert!(output.stderr.is_empty());
        }
    }
}

#[test]
fn check_says_all_that_is_wrong_and_serve_says_the_same() {
    let (_folder, path) = file("[server]\nport = 70000\nhots = 1\n");
    let expected = [
        format!(
            "{path}:1:1: there is no [[route]], so nothing would be served; \
                 write [[route]] with listen and target below it"
        ),
        format!("{path}:2:8: port is 70000, outside 0 to 65535 (port); write 65535"),
        format!("{path}:3:1: unknown key \"hots\" in [server]; did you mean \"host\"?"),
    ];
    let check = corelane(&["check", "--config", &path], &[]);
    assert_eq!(check.status.code(), Some(2));
    let said = text(&check.stdout);
    assert_eq!(
        said,
        format!("{}\n{path}: 3 errors, 0 warnings\n", expected.join("\n"))
    );
    let serve = corelane(&["serve"], &[("CORELANE_CONFIG", &path)]);
    assert_eq!(serve.status.code(), Some(2));
    assert!(serve.stdout.is_empty());
    let said = text(&serve.stderr);
    let line = expected.join("\n");
    let last = said
        .split_once("corelane: configuration has 3 errors\n")
        .unwrap()
        .1;
    assert_eq!(last.trim_end(), line);
}

#[test]
fn the_json_form_is_stable() {
    let (_folder, path) = file("[server]\nport = 70000\n");
    let set = [
        "check",
        "--config",
        &path,
        "--json",
        "--set",
        "discovery.password=hunter2",
    ];
    let output = corelane(&set, &[("ETCD_LEASE_TTL", "9"), ("DYN_TCP_RPC_PROT", "1")]);
    assert_eq!(output.status.code(), Some(2));
    let out = text(&output.stdout);
    assert!(!out.contains("hunter2"));
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["schema"], "corelane.check/1");
    assert_eq!(
        (&report["file"], &report["ok"]),
        (&path.clone().into(), &false.into())
    );
    let error = serde_json::json!({
        "origin": "file", "file": path, "line": 2, "column": 8, "name": null,
        "what": "port is 70000, outside 0 to 65535 (port)", "instead": "write 65535",
    });
    assert!(
        report["errors"].as_array().unwrap().contains(&error),
        "{out}"
    );
    let used = |key: &str| {
        let settings = report["settings"].as_array().unwrap();
        settings
            .iter()
            .find(|setting| setting["key"] == key)
            .unwrap()
            .clone()
    };
    assert_eq!(used("discovery.lease_ttl_s")["name"], "ETCD_LEASE_TTL");
    assert_eq!(used("discovery.lease_ttl_s")["value"], "9");
    assert_eq!(used("discovery.password")["origin"], "flag");
    assert_eq!(used("server.advertise_host")["value"], Value::Null);
    let environment = report["environment"].as_array().unwrap();
    let levels: Vec<&Value> = environment
        .iter()
        .map(|variable| &variable["level"])
        .collect();
    assert_eq!(levels, ["warn", "info"]);
}

#[test]
fn explain_shows_where_a_value_came_from() {
    let path = example("minimal.toml");
    let args = ["check", "--explain", "--config", &path];
    let output = corelane(&args, &[("DYN_TCP_RPC_PORT", "7000")]);
    let out = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{out}");
    assert!(
        out.contains("    server.port = 7000 (environment DYN_TCP_RPC_PORT)\n"),
        "{out}"
    );
    assert!(out.contains(&format!(
        "    route[0].listen = dynamo/router/generate ({path}:"
    )));
}

#[test]
fn explain_has_a_table_for_each_core() {
    let (folder, path) = file(
        "[core]\ncpus = \"0\"\nbuffers = 64\n[[route]]\nlisten = \"a/b/c\"\n\
                 target = \"a/b/d\"\n",
    );
    std::fs::create_dir(folder.path().join("cores.d")).unwrap();
    let own = folder.path().join("cores.d/0.toml");
    std::fs::write(&own, "[core]\nidle = \"spin\"\n").unwrap();
    let args = [
        "check",
        "--explain",
        "--config",
        &path,
        "--set",
        "core.ring_depth=64",
    ];
    let output = corelane(&args, &[("CORELANE_IO", "epoll")]);
    let out = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{out}");
    let (_, table) = out.split_once("core 0 on CPU 0\n").expect(&out);
    let rows: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let own = format!("{}:2:8", own.display());
    for row in [
        vec!["idle", "spin", &own],
        vec!["buffers", "64", &format!("{path}:")],
        vec!["io", "epoll", "environment", "CORELANE_IO"],
        vec!["ring_depth", "64", "flag", "--set", "core.ring_depth"],
        vec!["connections_max", "16384", "default"],
    ] {
        let fits = |found: &&Vec<&str>| {
            let mut cells = found.iter().zip(&row);
            found.len() == row.len() && cells.all(|(cell, begin)| cell.starts_with(begin))
        };
        assert!(rows.iter().any(|found| fits(&found)), "{row:?}\n{out}");
    }
    assert!(
        out.contains("64 to 32768; default 512; needs a restart\n"),
        "{out}"
    );
    assert!(out.contains("default 2000; live\n"), "{out}");
}

#[test]
fn the_environment_is_reported_on_standard_error() {
    let (_folder, path) = file("");
    let set = [
        ("NATS_SERVER", "nats://a:1"),
        ("DYN_LOGGING_JSONL", "1"),
        ("ETCD_LEASE_TTL", "9"),
    ];
    let output = corelane(&["serve", "--config", &path], &set);
    let log = text(&output.stderr);
    let messages: Vec<Value> = (log.lines())
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["message"].clone())
        .collect();
    assert_eq!(
        messages,
        [
            "environment DYN_LOGGING_JSONL: makes log lines JSON when on",
            "environment ETCD_LEASE_TTL: sets lease_ttl_s of [discovery]",
            "environment NATS_SERVER: is the NATS server",
        ]
    );
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let path = example("corelane.toml");
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    command
        .args(["check", "--explain", "--config", &path])
        .env_clear();
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stderr)),
        (Some(0), String::new())
    );
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    let output = command
        .arg("check")
        .env_clear()
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stdout).starts_with("corelane.toml:1:1: cannot be read: no such file"));
}
