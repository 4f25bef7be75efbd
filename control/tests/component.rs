//! The component model in one process: what is served is called, drained, and refused as it should.

mod component_lab;

use std::process::{Command, Output};

use component_lab::{echo, endpoint, options, with_runtime};

use corelane::component::{DynamoError, Error, Fault, Outcome, Request, Served, State, Stream};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

/// `corelane call`, as another process makes it.
async fn call(served: &Served, body: &str) -> Output {
    let address = served.called_at().unwrap();
    let body = body.to_owned();
    let run = move || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
        command.args(["call", "--json", "--address", &address, "--body", &body]);
        command.env("CORELANE_LOG", "warn").output().unwrap()
    };
    spawn_blocking(run).await.unwrap()
}

fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect()
}

#[test]
fn handlers_answer_on_every_shard_and_endpoints_are_told_apart() {
    with_runtime(options().shards(2), async |runtime| {
        let first = endpoint(runtime, "generate");
        let first = first.serve(echo).await.unwrap();
        let second = endpoint(runtime, "fail");
        let fail = async |_: Request, _: &mut Stream| -> Outcome {
            Err(Fault::from(DynamoError::invalid_argument("never")))
        };
        let second = second.serve(fail).await.unwrap();
        assert_eq!(
            (first.state(), second.state()),
            (State::Healthy, State::Healthy)
        );
        for _ in 0..4 {
            let lines = lines(&call(&first, r#"{"a":1}"#).await);
            let items: Vec<_> = lines.iter().filter(|line| line["type"] == "item").collect();
            assert!(
                items.len() == 3 && items[0]["data"] == json!({"a": 1}),
                "{lines:?}"
            );
            let output = call(&second, "1").await;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(!output.status.success() && text.contains("never"), "{text}");
        }
        assert_eq!(first.count(|stats| stats.finished.get()), 4);
        assert_eq!(second.count(|stats| stats.failed.get()), 4);
        assert_eq!((first.busy(), second.busy()), (0, 0));
    });
}

#[test]
fn names_are_checked_when_made_and_an_endpoint_is_served_once() {
    with_runtime(options(), async |runtime| {
        assert!(matches!(runtime.namespace("a.b"), Err(Error::Name(_))));
        let odd = runtime
            .endpoint("dynamo.Processor.chat/completions")
            .unwrap();
        assert_eq!(odd.id().name, "chat_completions");
        assert!(matches!(odd.serve(echo).await, Err(Error::Name(_))));
        let served = endpoint(runtime, "generate").serve(echo).await.unwrap();
        let again = endpoint(runtime, "generate").serve(echo).await;
        assert!(matches!(again, Err(Error::AlreadyServed(_))));
        served.stop().await;
        assert_eq!(served.state(), State::Deregistered);
        let output = call(&served, "1").await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("unknown endpoint"), "{text}");
        let again = endpoint(runtime, "generate").serve(echo).await.unwrap();
        assert!(call(&again, "1").await.status.success());
    });
}

#[test]
fn a_panic_and_a_body_of_another_kind_become_errors() {
    with_runtime(options(), async |runtime| {
        let handler = async |request: Request, stream: &mut Stream| -> Outcome {
            let number: u32 = request.parse()?;
            assert!(number != 7, "a number that this handler cannot stand");
            stream.send(&number).await
        };
        let served = endpoint(runtime, "generate");
        let served = served.serve(handler).await.unwrap();
        for (body, said) in [("7", "panicked"), ("\"x\"", "not what this endpoint takes")] {
            let output = call(&served, body).await;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(text.contains(said), "{text}");
        }
        assert!(call(&served, "8").await.status.success());
        assert_eq!(served.count(|stats| stats.panicked.get()), 1);
        assert_eq!(served.count(|stats| stats.failed.get()), 1);
        assert_eq!(served.busy(), 0);
    });
}
