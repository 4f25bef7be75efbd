//! Dynamo's own client and worker as benches start and read them, and what is counted around each
//! run of the client.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::cpu::{Machine, Usage};
use crate::report::{Quantiles, interleave, round};
use crate::servers::{Server, find_program, free_address};
use crate::stock_report::Round;
use crate::usage_error;

/// The namespace of all that is called.
pub(crate) const NAMESPACE: &str = "bench";
/// The endpoint of all that is called.
pub(crate) const ENDPOINT: &str = "generate";
/// What a client may take besides its load: discovery, and the drain at the end.
pub(crate) const CLIENT_LIMIT: Duration = Duration::from_secs(60);

/// A program that has to be there; `flag` says how it can be named.
pub(crate) fn program(path: &Path, flag: &str) -> Result<PathBuf> {
    find_program(path)
        .ok_or_else(|| usage_error(format!("{} is not there ({flag})", path.display())))
}

/// A worker or a client of Dynamo's on the endpoint of `component`.
pub(crate) fn peer(program: &Path, component: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["--no-logging", "--namespace", NAMESPACE]);
    command.args(["--component", component, "--endpoint", ENDPOINT]);
    command
}

/// Starts a worker, and waits until it says that it is ready; with what it said.
pub(crate) fn start_ready(name: &str, command: Command, dir: &Path) -> Result<(Server, Value)> {
    let mut server = Server::start(name, command, dir, None)?;
    let out = server.stdout.clone();
    let ready = server.wait_until("to be ready", || {
        let text = fs::read_to_string(&out).ok()?;
        let lines = text.lines();
        let mut said = lines.filter_map(|line| serde_json::from_str(line).ok());
        said.find(|said: &Value| said["ready"] == true)
    })?;
    Ok((server, ready))
}

/// What a client that has ended has reported.
pub(crate) fn last_report(client: &Server) -> Result<Value> {
    let text = fs::read_to_string(&client.stdout).context("the client left no report")?;
    let mut lines = text.lines().rev();
    let found = lines.find_map(|line| serde_json::from_str(line).ok());
    found.context("the client printed no JSON report")
}

/// All rounds of one load, arm after arm, the direction alternating; the rounds of each arm.
pub(crate) fn rounds(
    count: usize,
    load: &str,
    arms: &[impl AsRef<str>],
    mut slice: impl FnMut(usize, usize) -> Result<Round>,
) -> Result<Vec<Vec<Round>>> {
    let mut records: Vec<Vec<Round>> = arms.iter().map(|_| Vec::new()).collect();
    interleave(load, count, arms, |number, index| {
        let name = arms[index].as_ref();
        let round = slice(number, index);
        records[index].push(round.with_context(|| format!("arm {name}, {load}"))?);
        Ok(())
    })?;
    Ok(records)
}

/// What is read before and after each run of the client.
pub(crate) struct Counters {
    pub(crate) at: Instant,
    pub(crate) worker: Usage,
    pub(crate) corelane: Option<Usage>,
    pub(crate) etcd: Usage,
    pub(crate) machine: Machine,
}

/// One round out of the client's report and what was read around it.
pub(crate) fn round_of(
    number: usize,
    found: &Value,
    before: &Counters,
    after: &Counters,
    hiccup_us: Quantiles,
) -> Result<Round> {
    let count = |name: &str| {
        found[name]
            .as_f64()
            .with_context(|| format!("the client's report lacks {name}"))
    };
    // The servers are watched over the whole run of the client, so warm-up calls count too.
    let calls = count("calls_with_warmup")?.max(1.0);
    let worker = after.worker.since(before.worker);
    let etcd = after.etcd.since(before.etcd);
    let corelane = after
        .corelane
        .zip(before.corelane)
        .map(|(after, before)| after.since(before));
    let client_us = found["cpu"]["client"]["us_per_request"]
        .as_f64()
        .unwrap_or(0.0);
    let per_call = |usage: Usage| round(usage.cpu_us() / calls);
    let corelane_us = corelane.map_or(0.0, per_call);
    let seconds = (after.at - before.at).as_secs_f64();
    let (_, stolen_us) = after.machine.since_us(before.machine);
    Ok(Round {
        round: number,
        first_item_us: quantiles(&found["first_item_us"]),
        last_item_us: quantiles(&found["last_item_us"]),
        send_lag_p99_us: found["send_lag_us"]["p99"].as_f64(),
        requests_per_s: count("throughput_rps")?,
        client_cpu_us: client_us,
        worker_cpu_us: per_call(worker),
        corelane_cpu_us: corelane_us,
        etcd_cpu_us: per_call(etcd),
        all_cpu_us: round(client_us + per_call(worker) + corelane_us),
        worker_switches: round(worker.voluntary as f64 / calls),
        corelane_switches: corelane.map_or(0.0, |used| round(used.voluntary as f64 / calls)),
        errors: count("errors")? as u64,
        hiccup_us,
        stolen_cores: round(stolen_us / 1e6 / seconds),
    })
}

