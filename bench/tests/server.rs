//! `server` against a worker of this process: its reports in all their forms, thresholds, saved
//! runs; and that the reports of every command are as `schema.json` says.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use corelane::component::{Options, Outcome, Request, Runtime, Stream};
use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(120);

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_corelane-bench"))
        .args(arguments)
        .output()
        .unwrap()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a command that must do well; its JSON.
fn report(arguments: &[&str]) -> Value {
    let output = bench(&[arguments, &["--json", "-"]].concat());
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        errors(&output)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

async fn echo(request: Request, stream: &mut Stream) -> Outcome {
    let value: Value = request.parse()?;
    for _ in 0..2 {
        stream.send(&value).await?;
    }
    Ok(())
}

/// Starts a worker that lives as long as this process; where it is called.
fn worker() -> String {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let options = Options::local().unwrap().shards(1).signals(false);
        let run = Runtime::run(options.status(None), async |runtime| {
            let endpoint = runtime.endpoint("bench/worker/generate")?;
            let served = endpoint.serve(echo).await?;
            sender.send(served.called_at().unwrap()).unwrap();
            runtime.stopping().await;
            Ok(())
        });
        run.unwrap();
    });
    receiver.recv_timeout(LONG).unwrap()
}

fn check(report: &Value, schema: &Value) {
    let validator = jsonschema::validator_for(schema).unwrap();
    // The part for its kind alone says more about what is wrong.
    let kind = report["schema"]
        .as_str()
        .unwrap_or_default()
        .split('/')
        .nth(1);
    let mut part = schema.clone();
    let members = part.as_object_mut().unwrap();
    members.remove("oneOf");
    let place = format!("#/$defs/{}", kind.unwrap_or_default());
    members.insert("$ref".into(), json!(place));
    let detailed = jsonschema::validator_for(&part).unwrap();
    let wrong: Vec<String> = detailed
        .iter_errors(report)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(wrong.is_empty(), "{kind:?}: {wrong:#?}");
    assert!(validator.is_valid(report));
}

fn schema() -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema.json");
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

/// A run of two windows of half a second, 100 requests/s.
const RUN: [&str; 12] = [
    "--rate",
    "100",
    "--arrivals",
    "even",
    "--rounds",
    "2",
    "--seconds",
    "0.5",
    "--warmup",
    "0.1",
    "--timeout",
    "100",
];

#[test]
fn a_run_is_told_in_every_form() {
    let (address, dir) = (worker(), tempfile::tempdir().unwrap());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let target = ["server", "--address", &address];
    let first = report(&[&target, &RUN[..]].concat());
    check(&first, &schema());
    let kept = path("kept.json");
    fs::write(&kept, first.to_string()).unwrap();
    let others = format!("other={address},before={kept}");
    let files = ["page.html", "plots.svg", "run.hlog", "tables"].map(path);
    let [html, svg, hlog, tables] = &files;
    let wanted = ["--html", html, "--svg", svg, "--hlog", hlog];
    let more = [
        "--vs",
        &others,
        "--interval",
        "0.25",
        "--percentiles",
        tables,
    ];
    let second = report(&[&target, &RUN[..], &wanted, &more].concat());
    check(&second, &schema());
    check_arms(&second["loads"][0]);
    let saved = &second["loads"][0]["saved"][0];
    assert_eq!(saved["name"], "before");
    assert_eq!(saved["when"], first["when"]);
    let p99 = &saved["target_to_it"]["p99"]["median"];
    assert!(p99.as_f64().unwrap() > 0.0, "{saved:#}");
    check_files(files.each_ref().map(Path::new));
}

fn check_arms(load: &Value) {
    let arms = load["arms"].as_array().unwrap();
    let names = arms.iter().map(|arm| arm["arm"].as_str().unwrap());
    let names: Vec<_> = names.collect();
    assert_eq!(names, ["target", "other", "target-again"]);
    for arm in arms {
        // All that were due, and each step after the one before.
        assert_eq!(arm["latency_us"]["count"], 100, "{arm:#}");
        let max = |name: &str| arm[name]["max"].as_f64().unwrap();
        assert!(max("ack_us") > 0.0, "{arm:#}");
        assert!(max("first_item_us") <= max("end_us"), "{arm:#}");
        let cpu = &arm["cpu_us_per_request"]["server"];
        assert!(cpu.as_f64().unwrap() > 0.0, "{arm:#}");
        assert_eq!(arm["errors"], 0);
    }
    let ratio = &arms[1]["ratio_to_target"]["p50"]["median"];
    assert!(ratio.as_f64().unwrap() > 0.0);
}

