//! A tiny run of `gms`, its JSON, and what it leaves behind.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn a_tiny_run_reports_every_step() {
    let bench = Path::new(env!("CARGO_BIN_EXE_corelane-bench"));
    let corelane = bench.with_file_name("corelane");
    let knows = Command::new(&corelane).args(["gms", "--help"]).output();
    if !knows.is_ok_and(|done| done.status.success()) {
        println!("left out: there is no corelane beside corelane-bench");
        return;
    }
    let mut command = Command::new(bench);
    command.args([
        "gms",
        "--waiting",
        "1,3",
        "--rounds",
        "2",
        "--turns",
        "5",
        "--kills",
        "1",
    ]);
    command
        .args(["--warmup", "1", "--json", "-"])
        .arg("--corelane")
        .arg(&corelane);
    let python = std::env::var_os("CORELANE_TEST_PYTHON").filter(|path| !path.is_empty());
    command.arg("--python");
    match &python {
        Some(python) => command.arg(python),
        None => command.arg("none"),
    };
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    if python.is_none() {
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(errors.contains("--python none has no msgspec"), "{errors}");
        return;
    }
    assert!(output.status.success(), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["schema"], "corelane-bench/gms/1");
    // The service, the same again, and asyncio.
    assert_eq!(report["arms"].as_array().unwrap().len(), 3);
    for arm in report["arms"].as_array().unwrap() {
        for load in arm["loads"].as_array().unwrap() {
            for (step, times) in [
                ("grant", 10),
                ("commit", 10),
                ("allocate", 40),
                ("export", 40),
            ] {
                assert_eq!(load["steps"][step]["latency_us"]["count"], times, "{step}");
            }
            assert_eq!(load["steps"]["handover"]["latency_us"]["count"], 2);
        }
    }
}
