//! The file backend among several identities that share a directory.

mod common;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use common::run;
use corelane::discovery::{Discovery, FileDiscovery, FileOptions, Freshness, Record, Registered};
use corelane::watch::InstanceWatch;
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::path::EndpointId;
use tokio::time::timeout;

/// Longest wait for anything here.
const PATIENCE: Duration = Duration::from_secs(90);

fn target() -> EndpointId {
    EndpointId::new("demo", "back-end", "gen_x")
}

fn record(port: u16) -> Record {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    Record::instance(&target(), address, PayloadCodec::Json)
}

/// Refreshed every 4 s; nobody here stands still for so long.
const TTL: Duration = Duration::from_secs(12);

async fn open(root: &Path) -> Discovery {
    let options = FileOptions {
        root: root.to_owned(),
        ttl: TTL,
    };
    Discovery::File(FileDiscovery::open(options).await.unwrap())
}

fn files(root: &Path) -> Vec<PathBuf> {
    let Ok(listing) = std::fs::read_dir(root.join("v1/instances")) else {
        return vec![];
    };
    listing.map(|file| file.unwrap().path()).collect()
}

async fn until_exists(file: &Path) {
    while !file.exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn until_ports(watch: &mut InstanceWatch, ports: &[u16]) {
    let mut seen = Vec::new();
    let waiting = async {
        loop {
            seen = watch
                .instances()
                .iter()
                .map(|instance| instance.address.port())
                .collect();
            seen.sort_unstable();
            if seen == ports {
                return;
            }
            watch.changed().await;
        }
    };
    let done = timeout(PATIENCE, waiting).await;
    assert!(done.is_ok(), "waited in vain for {ports:?}, saw {seen:?}");
}

#[test]
fn two_views_of_one_directory_agree() {
    run(async {
        let root = tempfile::tempdir().unwrap();
        let (one, two) = (open(root.path()).await, open(root.path()).await);
        assert_ne!(one.instance_id(), two.instance_id());
        let mut views = [
            InstanceWatch::new(&one, &target()),
            InstanceWatch::new(&two, &target()),
        ];
        assert_eq!(one.register(record(1)).await.unwrap(), Registered::Stored);
        two.register(record(2)).await.unwrap();
        for view in &mut views {
            until_ports(view, &[1, 2]).await;
            assert_eq!(view.freshness(), Freshness::Fresh);
        }
        let name = format!("demo%2Fback%2Dend%2Fgen%5Fx%2F{:x}", one.instance_id());
        assert!(root.path().join("v1/instances").join(name).is_file());
        one.replace(record(3)).await.unwrap();
        two.close().await;
        for view in &mut views {
            until_ports(view, &[3]).await;
        }
        one.unregister_all().await;
        assert!(files(root.path()).is_empty());
    });
}

#[test]
fn owners_refresh_and_the_dead_expire() {
    run(async {
        let root = tempfile::tempdir().unwrap();
        let (reader, owner) = (open(root.path()).await, open(root.path()).await);
        let mut watch = InstanceWatch::new(&reader, &target());
        owner.register(record(1)).await.unwrap();
        let own = files(root.path()).remove(0);
        let dead = own.with_file_name("demo%2Fback%2Dend%2Fgen%5Fx%2Fdead");
        std::fs::write(&dead, record(2).entry(0xdead).value).unwrap();
        until_ports(&mut watch, &[1, 2]).await;
        // Nobody refreshes the second: it goes when it is a TTL old, while the first stays.
        let file = std::fs::File::options().write(true).open(&dead).unwrap();
        file.set_modified(SystemTime::now() - TTL).unwrap();
        until_ports(&mut watch, &[1]).await;
        assert!(!dead.exists());
        assert!(reader.stats().expired_files.get() >= 1);
        // A living owner brings back what somebody deleted, under the same id.
        // The refresh may come so soon that the watch never sees the gap.
        std::fs::remove_file(&own).unwrap();
        timeout(PATIENCE, until_exists(&own)).await.unwrap();
        until_ports(&mut watch, &[1]).await;
        assert_eq!(watch.instances()[0].id, owner.instance_id());
    });
}

#[test]
fn strange_files_do_no_harm_and_a_new_directory_is_found() {
    run(async {
        let root = tempfile::tempdir().unwrap();
        let ours = open(root.path()).await;
        let mut watch = InstanceWatch::new(&ours, &target());
        ours.register(record(1)).await.unwrap();
        until_ports(&mut watch, &[1]).await;
        let bucket = root.path().join("v1/instances");
        std::fs::write(bucket.join(".tmp_00000000000000aa"), "{").unwrap();
        std::fs::write(bucket.join("demo%2Fback%2Dend%2Fgen%5Fx%2Fbad"), "{").unwrap();
        std::fs::write(bucket.join("%zz"), "{").unwrap();
        std::fs::create_dir(bucket.join("demo%2Fback%2Dend%2Fgen%5Fx%2Fd1")).unwrap();
        let other = open(root.path()).await;
        other.register(record(2)).await.unwrap();
        until_ports(&mut watch, &[1, 2]).await;
        assert_eq!(ours.stats().rejected_records.get(), 1);
        // All gone at once, directory included: that is an outage, and the owners write again.
        std::fs::rename(&bucket, root.path().join("elsewhere")).unwrap();
        let stale = async {
            while watch.freshness() == Freshness::Fresh {
                watch.changed().await;
            }
        };
        timeout(PATIENCE, stale).await.expect("the loss is noticed");
        while files(root.path()).len() < 2 {
            assert_eq!(watch.instances().len(), 2, "kept until the owners are back");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        until_ports(&mut watch, &[1, 2]).await;
        other.unregister_all().await;
        until_ports(&mut watch, &[1]).await;
    });
}

#[test]
fn a_name_that_fits_no_file_is_refused() {
    run(async {
        let root = tempfile::tempdir().unwrap();
        let ours = open(root.path()).await;
        let long = EndpointId::new(&"n-".repeat(100), "c", "e");
        let address = "127.0.0.1:1".parse().unwrap();
        let refused = ours
            .register(Record::instance(&long, address, PayloadCodec::Json))
            .await;
        assert!(refused.unwrap_err().to_string().contains("shorter names"));
    });
}
