//! Discovery against a real etcd on loopback: registration, watches, outages, lost leases.
//! Skipped, with a line that says so, where there is no etcd.

use std::cell::Cell;
use std::net::SocketAddr;
use std::process::Child;
use std::rc::Rc;
use std::time::Duration;

use corelane::discovery::{
    Discovery, DiscoveryError, EtcdAuth, EtcdDiscovery, EtcdOptions, Freshness, Record, Registered,
};
use corelane::watch::{Instance, InstanceWatch};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::path::{EndpointId, InstanceKey, instance_path};
use etcd_client::{Client, DeleteOptions, GetOptions, KeyValue, PutOptions, Txn, TxnOp};
use tokio::time::{Instant, sleep, timeout};

mod common;
#[path = "ports/mod.rs"]
mod ports;

use common::run;
use ports::free_port;

/// Longest wait for anything here; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(90);

/// A server that dies with the test.
struct Etcd {
    child: Child,
    data: tempfile::TempDir,
    client_port: u16,
    peer_port: u16,
}

impl Etcd {
    async fn start() -> Option<Self> {
        let data = tempfile::tempdir().unwrap();
        let (client_port, peer_port) = (free_port(), free_port());
        let child = spawn(data.path(), client_port, peer_port)?;
        let etcd = Self {
            child,
            data,
            client_port,
            peer_port,
        };
        etcd.serving().await;
        Some(etcd)
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// On the same data, or on none.
    async fn restart(&mut self, keep_data: bool) {
        if !keep_data {
            self.data = tempfile::tempdir().unwrap();
        }
        self.child = spawn(self.data.path(), self.client_port, self.peer_port).unwrap();
        self.serving().await;
    }

    async fn client(&self) -> Client {
        Client::connect([self.endpoint()], None).await.unwrap()
    }

    async fn serving(&self) {
        let began = Instant::now();
        loop {
            let mut client = self.client().await;
            let answer = timeout(Duration::from_secs(10), client.get("probe", None)).await;
            if matches!(answer, Ok(Ok(_))) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "etcd does not serve");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Nothing here hangs on a lease that runs out, or on an answer that does not come; a lease is
    /// refreshed every 2 s in any case. Keys that are gone for `confirm_after` are believed to be.
    fn options(&self) -> EtcdOptions {
        EtcdOptions {
            endpoints: vec![self.endpoint()],
            lease_ttl: Duration::from_secs(120),
            rpc_timeout: Duration::from_secs(20),
            startup_timeout: PATIENCE,
            confirm_after: Duration::from_secs(12),
            ..EtcdOptions::default()
        }
    }

    async fn discovery(&self) -> Discovery {
        Discovery::Etcd(EtcdDiscovery::connect(self.options()).await.unwrap())
    }

    /// Keys under a prefix, with their leases.
    async fn keys(&self, prefix: &str) -> Vec<(String, i64)> {
        let options = GetOptions::new().with_prefix();
        let found = self
            .client()
            .await
            .get(prefix, Some(options))
            .await
            .unwrap();
        let key = |kv: &KeyValue| (kv.key_str().unwrap().to_owned(), kv.lease());
        found.kvs().iter().map(key).collect()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(data: &std::path::Path, client_port: u16, peer_port: u16) -> Option<Child> {
    common::etcd(&data.join("etcd"), client_port, peer_port)
}

fn target() -> EndpointId {
    EndpointId::new("demo", "backend", "generate")
}

fn key(instance_id: u64) -> String {
    let endpoint = target();
    InstanceKey {
        endpoint,
        instance_id,
    }
    .to_string()
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn record(port: u16) -> Record {
    Record::instance(&target(), address(port), PayloadCodec::MessagePack)
}

fn ports(found: &[Instance]) -> Vec<u16> {
    let mut ports: Vec<u16> = found
        .iter()
        .map(|instance| instance.address.port())
        .collect();
    ports.sort_unstable();
    ports
}

/// Waits until the instances are as wanted; each change is looked at.
async fn until(watch: &mut InstanceWatch, what: &str, wanted: impl Fn(&[Instance]) -> bool) {
    let waiting = async {
        while !wanted(&watch.instances()) {
            watch.changed().await;
        }
    };
    if timeout(PATIENCE, waiting).await.is_err() {
        panic!(
            "waited in vain: {what}; instances are {:?}",
            watch.instances()
        );
    }
}

async fn until_ports(watch: &mut InstanceWatch, wanted: &[u16]) {
    until(watch, &format!("ports {wanted:?}"), |found| {
        ports(found) == wanted
    })
    .await;
}

async fn until_fresh(watch: &mut InstanceWatch, fresh: bool) {
    let waiting = async {
        while (watch.freshness() == Freshness::Fresh) != fresh {
            watch.changed().await;
        }
    };
    timeout(PATIENCE, waiting).await.expect("freshness turns");
}

#[test]
fn registers_lists_watches_replaces_and_deletes() {
    run(async {
        let Some(etcd) = Etcd::start().await else {
            return;
        };
        let ours = etcd.discovery().await;
        let reader = etcd.discovery().await;
        let mut watch = InstanceWatch::new(&reader, &target());
        assert_eq!(ours.register(record(1)).await.unwrap(), Registered::Stored);
        let taken = ours.register(record(1)).await;
        assert!(matches!(taken, Err(DiscoveryError::AlreadyRegistered(_))));
        until_ports(&mut watch, &[1]).await;
        let found = watch.instances();
        let id = ours.instance_id();
        assert_eq!(
            (found[0].id, found[0].codec),
            (id, PayloadCodec::MessagePack)
        );
        assert_eq!(found[0].path, instance_path(id, &target()).into_bytes());
        let own = key(id);
        assert_eq!(etcd.keys("v1/").await, [(own, id as i64)]);

        ours.replace(record(2)).await.unwrap();
        until_ports(&mut watch, &[2]).await;
        ours.unregister(&Record::instance_name(&target())).await;
        until_ports(&mut watch, &[]).await;

        ours.register(record(3)).await.unwrap();
        ours.close().await;
        assert!(etcd.keys("v1/").await.is_empty());
        let leases = etcd.client().await.leases().await.unwrap();
        assert!(
            leases.leases().iter().all(|lease| lease.id() != id as i64),
            "revoked"
        );
        assert!(matches!(
            ours.register(record(4)).await,
            Err(DiscoveryError::Closed)
        ));
    });
}

#[test]
fn the_directory_outlives_a_killed_store_and_the_identity_too() {
    run(async {
        let Some(mut etcd) = Etcd::start().await else {
            return;
        };
        let ours = etcd.discovery().await;
        let mut watch = InstanceWatch::new(&ours, &target());
        ours.register(record(1)).await.unwrap();
        until_ports(&mut watch, &[1]).await;
        let id = ours.instance_id();

        etcd.kill();
        until_fresh(&mut watch, false).await;
        until_ports(&mut watch, &[1]).await;
        // Wanted while it is away.
        let other = EndpointId::new("demo", "backend", "other");
        let late = Record::instance(&other, address(9), PayloadCodec::Json);
        assert_eq!(ours.register(late).await.unwrap(), Registered::Deferred);

        etcd.restart(true).await;
        until_fresh(&mut watch, true).await;
        let second = etcd.discovery().await;
        second.register(record(2)).await.unwrap();
        until_ports(&mut watch, &[1, 2]).await;
        assert_eq!(ours.instance_id(), id, "the lease survived, and so did we");
        let mut others = InstanceWatch::new(&second, &other);
        until_ports(&mut others, &[9]).await;
        let stats = ours.stats();
        assert!(stats.resyncs.get() >= 2 && stats.reconnects.get() >= 1);
        assert_eq!(
            (stats.stale_watches.get(), stats.lease_losses.get()),
            (0, 0)
        );
    });
}

#[test]
fn what_was_unregistered_while_the_store_was_away_is_gone_when_it_is_back() {
    run(async {
        let Some(mut etcd) = Etcd::start().await else {
            return;
        };
        let ours = etcd.discovery().await;
        ours.register(record(1)).await.unwrap();
        etcd.kill();
        ours.unregister(&Record::instance_name(&target())).await;
        assert!(ours.stats().writes_deferred.get() >= 1);
        etcd.restart(true).await;
        let mut watch = InstanceWatch::new(&ours, &target());
        watch.listed().await;
        until_ports(&mut watch, &[]).await;
    });
}

#[test]
fn a_store_that_comes_back_empty_does_not_empty_the_directory() {
    run(async {
        let Some(mut etcd) = Etcd::start().await else {
            return;
        };
        let (router, worker) = (etcd.discovery().await, etcd.discovery().await);
        let mut watch = InstanceWatch::new(&router, &target());
        worker.register(record(1)).await.unwrap();
        // This one never comes back: nothing keeps it.
        let dead = key(0xdead);
        etcd.client()
            .await
            .put(dead, record(2).entry(0xdead).value, None)
            .await
            .unwrap();
        until_ports(&mut watch, &[1, 2]).await;
        let id = worker.instance_id();

        etcd.kill();
        until_fresh(&mut watch, false).await;
        etcd.restart(false).await;
        // Not for a moment without the living one.
        let waiting = async {
            loop {
                let seen = ports(&watch.instances());
                assert!(seen.contains(&1), "the living instance vanished");
                if seen == [1] {
                    return;
                }
                watch.changed().await;
            }
        };
        timeout(PATIENCE, waiting)
            .await
            .expect("the dead one goes after confirmation");
        let fresh_id = worker.instance_id();
        assert_ne!(fresh_id, id);
        let alone = |found: &[Instance]| found.len() == 1 && found[0].id == fresh_id;
        until(&mut watch, "the new identity alone", alone).await;
        assert!(router.stats().removals_deferred.get() >= 1);
    });
}

#[test]
fn a_lease_revoked_from_outside_gives_a_new_identity() {
    run(async {
        let Some(etcd) = Etcd::start().await else {
            return;
        };
        let told = Rc::new(Cell::new(0));
        let (telling, endpoint) = (told.clone(), etcd.endpoint());
        let hook = move |id| -> std::pin::Pin<Box<dyn Future<Output = ()>>> {
            let (told, endpoint) = (telling.clone(), endpoint.clone());
            Box::pin(async move {
                let mut client = Client::connect([endpoint], None).await.unwrap();
                let found = client.get(key(id), None).await.unwrap();
                assert!(found.kvs().is_empty(), "asked before it is registered");
                told.set(id);
            })
        };
        let options = EtcdOptions {
            before_register: Some(Rc::new(hook)),
            ..etcd.options()
        };
        let ours = Discovery::Etcd(EtcdDiscovery::connect(options).await.unwrap());
        let mut watch = InstanceWatch::new(&ours, &target());
        let mut identity = ours.identity();
        ours.register(record(1)).await.unwrap();
        until_ports(&mut watch, &[1]).await;
        let before = ours.instance_id();
        etcd.client()
            .await
            .lease_client()
            .revoke(before as i64)
            .await
            .unwrap();
        timeout(PATIENCE, identity.changed())
            .await
            .expect("the loss is noticed")
            .unwrap();
        let after = ours.instance_id();
        assert_ne!(after, before);
        let alone = |found: &[Instance]| found.len() == 1 && found[0].id == after;
        until(&mut watch, "registered under the new id", alone).await;
        assert_eq!(
            watch.instances()[0].path,
            instance_path(after, &target()).into_bytes()
        );
        assert_eq!(ours.served_ids(), [after, before]);
        let former = instance_path(before, &target()).into_bytes();
        assert_eq!(ours.request_paths(&target())[1], former);
        assert_eq!((told.get(), ours.stats().lease_losses.get()), (after, 1));
        let keys = etcd.keys("v1/").await;
        assert_eq!(keys, [(key(after), after as i64)]);
    });
}

#[test]
fn a_write_that_meets_a_lost_lease_does_not_wait_for_the_keeper() {
    run(async {
        let Some(etcd) = Etcd::start().await else {
            return;
        };
        let long = EtcdOptions {
            lease_ttl: Duration::from_secs(600),
            ..etcd.options()
        };
        let ours = Discovery::Etcd(EtcdDiscovery::connect(long).await.unwrap());
        let before = ours.instance_id();
        etcd.client()
            .await
            .lease_client()
            .revoke(before as i64)
            .await
            .unwrap();
        assert_eq!(
            ours.register(record(1)).await.unwrap(),
            Registered::Deferred
        );
        let mut watch = InstanceWatch::new(&ours, &target());
        until_ports(&mut watch, &[1]).await;
        assert_ne!(watch.instances()[0].id, before);
    });
}

#[test]
fn user_and_password_open_what_is_closed_to_others() {
    run(async {
        let Some(etcd) = Etcd::start().await else {
            return;
        };
        let mut root = etcd.client().await;
        root.role_add("root").await.unwrap();
        root.user_add("root", "secret", None).await.unwrap();
        root.user_grant_role("root", "root").await.unwrap();
        root.auth_enable().await.unwrap();
        let nobody = etcd.discovery().await;
        assert_eq!(
            nobody.register(record(1)).await.unwrap(),
            Registered::Deferred
        );
        let auth = EtcdAuth::Password {
            user: "root".to_owned(),
            password: "secret".to_owned(),
        };
        let options = EtcdOptions {
            auth,
            ..etcd.options()
        };
        let ours = Discovery::Etcd(EtcdDiscovery::connect(options).await.unwrap());
        assert_eq!(ours.register(record(2)).await.unwrap(), Registered::Stored);
        let mut watch = InstanceWatch::new(&ours, &target());
        until_ports(&mut watch, &[2]).await;
    });
}

#[test]
fn the_lease_is_refreshed_again_and_again() {
    run(async {
        let Some(etcd) = Etcd::start().await else {
            return;
        };
        let ours = etcd.discovery().await;
        ours.register(record(1)).await.unwrap();
        let id = ours.instance_id();
        let mut leases = etcd.client().await.lease_client();
        let (mut left_s, mut refreshed) = (i64::MAX, 0);
        let waiting = async {
            while refreshed < 3 {
                let now = leases.time_to_live(id as i64, None).await.unwrap();
                refreshed += u32::from(now.ttl() > left_s);
                left_s = now.ttl();
                assert!(left_s >= 0, "the lease ran out");
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, waiting).await.expect("it is refreshed");
        assert_eq!((ours.instance_id(), etcd.keys("v1/").await.len()), (id, 1));
    });
}

#[test]
fn bad_records_are_skipped_and_good_ones_outlive_bad_updates() {
    run(async {
        let Some(etcd) = Etcd::start().await else {
            return;
        };
        let ours = etcd.discovery().await;
        let mut client = etcd.client().await;
        let prefix = InstanceKey::endpoint_prefix(&target());
        client
            .put(format!("{prefix}b1"), "not json", None)
            .await
            .unwrap();
        client
            .put(format!("{prefix}b2"), [0xff, 0xfe], None)
            .await
            .unwrap();
        client
            .put([prefix.as_bytes(), b"\xff"].concat(), "{}", None)
            .await
            .unwrap();
        ours.register(record(1)).await.unwrap();
        let mut watch = InstanceWatch::new(&ours, &target());
        until_ports(&mut watch, &[1]).await;
        assert_eq!(ours.stats().rejected_records.get(), 2);
        let own = key(ours.instance_id());
        client.put(own.as_str(), "{", None).await.unwrap();
        client
            .put(format!("{prefix}b1"), record(3).entry(0xb1).value, None)
            .await
            .unwrap();
        until_ports(&mut watch, &[1, 3]).await;
        client.delete(own, None).await.unwrap();
        until_ports(&mut watch, &[3]).await;
    });
}

#[test]
fn compaction_while_away_is_answered_by_a_full_list() {
    run(async {
        let Some(mut etcd) = Etcd::start().await else {
            return;
        };
        let ours = etcd.discovery().await;
        let mut watch = InstanceWatch::new(&ours, &target());
        ours.register(record(1)).await.unwrap();
        until_ports(&mut watch, &[1]).await;
        etcd.kill();
        until_fresh(&mut watch, false).await;
        // Away for us only: on another port it is written to and compacted.
        let usual = std::mem::replace(&mut etcd.client_port, free_port());
        etcd.restart(true).await;
        let mut client = etcd.client().await;
        let own = key(0xb);
        for port in 10..30 {
            client
                .put(own.as_str(), record(port).entry(0xb).value, None)
                .await
                .unwrap();
        }
        let revision = client
            .get(own, None)
            .await
            .unwrap()
            .header()
            .unwrap()
            .revision();
        client.compact(revision, None).await.unwrap();
        etcd.kill();
        etcd.client_port = usual;
        etcd.restart(true).await;
        until_ports(&mut watch, &[1, 29]).await;
        until_fresh(&mut watch, true).await;
    });
}

#[test]
fn long_lists_come_in_pages() {
    run(async {
        let Some(etcd) = Etcd::start().await else {
            return;
        };
        let ours = etcd.discovery().await;
        let mut client = etcd.client().await;
        for first in (1..=1200u64).step_by(100) {
            let put = |id| {
                let entry = record(1).entry(id);
                TxnOp::put(entry.key, entry.value, None::<PutOptions>)
            };
            let puts: Vec<TxnOp> = (first..first + 100).map(put).collect();
            client.txn(Txn::new().and_then(puts)).await.unwrap();
        }
        let mut watch = InstanceWatch::new(&ours, &target());
        until(&mut watch, "all of them", |found| found.len() == 1200).await;
        assert_eq!(ours.stats().watched_keys.get(), 1200);
        let all = Some(DeleteOptions::new().with_prefix());
        client
            .delete(InstanceKey::endpoint_prefix(&target()), all)
            .await
            .unwrap();
        until(&mut watch, "none of them", <[Instance]>::is_empty).await;
    });
}

#[test]
fn start_up_waits_for_the_store_but_not_for_ever() {
    run(async {
        let nobody = EtcdOptions {
            endpoints: vec![format!("http://127.0.0.1:{}", free_port())],
            startup_timeout: Duration::from_millis(1500),
            ..EtcdOptions::default()
        };
        let Err(error) = EtcdDiscovery::connect(nobody).await else {
            panic!("connected")
        };
        assert!(matches!(error, DiscoveryError::StartUp { .. }), "{error}");
        let useless = EtcdOptions {
            endpoints: vec!["http://[".to_owned()],
            ..EtcdOptions::default()
        };
        let Err(error) = EtcdDiscovery::connect(useless).await else {
            panic!("connected")
        };
        assert!(matches!(error, DiscoveryError::Option(_)), "{error}");

        let Some(mut etcd) = Etcd::start().await else {
            return;
        };
        etcd.kill();
        let options = etcd.options();
        let connecting = tokio::task::spawn_local(EtcdDiscovery::connect(options));
        // The first attempt fails at once; the second comes a second later.
        tokio::task::yield_now().await;
        etcd.restart(true).await;
        assert!(connecting.await.unwrap().is_ok());
    });
}
