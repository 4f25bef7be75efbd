//! What the tests of the component model share.
#![allow(dead_code, reason = "each test file uses a part")]

use std::time::{Duration, Instant};

use corelane::component::{
    Client, Endpoint, Options, Outcome, Request, Runtime, SeenInstance, Served, Stream,
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
