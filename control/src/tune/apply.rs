//! Changing what a plan says, and taking it back: the record of what was is written first.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Item, Place, Plan, View, chosen};

/// Where the record lies if nobody says otherwise.
pub const RECORD: &str = "/var/lib/corelane/tune.json";

/// A change that was made, or begun.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Done {
    /// The setting's name.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// What it was before the first change.
    pub was: String,
    /// What it was changed to.
    pub set: String,
}

/// All changes, oldest first.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Record {
    /// What was changed.
    pub done: Vec<Done>,
}

/// Why the record cannot be kept. Without it nothing is changed.
#[derive(Debug, Error)]
pub enum RecordError {
    /// It cannot be read.
    #[error("cannot read the record {0}: {1}")]
    Read(String, io::Error),
    /// It is not one.
    #[error("{0} is not a record of corelane tune: {1}; move it away, or name another --record")]
    Parse(String, serde_json::Error),
    /// It cannot be written.
    #[error(
        "cannot write the record {0}: {1}; nothing was changed. Run as root, or name another \
         --record"
    )]
    Write(String, io::Error),
}

impl Record {
    /// Reads it; one that is not there is empty.
    ///
    /// # Errors
    /// It is there and cannot be read.
    pub fn read(path: &Path) -> Result<Self, RecordError> {
        let shown = || path.display().to_string();
        match fs::read(path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|error| RecordError::Parse(shown(), error))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(RecordError::Read(shown(), error)),
        }
    }

    /// Writes it whole or not at all; an empty one is removed.
    fn write(&self, path: &Path) -> Result<(), RecordError> {
        let failed = |error| RecordError::Write(path.display().to_string(), error);
        if self.done.is_empty() {
            return match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
                _ => Ok(()),
            };
        }
        self.replace(path).map_err(failed)
    }

    fn replace(&self, path: &Path) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let beside = path.with_extension("new");
        let mut file = fs::File::create(&beside)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    }

    fn add(&mut self, item: &Item) {
        match self.done.iter_mut().find(|done| done.place == item.place) {
            // What it was before the first change is what to go back to.
            Some(done) => done.set.clone_from(&item.wanted),
            None => self.done.push(Done {
                name: item.name.clone(),
                place: item.place.clone(),
                was: item.now.clone(),
                set: item.wanted.clone(),
            }),
        }
    }
}

/// How one change went.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It is so now.
    Changed,
    /// Nothing was to be done, or nothing can be done from here; why.
    Left(String),
    /// The host refused; its words.
    Refused(String),
}

/// Makes the changes of a plan that can be made from outside the process, and answers how each
/// went. What is refused does not keep the others from being made.
///
/// # Errors
/// The record cannot be read or written; then nothing was changed.
pub fn apply(view: &View, plan: &Plan, path: &Path) -> Result<Vec<(String, Outcome)>, RecordError> {
    let mut record = Record::read(path)?;
    let changes: Vec<&Item> = plan.changes().collect();
    for item in &changes {
        if !matches!(item.place, Place::Limit(_)) {
            record.add(item);
        }
    }
    record.write(path)?;
    let mut outcomes = Vec::new();
    for item in &changes {
        let outcome = change(view, &item.place, &item.wanted);
        if matches!(outcome, Outcome::Refused(_)) {
            // Nothing to go back to, unless an earlier run changed it.
            let unchanged = |done: &Done| done.place == item.place && done.was == item.now;
            record.done.retain(|done| !unchanged(done));
        }
        outcomes.push((item.name.clone(), outcome));
    }
    record.write(path)?;
    Ok(outcomes)
}

