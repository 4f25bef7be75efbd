//! The program itself: a tiny run of `hop`, its JSON, its exit status, and what it leaves behind.

use std::fs;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn bench() -> Command {
    Command::new(env!("CARGO_BIN_EXE_corelane-bench"))
}

fn children_of(pid: u32) -> Vec<u32> {
    let mut all = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        all.extend(
            list.split_ascii_whitespace()
                .filter_map(|c| c.parse::<u32>().ok()),
        );
    }
    all
}

#[test]
fn a_tiny_run_reports_every_arm() {
    let output = bench()
        .args([
            "hop",
            "--vs",
            "none",
            "--connections",
            "1,4",
            "--rounds",
            "2",
        ])
        .args(["--seconds", "0.05", "--warmup", "0.02", "--json", "-"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(
        errors.contains("closed loop, 4 connections"),
        "no table: {errors}"
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["schema"], "corelane-bench/hop/1");
    let loads = report["loads"].as_array().unwrap();
    assert_eq!(loads.len(), 2);
    for load in loads {
        let arms = load["arms"].as_array().unwrap();
        let names: Vec<_> = arms
            .iter()
            .map(|arm| arm["arm"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["direct", "direct-again"]);
        for arm in arms {
            assert_eq!(arm["rounds"].as_array().unwrap().len(), 2);
            let latency = |q: &str| arm["latency_us"][q].as_f64().unwrap();
            assert!(
                latency("p50") > 0.0 && latency("p50") <= latency("max"),
                "{arm:#}"
            );
            assert!(arm["requests_per_s"].as_f64().unwrap() > 100.0, "{arm:#}");
            assert!(
                arm["cpu_us_per_request"]["sink"].as_f64().unwrap() > 0.0,
                "{arm:#}"
            );
        }
        assert!(
            arms[1]["ratio_to_direct"]["p50"]["median"]
                .as_f64()
                .unwrap()
                > 0.0
        );
    }
}

#[test]
fn an_open_loop_keeps_its_rate() {
    let output = bench()
        .args([
            "hop",
            "--vs",
            "none",
            "--rate",
            "2000",
            "--arrivals",
            "even,burst8",
        ])
        .args([
            "--rounds",
            "1",
            "--seconds",
            "0.4",
            "--warmup",
            "0.05",
            "--json",
            "-",
        ])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for load in report["loads"].as_array().unwrap() {
        let arm = &load["arms"][0];
        assert_eq!(arm["latency_us"]["count"], 800, "{load:#}");
        assert!(arm["send_lag_us"]["p50"].as_f64().is_some(), "{load:#}");
    }
}

#[test]
fn a_signal_ends_it_and_what_it_started() {
    let mut run = bench()
        .args(["hop", "--vs", "none", "--seconds", "600"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut children = Vec::new();
    while children.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
        children = children_of(run.id());
    }
    let pid = Pid::from_raw(run.id().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let mut text = String::new();
    run.stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    let status = run.wait().unwrap();
    assert!(!children.is_empty(), "the sink never started");
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("stopped by a signal"), "{text}");
    for child in children {
        assert!(
            !fs::exists(format!("/proc/{child}")).unwrap(),
            "the sink lives on"
        );
    }
}

#[test]
fn bad_usage_is_told_apart() {
    for arguments in [
        &["hop", "--rounds", "0"][..],
        &["hop", "--rate", "0.01"],
        &["hop", "--pin", "server=1"],
        &["hop", "--arrivals", "uniform"],
        &[
            "stock",
            "--dyn-worker",
            "/no/such",
            "--dyn-client",
            "/no/such",
        ],
        &[
            "stock",
            "--dyn-worker",
            "sh",
            "--dyn-client",
            "sh",
            "--loads",
            "closed:0",
        ],
    ] {
        let output = bench().args(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {errors}");
        assert!(!errors.contains("panicked"), "{arguments:?}: {errors}");
    }
}
