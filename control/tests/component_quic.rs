//! Calls whose responses come on QUIC, of this process on itself: both sides of the plane.

mod component_lab;

use component_lab::{
    client_of, endless, endpoint, ends_early, options, settled, until, with_runtime,
};
use corelane::component::{
    Admission, DynamoError, Ending, Input, Options, Outcome, PayloadCodec, Reason, Request,
    ResponsePlane, Runtime, Stream,
};
use serde_json::{Value, json};

fn on_quic() -> Options {
    options().response_plane(ResponsePlane::Quic)
}

/// As many items as are asked for, each with the text of the request; then the error, if one is
/// asked for.
async fn answer(request: Request, stream: &mut Stream) -> Outcome {
    let asked: Value = request.parse()?;
    let items = asked["items"].as_u64();
    for number in 0..items.ok_or_else(|| DynamoError::invalid_argument("how many?"))? {
        stream
            .send(&json!({"number": number, "text": asked["text"]}))
            .await?;
    }
    match asked["fails"].as_bool() {
        Some(true) => Err(DynamoError::not_found("no such model").into()),
        _ => Ok(()),
    }
}

#[test]
fn items_come_whole_and_in_order() {
    for codec in [PayloadCodec::Json, PayloadCodec::MessagePack] {
        with_runtime(on_quic().shards(2), async |runtime| {
            let served = endpoint(runtime, "generate").codec(codec);
            let served = served.serve(answer).await.unwrap();
            let client = client_of(runtime, &served).await;
            for (items, bytes) in [(0, 1), (1, 1), (128, 64), (3, 60_000)] {
                let text = "é".repeat(bytes);
                let asked = json!({"items": items, "text": text});
                let mut replies = Vec::new();
                for _ in 0..8 {
                    replies.push(client.call(&asked).await.unwrap());
                }
                for mut reply in replies {
                    for number in 0..items {
                        let item: Value = reply.next_data().await.unwrap().unwrap();
                        assert_eq!(item["number"], number);
                        assert_eq!(item["text"], text);
                    }
                    assert!(reply.next_data::<Value>().await.is_none());
                    assert_eq!(reply.ending(), Some(Ending::Complete));
                }
            }
            settled(&[&served], &client).await;
        });
    }
}

#[test]
fn errors_keep_what_they_are() {
    with_runtime(on_quic(), async |runtime| {
        let served = endpoint(runtime, "fails").serve(answer).await.unwrap();
        let client = client_of(runtime, &served).await;
        let asked = |items: u32| json!({"items": items, "text": "", "fails": true});
        let error = client.call(&json!({})).await.err().unwrap();
        assert_eq!(error.reason(), Reason::InvalidArgument);
        assert_eq!(error.text(), "how many?");
        for items in [0, 2] {
            let mut reply = client.call(&asked(items)).await.unwrap();
            for _ in 0..items {
                reply.next_data::<Value>().await.unwrap().unwrap();
            }
            let error = reply.next_data::<Value>().await.unwrap().unwrap_err();
            assert_eq!(error.reason(), Reason::NotFound);
            assert_eq!(error.text(), "no such model");
        }
        settled(&[&served], &client).await;
    });
}

#[test]
fn a_response_ends_when_it_is_stopped_killed_or_dropped() {
    with_runtime(on_quic(), ends_early);
}

/// One request runs, the other waits for its slot: its caller has no prologue, and goes.
#[test]
fn a_caller_who_goes_before_the_prologue_leaves_nothing_behind() {
    let admission = Admission {
        running_max: 1,
        queue_max: 8,
    };
    with_runtime(on_quic().admission(admission), async |runtime| {
        let served = endpoint(runtime, "endless").serve(endless).await.unwrap();
        let client = client_of(runtime, &served).await;
        let mut first = client.call(&1).await.unwrap();
        first.next_data::<u64>().await.unwrap().unwrap();
        let queued = || served.count(|stats| stats.requests.get()) == 2;
        tokio::select! {
            _ = client.call(&2) => panic!("there is one slot"),
            () = until("it waits", queued) => {}
        }
        drop(first);
        settled(&[&served], &client).await;
        let mut third = client.call(&3).await.unwrap();
        assert_eq!(third.next_data::<u64>().await.unwrap().unwrap(), 0);
        drop(third);
        settled(&[&served], &client).await;
    });
}

/// Answers each value with the sum so far; says so when the input broke off.
async fn sums(_: Request, mut input: Input, stream: &mut Stream) -> Outcome {
    let mut sum = 0;
    while let Some(value) = input.next::<i64>().await {
        sum += value?;
        stream.send(&sum).await?;
    }
    stream.send(&"over").await
}

/// The request stream takes TCP, the response QUIC (spec/request-plane.md §5).
#[test]
fn bidirectional_calls_respond_on_quic() {
    with_runtime(on_quic().shards(2), async |runtime| {
        let served = endpoint(runtime, "sums").serve_many(sums).await.unwrap();
        // An input that breaks off is the caller's doing, and ends as if the instance had failed.
        let client = client_of(runtime, &served).await.detect_faults(false);
        for way in ["whole", "whole", "dropped feed", "stop", "kill", "drop"] {
            let (mut feed, mut reply) = client.call_many().await.unwrap();
            for value in 1..=20 {
                feed.send(&value).await.unwrap();
                let sum: i64 = reply.next_data().await.unwrap().unwrap();
                assert_eq!(sum, value * (value + 1) / 2, "{way}");
            }
            match way {
                "whole" => feed.finish().await.unwrap(),
                "dropped feed" => drop(feed),
                "stop" => reply.stop(),
                "kill" => reply.kill(),
                _ => continue,
            }
            let mut rest = Vec::new();
            while let Some(item) = reply.next_data::<Value>().await {
                rest.push(item.map_err(|error| error.reason()));
            }
            let (wanted, ending) = match way {
                "whole" => (vec![Ok(json!("over"))], Ending::Complete),
                "dropped feed" => (vec![Err(Reason::Disconnected)], Ending::Failed),
                _ => (Vec::new(), Ending::Stopped),
            };
            assert_eq!((rest, reply.ending()), (wanted, Some(ending)), "{way}");
        }
        settled(&[&served], &client).await;
    });
}

#[test]
fn a_worker_of_the_other_plane_says_so() {
    let store = corelane::component::MemoryStore::default();
    with_runtime(options().memory(&store), async |worker| {
        let served = endpoint(worker, "generate").serve(answer).await.unwrap();
        let caller = Runtime::start(on_quic().memory(&store)).await.unwrap();
        let client = client_of(&caller, &served).await;
        let error = client.call(&json!({"items": 1})).await.err().unwrap();
        assert!(error.text().contains("response plane mismatch"), "{error}");
        assert!(error.text().contains("requested quic"), "{error}");
        drop(client);
        caller.stop().await;
    });
}