fn quantiles(summary: &Value) -> Option<Quantiles> {
    let value = |name: &str| summary[name].as_f64();
    Some(Quantiles {
        p50: value("p50")?,
        p90: value("p90")?,
        p99: value("p99")?,
        p999: value("p99.9")?,
        max: value("max")?,
        count: 0,
    })
}

/// An etcd of our own, and its URL.
pub(crate) fn start_etcd(program: &Path, dir: &Path) -> Result<(Server, String)> {
    let (clients, peers) = (free_address()?, free_address()?);
    let (client_url, peer_url) = (format!("http://{clients}"), format!("http://{peers}"));
    let mut command = Command::new(program);
    command
        .arg("--data-dir")
        .arg(dir.join("etcd.data"))
        .args(["--log-level", "warn"])
        .args([
            "--listen-client-urls",
            &client_url,
            "--advertise-client-urls",
            &client_url,
        ])
        .args([
            "--listen-peer-urls",
            &peer_url,
            "--initial-advertise-peer-urls",
            &peer_url,
        ])
        .args(["--initial-cluster", &format!("default={peer_url}")]);
    let mut etcd = Server::start("etcd", command, dir, None)?;
    etcd.wait_listening(clients)?;
    Ok((etcd, client_url))
}

/// Loopback only: left alone, Dynamo takes the first address that is not.
pub(crate) fn loopback_variables(etcd_url: &str) -> Vec<(String, String)> {
    [
        ("ETCD_ENDPOINTS", etcd_url),
        ("DYN_REQUEST_PLANE", "tcp"),
        ("DYN_TCP_RPC_HOST", "127.0.0.1"),
        ("DYN_TCP_RESPONSE_STREAM_HOST", "127.0.0.1"),
    ]
    .map(|(name, value)| (name.to_string(), value.to_string()))
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(worker_ns: u64, corelane_ns: Option<u64>, at: Instant) -> Counters {
        let used = |run_ns| Usage {
            run_ns,
            voluntary: run_ns / 1000,
            ..Usage::default()
        };
        Counters {
            at,
            worker: used(worker_ns),
            corelane: corelane_ns.map(used),
            etcd: used(0),
            machine: Machine::default(),
        }
    }

    #[test]
    fn a_report_of_the_client_becomes_a_round() {
        let found = serde_json::json!({
            "calls_with_warmup": 200, "throughput_rps": 100.0, "errors": 0,
            "first_item_us": {"p50": 80.0, "p90": 90.0, "p99": 99.0, "p99.9": 120.0, "max": 130.0},
            "last_item_us": null, "send_lag_us": {"p99": 3.0},
            "cpu": {"client": {"us_per_request": 40.0}},
        });
        let start = Instant::now();
        let before = counters(1_000_000, Some(0), start);
        let after = counters(5_000_000, Some(2_000_000), start + Duration::from_secs(1));
        let round = round_of(3, &found, &before, &after, Quantiles::default()).unwrap();
        assert_eq!((round.worker_cpu_us, round.corelane_cpu_us), (20.0, 10.0));
        assert_eq!((round.all_cpu_us, round.worker_switches), (70.0, 20.0));
        assert_eq!(round.first_item_us.unwrap().p999, 120.0);
        assert_eq!(round.last_item_us, None);
        let error = round_of(0, &Value::Null, &before, &after, Quantiles::default()).unwrap_err();
        assert!(error.to_string().contains("calls_with_warmup"), "{error}");
    }
}