/// Takes back what the record says, last first. What somebody else has changed since is left as it
/// is. The record keeps what could not be taken back.
///
/// # Errors
/// The record cannot be read or written.
pub fn undo(view: &View, path: &Path) -> Result<Vec<(String, Outcome)>, RecordError> {
    let mut record = Record::read(path)?;
    let mut outcomes = Vec::new();
    let mut kept = Vec::new();
    while let Some(done) = record.done.pop() {
        let outcome = match current(view, &done.place) {
            Some(now) if now == done.was => Outcome::Left("it is as it was".into()),
            Some(now) if now != done.set => {
                Outcome::Left(format!("it is {now} now, which somebody else has set"))
            }
            None => Outcome::Left("it is gone".into()),
            Some(_) => change(view, &done.place, &done.was),
        };
        outcomes.push((done.name.clone(), outcome.clone()));
        if matches!(outcome, Outcome::Refused(_)) {
            kept.insert(0, done);
        }
    }
    Record { done: kept }.write(path)?;
    Ok(outcomes)
}

/// What a place holds now.
fn current(view: &View, place: &Place) -> Option<String> {
    match place {
        Place::File(path) => Some(chosen(&view.read(path)?)),
        Place::Ethtool { device, option, .. } => super::nic::current(view, device, option),
        Place::Limit(_) => None,
    }
}

