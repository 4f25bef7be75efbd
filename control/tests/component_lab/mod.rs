//! What the tests of the component model share.
#![allow(dead_code, reason = "each test file uses a part")]

use std::time::{Duration, Instant};

use corelane::component::{
    Client, Ending, Endpoint, Options, Outcome, Request, Runtime, SeenInstance, Served, Stream,
};
use serde_json::Value;
use tokio::task::LocalSet;

/// The longest that anything here may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(1200);

/// One process alone, which leaves signals to the test.
pub(crate) fn options() -> Options {
    Options::local().unwrap().signals(false)
}

/// Runs a test on a runtime of these options, and stops it.
pub(crate) fn with_runtime(options: Options, test: impl AsyncFnOnce(&Runtime)) {
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let test = async {
        let runtime = Runtime::start(options).await.unwrap();
        test(&runtime).await;
        runtime.stop().await;
    };
    let bounded = async { tokio::time::timeout(DEADLINE, test).await.unwrap() };
    LocalSet::new().block_on(&tokio, bounded);
}

/// Answers with its body, three times.
pub(crate) async fn echo(request: Request, stream: &mut Stream) -> Outcome {
    let value: Value = request.parse()?;
    for _ in 0..3 {
        stream.send(&value).await?;
    }
    Ok(())
}

/// A client of what is served, which knows an instance.
pub(crate) async fn client_of(runtime: &Runtime, served: &Served) -> Client {
    let client = runtime.client(&served.id().to_string()).unwrap();
    client.wait_for_instances(DEADLINE).await.unwrap();
    client
}

/// Sends numbers until its caller wants no more.
pub(crate) async fn endless(_: Request, stream: &mut Stream) -> Outcome {
    for number in 0u64.. {
        stream.send(&number).await?;
        if number % 16 == 15 {
            stream.sleep(Duration::from_millis(1)).await?;
        }
    }
    Ok(())
}

/// A response ends when it is stopped, killed or dropped, and nothing of it is left.
pub(crate) async fn ends_early(runtime: &Runtime) {
    let served = endpoint(runtime, "endless").serve(endless).await.unwrap();
    let client = client_of(runtime, &served).await;
    for way in ["stop", "kill", "drop", "drop before it began"] {
        if way == "drop before it began" {
            let send = client.call(&1);
            let _ = tokio::time::timeout(Duration::from_micros(50), send).await;
            continue;
        }
        let mut reply = client.call(&1).await.unwrap();
        let first: u64 = reply.next_data().await.unwrap().unwrap();
        assert_eq!(first, 0);
        match way {
            "stop" => reply.stop(),
            "kill" => reply.kill(),
            _ => continue,
        }
        while let Some(item) = reply.next_item().await {
            item.unwrap();
        }
        assert_ne!(reply.ending(), Some(Ending::Failed), "{way}");
    }
    settled(&[&served], &client).await;
    assert_eq!(served.count(|stats| stats.finished.get()), 0);
}

/// An endpoint of `production/worker`.
pub(crate) fn endpoint(runtime: &Runtime, name: &str) -> Endpoint {
    let namespace = runtime.namespace("production").unwrap();
    let component = namespace.component("worker").unwrap();
    component.endpoint(name).unwrap()
}

/// Waits until no request and no call is left.
pub(crate) async fn settled(served: &[&Served], client: &Client) {
    let began = Instant::now();
    let idle = || {
        let called = |seen: &SeenInstance| seen.load > 0;
        served.iter().all(|served| served.busy() == 0) && !client.instances().iter().any(called)
    };
    while !idle() {
        assert!(began.elapsed() < DEADLINE, "something is left");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Waits until a condition holds.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(
            began.elapsed() < DEADLINE,
            "{what}: not so after {DEADLINE:?}"
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
