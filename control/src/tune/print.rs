//! A plan for people, for a shell, and for systemd.

use std::fmt::Write;

use super::{Item, Place, Plan, Standing};

/// The plan as lines; `all` adds what is as it should be.
pub fn text(plan: &Plan, all: bool) -> String {
    let mut out = String::new();
    let shown = |item: &&Item| all || item.standing == Standing::Change;
    for item in plan.items.iter().filter(shown) {
        let (mark, value) = match item.standing {
            Standing::Fine => ("ok    ", item.now.clone()),
            Standing::Change => ("change", format!("{} -> {}", word(&item.now), item.wanted)),
        };
        let _ = writeln!(out, "{mark}  {}: {value}", item.name);
        if item.standing == Standing::Change {
            let _ = writeln!(out, "        why:  {}", item.why);
            let _ = writeln!(out, "        set:  {}", command(&item.place, &item.wanted));
            if !matches!(item.place, Place::Limit(_)) {
                let _ = writeln!(out, "        back: {}", command(&item.place, &item.now));
            }
        }
    }
    for note in &plan.notes {
        let _ = writeln!(out, "note    {note}");
    }
    let changes = plan.changes().count();
    let fine = plan.items.len() - changes;
    let _ = match changes {
        0 => writeln!(out, "{fine} settings are as they should be"),
        1 => writeln!(out, "1 change, {fine} settings are as they should be"),
        _ => writeln!(
            out,
            "{changes} changes, {fine} settings are as they should be"
        ),
    };
    out
}

fn word(value: &str) -> &str {
    if value.is_empty() { "(empty)" } else { value }
}

/// What does the change in a shell.
pub fn command(place: &Place, value: &str) -> String {
    match place {
        Place::File(path) => format!(
            "echo {} > {}",
            quoted(value),
            quoted(&path.to_string_lossy())
        ),
        Place::Ethtool {
            device,
            flag,
            option,
        } => format!(
            "ethtool {flag} {} {option} {}",
            quoted(device),
            quoted(value)
        ),
        Place::Limit(name) => format!("{name}={value} in the unit"),
    }
}

/// As one word of a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:,+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A shell script that makes the changes, and with `undo` takes them back.
pub fn script(plan: &Plan) -> String {
    let mut apply = String::new();
    let mut undo = Vec::new();
    for item in plan.changes() {
        if matches!(item.place, Place::Limit(_)) {
            continue;
        }
        let _ = writeln!(apply, "    # {}: {}", item.name, item.why);
        let _ = writeln!(apply, "    {}", command(&item.place, &item.wanted));
        undo.push(format!("    {}\n", command(&item.place, &item.now)));
    }
    let undo: String = undo.into_iter().rev().collect();
    [
        "#!/bin/sh",
        "# Made by corelane tune for one host. To be run as root.",
        "#   apply   make the changes (the default)",
        "#   undo    what was before",
        "apply() {",
        "    :",
        &format!("{apply}}}"),
        "undo() {",
        "    :",
        &format!("{undo}}}"),
        "case ${1:-apply} in",
        "    apply) apply ;;",
        "    undo) undo ;;",
        "    *) echo \"usage: $0 [apply|undo]\" >&2; exit 2 ;;",
        "esac\n",
    ]
    .join("\n")
}

/// A drop-in of systemd for the unit: limits of the process, and where it may run.
pub fn drop_in(plan: &Plan) -> String {
    let mut out = String::from("# Made by corelane tune.\n[Service]\n");
    for item in &plan.items {
        if let Place::Limit(name) = &item.place {
            let _ = writeln!(out, "# {}\n{name}={}", item.why, item.wanted);
        }
    }
    out
}
