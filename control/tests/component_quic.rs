//! Calls whose responses come on QUIC, of this process on itself: both sides of the plane.

mod component_lab;

use component_lab::{client_of, endpoint, ends_early, options, settled, with_runtime};
use corelane::component::{
    DynamoError, Ending, Options, Outcome, PayloadCodec, Reason, Request, ResponsePlane, Runtime,
    Stream,
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
