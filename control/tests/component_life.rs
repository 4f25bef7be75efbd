//! The life of what the component model serves: each state forced and seen from outside, health
//! checks, drains with their bounds, limits that mean what they say, and a store that fails.

mod component_lab;
mod lab;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use component_lab::{client_of, echo, endpoint, options, settled, until, with_runtime};
use corelane::component::{
    Admission, Checks, Client, DynamoError, Ending, Options, Outcome, Reason, Request, Runtime,
    State, Stream,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(60);

fn with_status() -> Options {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    options().status(any)
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// What a probe and a scrape see of `production/worker/generate`.
async fn seen(runtime: &Runtime) -> (bool, Value, String) {
    let address = runtime.status_address().unwrap();
    let answer = get(address, "/health").await;
    let ready = answer.starts_with("HTTP/1.1 200 ");
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    let health: Value = serde_json::from_str(body).unwrap();
    let metrics = get(address, "/metrics").await;
    let state = metrics
        .lines()
        .filter(|line| line.starts_with("corelane_endpoint_state{") && line.ends_with(" 1"))
        .find_map(|line| line.split("state=\"").nth(1)?.split('"').next())
        .unwrap_or_default();
    let listed = health["endpoints"]["production/worker/generate"].clone();
    (ready, listed, state.to_owned())
}

async fn first(client: &Client) -> Result<Value, DynamoError> {
    let mut reply = client.call(&1).await?;
    let first = reply.next_data().await;
    first.unwrap_or_else(|| Err(DynamoError::internal("no item")))
}

/// How often the endpoint became each state, in the order of [`State::ALL`].
fn changes(runtime: &Runtime) -> [u64; 6] {
    runtime.endpoints().seen()[0].changes
}

#[test]
fn the_whole_life_is_seen_in_health_and_metrics() {
    with_runtime(with_status(), async |runtime| {
        let hold = runtime.hold_readiness();
        let gate = Arc::new(AtomicBool::new(false));
        let open = Arc::clone(&gate);
        let handler = async move |_: Request, stream: &mut Stream| -> Outcome {
            stream.send(&1).await?;
            while !open.load(Ordering::Relaxed) {
                stream.sleep(Duration::from_millis(1)).await?;
            }
            stream.send(&2).await
        };
        let served = endpoint(runtime, "generate").serve(handler).await.unwrap();
        assert_eq!(changes(runtime), [1, 1, 1, 1, 0, 0]);
        assert_eq!(
            seen(runtime).await,
            (false, json!("ready"), "healthy".into())
        );
        drop(hold);
        assert_eq!(
            seen(runtime).await,
            (true, json!("ready"), "healthy".into())
        );
        let client = client_of(runtime, &served).await;
        let mut reply = client.call(&1).await.unwrap();
        assert_eq!(reply.next_data::<u32>().await.unwrap().unwrap(), 1);
        let leaving = Rc::new(served);
        let stop = Rc::clone(&leaving);
        let stop = tokio::task::spawn_local(async move { stop.stop().await });
        until("it is leaving", || leaving.state() == State::Stopping).await;
        until("it is out of discovery", || client.instances().is_empty()).await;
        assert_eq!(seen(runtime).await.1, json!("notready"));
        // The running request goes on to its end, and new ones are not taken.
        assert_eq!(
            first(&client).await.unwrap_err().reason(),
            Reason::Unavailable
        );
        assert_eq!((leaving.state(), leaving.busy()), (State::Stopping, 1));
        assert!(seen(runtime).await.2.contains("stopping"));
        gate.store(true, Ordering::Relaxed);
        assert_eq!(reply.next_data::<u32>().await.unwrap().unwrap(), 2);
        stop.await.unwrap();
        assert_eq!(leaving.state(), State::Deregistered);
        assert_eq!(changes(runtime), [1, 1, 1, 1, 1, 1]);
    });
}

#[test]
fn a_drain_cuts_off_what_does_not_end() {
    let options = options().drain(Duration::ZERO, Duration::from_secs(1));
    let runtime = std::cell::RefCell::new(None);
    with_runtime(options, async |running| {
        let endless = async |_: Request, stream: &mut Stream| -> Outcome {
            stream.send(&1).await?;
            stream.stopped().await;
            Ok(())
        };
        let served = endpoint(running, "generate").serve(endless).await.unwrap();
        let client = client_of(running, &served).await;
        let mut reply = client.call(&1).await.unwrap();
        assert_eq!(reply.next_data::<u32>().await.unwrap().unwrap(), 1);
        running.stop().await;
        let cut = reply.next_data::<u32>().await.unwrap().unwrap_err();
        assert_eq!(cut.reason(), Reason::Disconnected);
        assert!(reply.next_data::<u32>().await.is_none());
        assert_eq!(reply.ending(), Some(Ending::Failed));
        assert_eq!(served.state(), State::Deregistered);
        runtime.replace(Some(running.clone()));
    });
    assert!(runtime.take().is_some());
}

#[test]
fn a_health_check_decides_whether_a_process_is_ready() {
    let checks = Checks {
        enabled: true,
        wait: Duration::from_millis(100),
        timeout: Duration::from_secs(20),
    };
    with_runtime(with_status().checks(checks), async |runtime| {
        let sick = Arc::new(AtomicBool::new(true));
        let asked = Arc::new(AtomicU64::new(0));
        let (state, counted) = (Arc::clone(&sick), Arc::clone(&asked));
        let handler = async move |request: Request, stream: &mut Stream| -> Outcome {
            let payload: String = request.parse()?;
            assert!(payload == "are you there" || payload == "hello");
            counted.fetch_add(1, Ordering::Relaxed);
            if state.load(Ordering::Relaxed) {
                return Err(DynamoError::engine_shutdown("sick").into());
            }
            stream.send("yes").await
        };
        let served = endpoint(runtime, "generate").health_check(&"are you there");
        let served = served.unwrap().serve(handler).await.unwrap();
        until("it has been asked", || asked.load(Ordering::Relaxed) >= 2).await;
        assert_eq!(
            seen(runtime).await,
            (false, json!("notready"), "running".into())
        );
        sick.store(false, Ordering::Relaxed);
        assert!(served.reached(State::Healthy, PATIENCE).await);
        assert_eq!(
            seen(runtime).await,
            (true, json!("ready"), "healthy".into())
        );
        sick.store(true, Ordering::Relaxed);
        until("it is found sick", || served.state() == State::Running).await;
        assert!(!seen(runtime).await.0);
        sick.store(false, Ordering::Relaxed);
        assert!(served.reached(State::Healthy, PATIENCE).await);
    });
}

/// A handler that waits for the gate, and so many calls that begin one after the other.
async fn taken(runtime: &Runtime, calls: usize) -> (usize, usize) {
    let gate = Arc::new(AtomicBool::new(false));
    let open = Arc::clone(&gate);
    let handler = async move |_: Request, stream: &mut Stream| -> Outcome {
        while !open.load(Ordering::Relaxed) {
            stream.sleep(Duration::from_millis(1)).await?;
        }
        stream.send(&1).await
    };
    let served = endpoint(runtime, "generate").serve(handler).await.unwrap();
    let client = client_of(runtime, &served).await.detect_faults(false);
    let calls: Vec<_> = (0..calls)
        .map(|_| {
            let client = client.clone();
            tokio::task::spawn_local(async move { first(&client).await })
        })
        .collect();
    let total = calls.len() as u64;
    let told = || served.count(|stats| stats.requests.get() + stats.refused.get());
    until("every call was taken or refused", || told() == total).await;
    gate.store(true, Ordering::Relaxed);
    let (mut answered, mut refused) = (0, 0);
    for call in calls {
        match call.await.unwrap() {
            Ok(_) => answered += 1,
            Err(error) => {
                assert_eq!(error.reason(), Reason::WorkerOverloaded);
                refused += 1;
            }
        }
    }
    settled(&[&served], &client).await;
    (answered, refused)
}

#[test]
fn limits_mean_what_they_say() {
    for (running_max, queue_max) in [(1, 0), (1, 1), (2, 3)] {
        let admission = Admission {
            running_max,
            queue_max,
        };
        with_runtime(options().admission(admission), async |runtime| {
            let want = (running_max + queue_max) as usize;
            assert_eq!(taken(runtime, 10).await, (want, 10 - want), "{admission:?}");
        });
    }
}

#[test]
fn shards_keep_a_limit_together() {
    let admission = Admission {
        running_max: 2,
        queue_max: 3,
    };
    with_runtime(options().shards(3).admission(admission), async |runtime| {
        let (answered, refused) = taken(runtime, 12).await;
        // Shards that look at the same instant may each take the last place.
        assert!(
            (5..=5 + 4).contains(&answered) && answered + refused == 12,
            "{answered}"
        );
    });
}

fn on_etcd(etcd: &lab::Etcd) -> Options {
    let options = with_status().etcd([etcd.endpoint()]).lease_ttl_s(120);
    options.drain(Duration::ZERO, Duration::from_secs(30))
}

#[test]
fn a_lost_lease_is_followed_by_a_new_identity_and_former_paths_are_served() {
    let Some(etcd) = lab::Etcd::start() else {
        return;
    };
    with_runtime(on_etcd(&etcd), async |runtime| {
        let served = endpoint(runtime, "generate").serve(echo).await.unwrap();
        let client = client_of(runtime, &served).await;
        let before = served.instance_id().unwrap();
        let mut store = etcd_client::Client::connect([etcd.endpoint()], None)
            .await
            .unwrap();
        store.lease_revoke(before as i64).await.unwrap();
        until("it is somebody else", || {
            served.instance_id() != Some(before)
        })
        .await;
        assert!(served.reached(State::Healthy, PATIENCE).await);
        let after = served.instance_id().unwrap();
        until("clients see it", || {
            client.instances().iter().any(|seen| seen.id == after)
        })
        .await;
        // Created, registered, running and healthy twice.
        assert_eq!(changes(runtime), [2, 2, 2, 2, 0, 0]);
        assert_eq!(first(&client).await.unwrap(), json!(1));
        let key = format!("v1/instances/production/worker/generate/{after:x}");
        assert_eq!(store.get(key.clone(), None).await.unwrap().count(), 1);
        served.stop().await;
        assert_eq!(store.get(key, None).await.unwrap().count(), 0);
    });
}

/// Watches that etcd has open.
async fn watchers(etcd: &lab::Etcd) -> u64 {
    let address = etcd.endpoint().replace("http://", "").parse().unwrap();
    let metrics = get(address, "/metrics").await;
    let line = metrics
        .lines()
        .find(|line| line.starts_with("etcd_debugging_mvcc_watcher_total "));
    let count: f64 = line.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    count as u64
}

#[test]
fn etcd_sees_one_watch_for_each_endpoint_however_many_clients() {
    let Some(etcd) = lab::Etcd::start() else {
        return;
    };
    with_runtime(on_etcd(&etcd), async |runtime| {
        let served = endpoint(runtime, "generate").serve(echo).await.unwrap();
        let before = watchers(&etcd).await;
        let mut clients = Vec::new();
        for name in ["generate", "generate", "other"] {
            for _ in 0..20 {
                let reference = format!("production.worker.{name}");
                clients.push(runtime.client(&reference).unwrap());
            }
        }
        clients[0].wait_for_instances(PATIENCE).await.unwrap();
        for client in &clients[..40] {
            assert_eq!(first(client).await.unwrap(), json!(1));
        }
        let mut now = watchers(&etcd).await;
        while now < before + 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            now = watchers(&etcd).await;
        }
        assert_eq!(now, before + 2);
        drop(clients);
        while watchers(&etcd).await != before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(served.reached(State::Healthy, PATIENCE).await);
    });
}

/// An etcd that a test can end and begin again from within: its own waits block.
#[derive(Clone)]
struct Store(Arc<Mutex<lab::Etcd>>);

impl Store {
    async fn do_with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut lab::Etcd) -> T + Send + 'static,
    ) -> T {
        let etcd = Arc::clone(&self.0);
        let work = move || work(&mut etcd.lock().unwrap());
        tokio::task::spawn_blocking(work).await.unwrap()
    }

    async fn keys(&self) -> Vec<String> {
        let keys = self.do_with(|etcd| etcd.keys("v1/instances/")).await;
        keys.into_iter().map(|(key, _)| key).collect()
    }
}

