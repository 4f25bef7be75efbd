//! With CURVE: publishers and subscribers of the component API, directly and through a broker, and
//! the commands.
#![cfg(feature = "curve")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use corelane::component::{CurveOptions, MemoryStore, Protection, Via, ZmqOptions};
use corelane::events::new_secret_key;

use crate::broker::Broker;
use crate::lab::{DEADLINE, options, plane, run, scope, until};

const TOPIC: &str = "topic";

/// A secret key in a file, and its public key.
struct Pair {
    file: PathBuf,
    public: String,
}

fn pair(folder: &Path, name: &str) -> Pair {
    let file = folder.join(name);
    let public = new_secret_key(&file).unwrap();
    Pair { file, public }
}

/// One who has this pair, dials whoever has that public key, and lets these in.
fn protection(own: Option<&Pair>, server: &Pair, allowed: Option<&Pair>) -> Protection {
    let options = CurveOptions {
        secret_key_file: own.map(|pair| pair.file.clone()),
        allowed_keys: allowed.map(|pair| pair.public.clone()),
        server_key: Some(server.public.clone()),
    };
    options.load().unwrap()
}

fn protected(protection: Protection) -> ZmqOptions {
    ZmqOptions {
        protection,
        ..options()
    }
}

#[test]
fn events_pass_directly_to_those_who_know_the_key() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let (ours, friend) = (pair(folder.path(), "ours"), pair(folder.path(), "friend"));
        let store = MemoryStore::default();
        let doors = protection(Some(&ours), &ours, Some(&friend));
        let (events, _) = plane(&store, protected(doors));
        let (friends, _) = plane(&store, protected(protection(Some(&friend), &ours, None)));
        let (strangers, _) = plane(&store, protected(protection(None, &ours, None)));
        let (open, _) = plane(&store, options());
        let publisher = events.publisher(&scope(), TOPIC).await.unwrap();
        let _strange = strangers.subscriber(&scope(), TOPIC).await.unwrap();
        let _open = open.subscriber(&scope(), TOPIC).await.unwrap();
        let mut subscriber = friends.subscriber(&scope(), TOPIC).await.unwrap();
        assert!(publisher.is_wanted(DEADLINE).await.unwrap());
        let stats = events.stats().unwrap();
        until("both are refused", || {
            let plane = &stats.plane;
            plane.sessions_refused_stranger.get() > 0 && plane.sessions_refused_mechanism.get() > 0
        })
        .await;
        let large = vec![7; 500_000];
        for _ in 0..20 {
            publisher.publish_bytes(b"small").await.unwrap();
            publisher.publish_bytes(&large).await.unwrap();
        }
        for sequence in 0..40 {
            let event = subscriber.next().await.unwrap().unwrap();
            let wanted = if sequence % 2 == 0 {
                &b"small"[..]
            } else {
                &large
            };
            assert_eq!(event.sequence, sequence);
            assert!(event.payload == wanted, "event {sequence}");
        }
        assert_eq!(stats.plane.subscriptions.get(), 1);
        for events in [events, friends, strangers, open] {
            events.close().await;
        }
    });
}

#[test]
fn events_pass_through_a_broker_with_curve() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let server = pair(folder.path(), "server");
        let doors = protection(Some(&server), &server, None).doors;
        let broker = Broker::protected(&doors);
        let via = || ZmqOptions {
            via: Via::Url(broker.url().parse().unwrap()),
            ..protected(protection(None, &server, None))
        };
        let store = MemoryStore::default();
        let ((events, _), (others, _)) = (plane(&store, via()), plane(&store, via()));
        let mut subscriber = others.subscriber(&scope(), TOPIC).await.unwrap();
        let publisher = events.publisher(&scope(), TOPIC).await.unwrap();
        assert!(publisher.is_wanted(DEADLINE).await.unwrap());
        for sequence in 0..100 {
            publisher.publish(&sequence).await.unwrap();
        }
        for sequence in 0..100 {
            let event = subscriber.next().await.unwrap().unwrap();
            assert_eq!(
                (event.sequence, event.parse::<u64>().unwrap()),
                (sequence, sequence)
            );
        }
        events.close().await;
        others.close().await;
    });
}

fn corelane(args: &[&str]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    command.arg("events").args(args).env_clear();
    command.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn keys_are_made_once_and_mistakes_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("new.key");
    let file = file.to_str().unwrap();
    let made = corelane(&["keys", "--out", file]);
    let public = String::from_utf8(made.stdout).unwrap();
    assert!(
        made.status.success() && public.trim().len() == 40,
        "{public}"
    );
    let again = corelane(&["keys", "--out", file]);
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(
        again.status.code() == Some(1) && said.contains("not there yet"),
        "{said}"
    );
    for (args, wanted) in [
        (["--curve-server-key", "short"], "40 characters of Z85"),
        (
            ["--curve-secret-key-file", "/no/such/file"],
            "/no/such/file cannot be read",
        ),
        (
            ["--curve-allowed-keys", public.trim()],
            "curve_allowed_keys without",
        ),
    ] {
        let tail = corelane(&[&["tail"][..], &args].concat());
        let said = String::from_utf8_lossy(&tail.stderr).into_owned();
        assert!(
            tail.status.code() == Some(2) && said.contains(wanted),
            "{args:?}: {said}"
        );
    }
}
