//! `corelane env` knows every name that the description of Dynamo knows, and says of each what
//! becomes of it.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

/// Every name, in the order of the sections that have it first.
const NAMES: &str = include_str!("data/environment-names.txt");

fn env(args: &[&str], set: &[(&str, &str)]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    command.arg("env").args(args).env_clear();
    let output = command.envs(set.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn rows(set: &[(&str, &str)]) -> BTreeMap<String, Value> {
    let listing: Value = serde_json::from_str(&env(&["--json"], set)).unwrap();
    assert_eq!(listing["schema"], "corelane.env/1");
    let rows = listing["variables"].as_array().unwrap().iter();
    let named: Vec<(String, Value)> = rows
        .map(|row| (row["name"].as_str().unwrap().to_owned(), row.clone()))
        .collect();
    let map: BTreeMap<String, Value> = named.iter().cloned().collect();
    assert_eq!(map.len(), named.len(), "a name stands twice");
    map
}

#[test]
fn no_name_of_the_description_is_missing() {
    let rows = rows(&[]);
    let text = env(&[], &[]);
    let names = NAMES.lines().filter(|line| !line.starts_with('#'));
    assert!(names.clone().count() > 120);
    for name in names {
        let row = rows.get(name);
        let row = row.unwrap_or_else(|| panic!("{name} has no row"));
        for key in ["group", "default", "unit", "effect"] {
            assert!(!row[key].as_str().unwrap().is_empty(), "{name}: no {key}");
        }
        let honoured = row["standing"] == "honoured";
        assert_eq!(row["reason"].is_null(), honoured, "{name}");
        assert!(text.contains(&format!("\n  {name}: ")), "{name}");
    }
}

#[test]
fn units_are_those_of_the_name() {
    let rows = rows(&[]);
    let unit = |name: &str| {
        let text = |key| rows[name][key].as_str().unwrap_or_default().to_owned();
        (text("unit"), text("default"))
    };
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(unit("DYN_TCP_REQUEST_TIMEOUT"), pair("seconds", "5"));
    assert_eq!(
        unit("DYN_DISCOVERY_BACKEND"),
        pair("mem | file | etcd", "mem, while Dynamo's is etcd")
    );
}

#[test]
fn values_are_shown_where_they_are_set() {
    let set = [
        ("ETCD_ENDPOINTS", "http://a:1"),
        ("ETCD_AUTH_PASSWORD", "s3cret"),
        ("CORELANE_IO", "epoll"),
        ("HOSTNAME", "h"),
    ];
    let rows = rows(&set);
    assert_eq!(rows["ETCD_ENDPOINTS"]["value"], "http://a:1");
    assert_eq!(rows["ETCD_ENDPOINTS"]["key"], "discovery.endpoints");
    assert_eq!(rows["ETCD_AUTH_PASSWORD"]["value"], "(hidden)");
    assert_eq!(rows["CORELANE_IO"]["value"], "epoll");
    assert_eq!(rows["HOSTNAME"]["value"], "h");
    assert!(rows["DYN_LOG"]["value"].is_null());
    let only = env(&["--set"], &set);
    assert_eq!(only.matches("\n    = ").count(), set.len(), "{only}");
    assert!(!only.contains("s3cret"));
}