/// A runtime on an etcd that the test may end; nothing is done where there is no etcd.
fn with_store(test: impl AsyncFnOnce(&Runtime, &Store)) {
    let Some(etcd) = lab::Etcd::start() else {
        return;
    };
    let options = on_etcd(&etcd);
    let store = Store(Arc::new(Mutex::new(etcd)));
    with_runtime(options, async |runtime| test(runtime, &store).await);
}

/// Calls one after the other until `done`; each is answered, whatever the store does.
async fn calls_until(what: &str, client: &Client, done: impl AsyncFn() -> bool) {
    let began = tokio::time::Instant::now();
    while !done().await {
        assert_eq!(first(client).await.expect(what), json!(1), "{what}");
        assert!(began.elapsed() < component_lab::DEADLINE, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A sample without labels of a scrape.
async fn sample(runtime: &Runtime, name: &str) -> f64 {
    let text = get(runtime.status_address().unwrap(), "/metrics").await;
    let value = text.lines().find_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        (series == name).then_some(value)
    });
    value
        .unwrap_or_else(|| panic!("no {name}"))
        .parse()
        .unwrap()
}

/// SIGKILL, and back on the same data: worker and client go on from what they know, and say that
/// they are out of touch; nobody becomes somebody else.
#[test]
fn an_etcd_that_is_killed_and_comes_back_is_not_missed() {
    with_store(async |runtime, store| {
        let served = endpoint(runtime, "generate").serve(echo).await.unwrap();
        let client = client_of(runtime, &served).await;
        let id = served.instance_id();
        let stale = async || sample(runtime, "corelane_discovery_stale_watches").await > 0.0;
        assert!(!stale().await);
        store.do_with(lab::Etcd::kill).await;
        calls_until("while it is away", &client, &stale).await;
        let healthy = (true, json!("ready"), "healthy".to_owned());
        assert_eq!(seen(runtime).await, healthy);
        store.do_with(|etcd| etcd.restart(true)).await;
        calls_until("until it is back", &client, async || !stale().await).await;
        assert_eq!((served.instance_id(), seen(runtime).await), (id, healthy));
        let key = format!("v1/instances/production/worker/generate/{:x}", id.unwrap());
        assert_eq!(store.keys().await, [key]);
        assert_eq!(changes(runtime), [1, 1, 1, 1, 0, 0]);
        assert_eq!(
            sample(runtime, "corelane_discovery_lease_losses_total").await,
            0.0
        );
    });
}

/// The same on no data: the lease is lost, and all is registered again under another one, while
/// calls go on.
#[test]
fn an_etcd_that_comes_back_empty_gets_all_again() {
    with_store(async |runtime, store| {
        let served = endpoint(runtime, "generate").serve(echo).await.unwrap();
        let client = client_of(runtime, &served).await;
        let before = served.instance_id();
        store.do_with(lab::Etcd::kill).await;
        assert_eq!(first(&client).await.unwrap(), json!(1));
        store.do_with(|etcd| etcd.restart(false)).await;
        let other = async || served.instance_id() != before;
        calls_until("until it is somebody else", &client, other).await;
        assert!(served.reached(State::Healthy, PATIENCE).await);
        let after = served.instance_id().unwrap();
        let key = format!("v1/instances/production/worker/generate/{after:x}");
        assert_eq!(store.keys().await, [key]);
        let known = async || client.instances().iter().map(|seen| seen.id).eq([after]);
        calls_until("until the client knows him alone", &client, known).await;
        assert_eq!(changes(runtime), [2, 2, 2, 2, 0, 0]);
        assert_eq!(
            sample(runtime, "corelane_discovery_lease_losses_total").await,
            1.0
        );
        assert_eq!(
            seen(runtime).await,
            (true, json!("ready"), "healthy".into())
        );
    });
}

/// SIGSTOP: it neither answers nor closes its connections.
#[test]
fn an_etcd_that_stands_still_is_not_missed() {
    with_store(async |runtime, store| {
        let served = endpoint(runtime, "generate").serve(echo).await.unwrap();
        let client = client_of(runtime, &served).await;
        let id = served.instance_id();
        store.do_with(|etcd| etcd.signal(Signal::STOP)).await;
        for _ in 0..100 {
            assert_eq!(first(&client).await.unwrap(), json!(1));
        }
        assert_eq!(
            seen(runtime).await,
            (true, json!("ready"), "healthy".into())
        );
        store.do_with(|etcd| etcd.signal(Signal::CONT)).await;
        let late = endpoint(runtime, "late").serve(echo).await.unwrap();
        assert!(late.reached(State::Healthy, PATIENCE).await);
        assert_eq!((served.instance_id(), served.state()), (id, State::Healthy));
    });
}

/// Served while the store is away it is created and nothing more: nobody can find it, and the
/// process is not ready.
#[test]
fn what_cannot_be_registered_is_created_until_it_can() {
    with_store(async |runtime, store| {
        store.do_with(lab::Etcd::kill).await;
        let served = endpoint(runtime, "generate").serve(echo).await.unwrap();
        assert_eq!(served.state(), State::Created);
        let created = (false, json!("notready"), "created".to_owned());
        assert_eq!(seen(runtime).await, created);
        store.do_with(|etcd| etcd.restart(true)).await;
        assert!(
            served
                .reached(State::Healthy, component_lab::DEADLINE)
                .await
        );
        let client = client_of(runtime, &served).await;
        assert_eq!(first(&client).await.unwrap(), json!(1));
        assert_eq!(changes(runtime), [1, 1, 1, 1, 0, 0]);
    });
}