fn change(view: &View, place: &Place, value: &str) -> Outcome {
    let changed = match place {
        Place::File(path) => view.write(path, value),
        Place::Ethtool {
            device,
            flag,
            option,
        } => view.ethtool(&[flag, device, option, value]).map(drop),
        Place::Limit(name) => {
            return Outcome::Left(format!(
                "a limit of the process: {name}= in its unit (corelane tune plan --systemd)"
            ));
        }
    };
    match changed {
        Ok(()) => Outcome::Changed,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Outcome::Refused(format!("{error}; run as root"))
        }
        Err(error) => Outcome::Refused(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use corelane_engine::nic::QueueName;

    use super::super::{Goal, Standing};
    use super::*;

    /// A host of two data cores with one device of two queues, and a program in place of ethtool
    /// that keeps one value in a file.
    struct Fake {
        folder: tempfile::TempDir,
        view: View,
    }

    impl Fake {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let ethtool = folder.path().join("ethtool");
            let usecs = folder.path().join("usecs");
            fs::write(&usecs, "50\n").unwrap();
            let script = format!(
                "#!/bin/sh\ncase $1 in\n-c) echo 'Adaptive RX: on  TX: off'; echo \"rx-usecs: \
                 $(cat {0})\";;\n-C) [ $3 = rx-usecs ] && echo $4 > {0} || {{ echo 'netlink error: \
                 not supported' >&2; exit 1; }};;\n-l) printf 'Pre-set \
                 maximums:\\nCombined: 8\\nCurrent hardware settings:\\nCombined: 2\\n';;\n*) \
                 exit 1;;\nesac\n",
                usecs.display()
            );
            // By another process: a file that this one has open for writing, and so a child that
            // another test forks just now, cannot be run.
            let written = std::process::Command::new("sh")
                .args(["-c", r#"printf %s "$1" > "$0" && chmod 755 "$0""#])
                .args([ethtool.as_os_str(), script.as_ref()])
                .status();
            assert!(written.unwrap().success());
            let view = View::of(&folder.path().join("root"), &ethtool);
            let fake = Self { folder, view };
            for (path, text) in [
                ("proc/sys/net/core/somaxconn", "128"),
                ("proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t6291456"),
                ("proc/sys/kernel/numa_balancing", "0"),
                (
                    "sys/kernel/mm/transparent_hugepage/enabled",
                    "[always] madvise never",
                ),
                ("sys/devices/system/cpu/cpu2/cpuidle/state0/latency", "0"),
                ("sys/devices/system/cpu/cpu2/cpuidle/state0/disable", "0"),
                ("sys/devices/system/cpu/cpu2/cpuidle/state2/latency", "133"),
                ("sys/devices/system/cpu/cpu2/cpuidle/state2/disable", "0"),
                ("sys/devices/system/cpu/cpu2/cpuidle/state2/name", "C6"),
                ("sys/class/net/eth0/operstate", "up"),
                ("sys/class/net/eth0/device/msi_irqs/41", "msix"),
                ("sys/class/net/eth0/device/msi_irqs/42", "msix"),
                ("sys/class/net/eth0/device/msi_irqs/43", "msix"),
                ("sys/class/net/eth0/queues/rx-0/rps_cpus", "f"),
                ("sys/class/net/eth0/queues/tx-0/xps_cpus", "0"),
                ("sys/class/net/eth0/queues/tx-1/xps_cpus", "8"),
                ("sys/class/net/lo/operstate", "unknown"),
                ("proc/irq/42/smp_affinity_list", "0-3"),
                ("proc/irq/43/smp_affinity_list", "3"),
                (
                    "proc/interrupts",
                    "      CPU0\n 41: 0 PCI-MSIX eth0-config\n 42: 7 PCI-MSIX eth0-TxRx-0\n \
                     43: 7 PCI-MSIX eth0-TxRx-1\n",
                ),
                ("proc/77/comm", "irqbalance"),
                (
                    "proc/self/limits",
                    "Limit  Soft  Hard  Units\nMax open files            1024    4096    files\n\
                     Max locked memory         8388608    unlimited    bytes\n",
                ),
            ] {
                let path = fake.view.path(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, format!("{text}\n")).unwrap();
            }
            fake
        }

        fn plan(&self) -> Plan {
            self.plan_with(Vec::new(), false)
        }

        fn plan_with(&self, queues: Vec<(QueueName, usize)>, polls: bool) -> Plan {
            let goal = Goal {
                cpus: vec![2, 3],
                devices: None,
                connections: 16_384,
                queues,
                polls,
            };
            Plan::make(&self.view, &goal)
        }

        fn record(&self) -> PathBuf {
            self.folder.path().join("state/tune.json")
        }
    }

    fn changes(plan: &Plan) -> Vec<(&str, &str, &str)> {
        plan.changes()
            .map(|item| (&*item.name, &*item.now, &*item.wanted))
            .collect()
    }

    #[test]
    fn a_plan_names_what_is_wrong_and_nothing_else() {
        let fake = Fake::new();
        let plan = fake.plan();
        assert_eq!(
            changes(&plan),
            [
                ("net.core.somaxconn", "128", "4096"),
                (
                    "net.ipv4.tcp_rmem",
                    "4096 131072 6291456",
                    "4096 131072 16777216"
                ),
                ("transparent huge pages", "always", "madvise"),
                ("cpu 2 sleep state C6 (133 us) disabled", "0", "1"),
                ("eth0 adaptive coalescing", "on", "off"),
                ("eth0 coalescing in us", "50", "8"),
                ("irq 42 (eth0 queue 0)", "0-3", "2"),
                ("eth0 rx-0 RPS", "f", "0"),
                ("eth0 tx-0 XPS", "0", "4"),
                ("max open files", "4096", "17408"),
            ]
        );
        let fine = |name: &str| {
            let item = plan.items.iter().find(|item| item.name == name);
            item.is_some_and(|item| item.standing == Standing::Fine)
        };
        for name in [
            "kernel.numa_balancing",
            "eth0 queues",
            "irq 43 (eth0 queue 1)",
            "eth0 tx-1 XPS",
            "max locked memory",
        ] {
            assert!(fine(name), "{name}");
        }
        assert_eq!(plan.notes.len(), 1, "{:?}", plan.notes);
        assert!(plan.notes[0].contains("irqbalance"));
    }

    #[test]
    fn a_queue_goes_to_the_core_that_has_named_it() {
        let fake = Fake::new();
        for (name, value) in [
            ("napi_defer_hard_irqs", "0"),
            ("gro_flush_timeout", "900000"),
        ] {
            let path = format!("sys/class/net/eth0/{name}");
            fs::write(fake.view.path(path), format!("{value}\n")).unwrap();
        }
        let plan = fake.plan_with(vec![("eth0:0".parse().unwrap(), 3)], true);
        let irq = |name: &str| {
            let item = plan.items.iter().find(|item| item.name.starts_with(name));
            item.map(|item| (item.now.as_str(), item.wanted.as_str()))
        };
        assert_eq!(irq("irq 42 "), Some(("0-3", "3")));
        assert_eq!(
            irq("irq 43 ").map(|(_, wanted)| wanted),
            Some("3"),
            "the next in turns"
        );
        assert_eq!(irq("eth0 napi_defer_hard_irqs"), Some(("0", "2")));
        let flush = plan
            .items
            .iter()
            .find(|item| item.name == "eth0 gro_flush_timeout");
        assert_eq!(flush.map(|item| item.standing), Some(Standing::Fine));
    }

    #[test]
    fn what_was_applied_is_undone_but_for_what_somebody_else_changed() {
        let fake = Fake::new();
        let (view, record) = (&fake.view, fake.record());
        let outcomes = apply(view, &fake.plan(), &record).unwrap();
        let refused: Vec<&str> = outcomes
            .iter()
            .filter(|(_, outcome)| matches!(outcome, Outcome::Refused(_)))
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(refused, ["eth0 adaptive coalescing"]);
        let left = fake.plan();
        let names: Vec<&str> = left.changes().map(|item| &*item.name).collect();
        assert_eq!(names, ["eth0 adaptive coalescing", "max open files"]);
        assert_eq!(view.read("proc/irq/42/smp_affinity_list").unwrap(), "2");
        // Twice is no more than once.
        apply(view, &left, &record).unwrap();
        let somaxconn = "proc/sys/net/core/somaxconn";
        view.write(somaxconn, "9999").unwrap();
        let outcomes = undo(view, &record).unwrap();
        let undone = |wanted: &str| {
            let found = outcomes.iter().find(|(name, _)| name == wanted);
            found.map(|(_, outcome)| outcome.clone()).unwrap()
        };
        assert!(matches!(undone("net.core.somaxconn"), Outcome::Left(why) if why.contains("9999")));
        assert_eq!(undone("eth0 coalescing in us"), Outcome::Changed);
        assert_eq!(view.read("proc/irq/42/smp_affinity_list").unwrap(), "0-3");
        assert_eq!(
            view.read("proc/sys/net/ipv4/tcp_rmem").unwrap(),
            "4096 131072 6291456"
        );
        assert!(!record.exists());
        assert_eq!(undo(view, &record).unwrap(), []);
    }

    #[test]
    fn without_a_record_nothing_is_changed() {
        let fake = Fake::new();
        // Its folder cannot be made in place of a file.
        fs::write(fake.folder.path().join("state"), "").unwrap();
        let error = apply(&fake.view, &fake.plan(), &fake.record()).unwrap_err();
        assert!(
            error.to_string().contains("cannot read the record"),
            "{error}"
        );
        fs::remove_file(fake.folder.path().join("state")).unwrap();
        assert_eq!(changes(&fake.plan()).len(), 10);
        fs::create_dir_all(fake.record().parent().unwrap()).unwrap();
        fs::write(fake.record(), "[]").unwrap();
        let error = undo(&fake.view, &fake.record()).unwrap_err();
        assert!(error.to_string().contains("not a record"), "{error}");
    }

    #[test]
    fn a_script_says_the_same_in_a_shell() {
        let fake = Fake::new();
        let script = super::super::script(&fake.plan());
        let output = std::process::Command::new("sh")
            .args(["-n", "-c", &script])
            .output();
        assert!(output.unwrap().status.success());
        let set = "echo '4096 131072 16777216' > /proc/sys/net/ipv4/tcp_rmem";
        let back = "echo '4096 131072 6291456' > /proc/sys/net/ipv4/tcp_rmem";
        let (set, back) = (script.find(set).unwrap(), script.find(back).unwrap());
        assert!(set < back);
        assert!(script.contains("ethtool -C eth0 rx-usecs 50"));
        let drop_in = super::super::drop_in(&fake.plan());
        assert!(
            drop_in.contains("LimitNOFILE=17408\n") && drop_in.contains("LimitMEMLOCK=infinity")
        );
    }
}