fn check_files([html, svg, hlog, tables]: [&Path; 4]) {
    let page = fs::read_to_string(html).unwrap();
    assert!(page.matches("<svg").count() >= 3 && page.contains("target-again"));
    for foreign in ["src=", "<link", "<script", "@import"] {
        assert!(
            !page.contains(foreign),
            "{foreign}: the page needs something else"
        );
    }
    assert!(fs::read_to_string(svg).unwrap().starts_with("<svg"));
    let log = fs::read(hlog).unwrap();
    let entries = IntervalLogIterator::new(&log).map(Result::unwrap);
    let intervals = entries.filter(|entry| matches!(entry, LogEntry::Interval(_)));
    assert_eq!(
        intervals.count(),
        3 * 2 * 2,
        "arms, rounds, intervals of a round"
    );
    assert_eq!(fs::read_dir(tables).unwrap().count(), 3);
}

#[test]
fn a_sweep_finds_what_the_server_can_do() {
    let address = worker();
    let sweep = format!("server --address {address} --rounds 1 --seconds 0.3 --warmup 0.05");
    let found = report(&sweep.split_whitespace().collect::<Vec<_>>());
    check(&found, &schema());
    assert_eq!(found["settings"]["sweep"], true);
    let rates: Vec<f64> = found["loads"]
        .as_array()
        .unwrap()
        .iter()
        .map(|load| load["rate"].as_f64().unwrap())
        .collect();
    assert!(
        rates.len() > 1 && rates.windows(2).all(|two| two[0] < two[1]),
        "{rates:?}"
    );
    assert!(found["knee"]["target"].is_object(), "{:#}", found["knee"]);
}

#[test]
fn broken_thresholds_fail_the_run_and_are_named() {
    let (address, dir) = (worker(), tempfile::tempdir().unwrap());
    let run = |bounds: &str| {
        let file = dir.path().join("bounds.toml");
        fs::write(&file, bounds).unwrap();
        let load = "--rate 50 --arrivals even --rounds 1 --seconds 0.4 --timeout 100";
        let target = format!("server --address {address} {load} --thresholds");
        let words: Vec<&str> = target.split_whitespace().collect();
        bench(&[&words[..], &[file.to_str().unwrap()]].concat())
    };
    let kept = run("[[threshold]]\nvalue = \"latency_us/p50\"\nmax = 600000000\n");
    assert!(kept.status.success(), "{}", errors(&kept));
    let broken = run("[[threshold]]\narm = \"target\"\nvalue = \"latency_us/p50\"\nmax = 0.001\n");
    assert_eq!(broken.status.code(), Some(1), "{}", errors(&broken));
    let text = errors(&broken);
    assert!(
        text.contains("latency_us/p50 of target under open loop, 50 requests/s even"),
        "{text}"
    );
    let wrong = run("[[threshold]]\nvalue = \"latency_us/p50\"\n");
    assert_eq!(wrong.status.code(), Some(2), "{}", errors(&wrong));
}

#[test]
fn what_cannot_be_called_is_told() {
    let nobody = bench(&[
        "server",
        "--address",
        "127.0.0.1:1/0/a/b/c",
        "--timeout",
        "20",
    ]);
    assert_eq!(nobody.status.code(), Some(1), "{}", errors(&nobody));
    assert!(
        errors(&nobody).contains("does not answer"),
        "{}",
        errors(&nobody)
    );
    for bad in [
        &["server"][..],
        &["server", "--address", "127.0.0.1:1"],
        &["server", "--address", "127.0.0.1:1/0/a/b/c", "--rate", "0"],
        &[
            "server",
            "--address",
            "127.0.0.1:1/0/a/b/c",
            "--vs",
            "/no/such.json",
        ],
    ] {
        let output = bench(bad);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{bad:?}: {}",
            errors(&output)
        );
    }
}

#[test]
fn reports_of_all_commands_follow_the_schema() {
    let schema = schema();
    let check_line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        check(&report(&words), &schema);
    };
    let short = "--rounds 1 --seconds 0.05 --warmup 0.02";
    check_line(&format!("hop --vs none --connections 1 {short}"));
    check_line("event-codec --rounds 1 --events 10 --no-instructions");
    check_line("kv --blocks 2000 --prompt-blocks 16 --lookups 10 --rounds 1 --no-instructions");
    let bench = Path::new(env!("CARGO_BIN_EXE_corelane-bench"));
    if bench.with_file_name("corelane").exists() {
        let events = "events --publishers 1 --subscribers 1 --bytes 200";
        check_line(&format!("{events} {short}"));
        check_line(&format!("lane --bodies 128 {short}"));
        check_line("gms --waiting 1 --turns 3 --kills 1 --warmup 1 --rounds 1");
    } else {
        println!("left out: there is no corelane beside corelane-bench");
    }
    // What was kept, of commands that want programs which are not here too.
    let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("runs");
    for entry in fs::read_dir(runs).into_iter().flatten().flatten() {
        let path = entry.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            let text = fs::read_to_string(path).unwrap();
            check(&serde_json::from_str(&text).unwrap(), &schema);
        }
    }
}
