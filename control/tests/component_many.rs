//! Bidirectional calls through the API: handlers on shards and on tokio, callers on shards and on
//! threads, and every way in which either end goes before the other.

mod component_lab;

use std::time::Duration;

use component_lab::{echo, endpoint, options, settled, until, with_runtime};
use corelane::component::{
    Client, Ending, Error, Input, LocalClient, Outcome, PayloadCodec, Reason, Request, Runtime,
    Served, Shard, Stream, TokioInput, TokioRequest, TokioStream,
};

/// The sum so far, for each value.
async fn sums(_: Request, mut input: Input, stream: &mut Stream) -> Outcome {
    let mut sum = 0;
    while let Some(value) = input.next::<i64>().await {
        sum += value?;
        stream.send(&sum).await?;
    }
    assert!(input.is_complete());
    Ok(())
}

async fn client_of(runtime: &Runtime, served: &Served) -> Client {
    let client = component_lab::client_of(runtime, served).await;
    client.detect_faults(false)
}

/// Sends 1 to `count` while it reads their sums.
async fn summed(client: &Client, count: i64) {
    let (mut feed, mut reply) = client.call_many().await.unwrap();
    assert!(reply.instance_id() != 0);
    let writer = tokio::task::spawn_local(async move {
        for value in 1..=count {
            feed.send(&value).await.unwrap();
        }
        feed.finish().await.unwrap();
    });
    let mut seen = 0;
    while let Some(sum) = reply.next_data::<i64>().await {
        seen += 1;
        assert_eq!(sum.unwrap(), seen * (seen + 1) / 2);
    }
    assert_eq!((seen, reply.ending()), (count, Some(Ending::Complete)));
    writer.await.unwrap();
}

#[test]
fn values_go_one_way_and_items_the_other() {
    for codec in [PayloadCodec::Json, PayloadCodec::MessagePack] {
        with_runtime(options().shards(2), async |runtime| {
            let sums = endpoint(runtime, "sums").codec(codec).serve_many(sums);
            let sums = sums.await.unwrap();
            let client = client_of(runtime, &sums).await;
            for count in [0, 1, 1_000] {
                summed(&client, count).await;
            }
            // Each value waits for the answer to the one before.
            let (mut feed, mut reply) = client.call_many().await.unwrap();
            for sum in 1..=300 {
                feed.send(&1).await.unwrap();
                assert_eq!(reply.next_data::<i64>().await.unwrap().unwrap(), sum);
            }
            feed.finish().await.unwrap();
            assert!(reply.next_item().await.is_none());
            // Many at the same time, on one connection for each pair of shards.
            let calls = (0..50).map(|count| {
                let client = client.clone();
                tokio::task::spawn_local(async move { summed(&client, count).await })
            });
            for call in calls.collect::<Vec<_>>() {
                call.await.unwrap();
            }
            settled(&[&sums], &client).await;
            assert_eq!(sums.count(|stats| stats.finished.get()), 54);
        });
    }
}

/// A handler that calls another: all that comes goes on, and back.
async fn pass_on(inner: &LocalClient, mut input: Input, stream: &mut Stream) -> Outcome {
    let (mut feed, mut reply) = inner.call_many().await?;
    while let Some(value) = input.next_encoded().await {
        feed.send_encoded(&value).await?;
        if let Some(item) = reply.next_item().await {
            stream.send_item(&item?).await?;
        }
    }
    feed.finish();
    assert!(reply.next_item().await.is_none());
    Ok(())
}

/// The same as `sums`, on tokio.
async fn on_tokio(_: TokioRequest, mut input: TokioInput, mut stream: TokioStream) -> Outcome {
    let mut sum = 0;
    while let Some(value) = input.next::<i64>().await {
        tokio::time::sleep(Duration::from_micros(10)).await;
        sum += value?;
        stream.send(&sum).await?;
    }
    assert!(input.is_complete());
    Ok(())
}

#[test]
fn handlers_pass_streams_on_and_run_on_tokio() {
    with_runtime(options().shards(2), async |runtime| {
        let handle = tokio::runtime::Handle::current();
        let inner = endpoint(runtime, "inner").serve_many_on(handle, on_tokio);
        let inner = inner.await.unwrap();
        let client = client_of(runtime, &inner).await;
        let factory = move |shard: &Shard| {
            let local = shard.client(&client);
            async move |_: Request, input: Input, stream: &mut Stream| -> Outcome {
                pass_on(&local, input, stream).await
            }
        };
        let outer = endpoint(runtime, "outer").serve_many_with(factory);
        let outer = outer.await.unwrap();
        for served in [&inner, &outer] {
            let client = client_of(runtime, served).await;
            for count in [0, 1, 200] {
                summed(&client, count).await;
            }
            // Whoever goes ends both requests.
            let (mut feed, mut reply) = client.call_many().await.unwrap();
            feed.send(&1).await.unwrap();
            assert_eq!(reply.next_data::<i64>().await.unwrap().unwrap(), 1);
            drop(reply);
            until("the writer hears of it", || {
                inner.busy() == 0 && outer.busy() == 0
            })
            .await;
            while feed.send(&1).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            settled(&[&inner, &outer], &client).await;
        }
    });
}

#[test]
fn either_end_may_go_first() {
    with_runtime(options(), async |runtime| {
        // Takes as many as its first value says, then ends.
        let few = async |_: Request, mut input: Input, stream: &mut Stream| -> Outcome {
            let Some(count) = input.next::<u32>().await else {
                return Ok(());
            };
            for _ in 0..count? {
                let _ = input.next_encoded().await;
            }
            stream.send("enough").await
        };
        let few = endpoint(runtime, "few").serve_many(few).await.unwrap();
        let client = client_of(runtime, &few).await;
        let (mut feed, mut reply) = client.call_many().await.unwrap();
        for value in [2, 7, 7, 7] {
            feed.send(&value).await.unwrap();
        }
        assert_eq!(
            reply.next_data::<String>().await.unwrap().unwrap(),
            "enough"
        );
        assert!(reply.next_item().await.is_none());
        assert_eq!(reply.ending(), Some(Ending::Complete));
        let over = loop {
            if let Err(error) = feed.send(&7).await {
                break error;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        assert_eq!(over.reason(), Reason::Cancelled);

        // Half an input is none.
        let (mut feed, mut reply) = client.call_many().await.unwrap();
        feed.send(&2).await.unwrap();
        drop(feed);
        let error = reply.next_item().await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::Disconnected);
        // A value that is none of the kind.
        let (mut feed, mut reply) = client.call_many().await.unwrap();
        feed.send("x").await.unwrap();
        let error = reply.next_data::<String>().await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument);
        assert!(error.text().contains("not what this endpoint takes"));
        settled(&[&few], &client).await;
    });
}

/// A feed that its own caller dropped was counted as a failure of the instance, which got no calls
/// for a while.
#[test]
fn an_abandoned_feed_is_not_held_against_its_instance() {
    with_runtime(options(), async |runtime| {
        let sums = endpoint(runtime, "sums").serve_many(sums).await.unwrap();
        let client = client_of(runtime, &sums).await.detect_faults(true);
        let (mut feed, mut reply) = client.call_many().await.unwrap();
        feed.send(&1).await.unwrap();
        assert_eq!(reply.next_data::<i64>().await.unwrap().unwrap(), 1);
        drop(feed);
        let error = reply.next_item().await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::Disconnected);
        summed(&client, 3).await;
    });
}

#[test]
fn requests_of_the_other_kind_are_refused() {
    with_runtime(options(), async |runtime| {
        let many = endpoint(runtime, "many").serve_many(sums).await.unwrap();
        let one = endpoint(runtime, "one").serve(echo).await.unwrap();
        let client = client_of(runtime, &many).await;
        let error = client.call(&1).await.err().unwrap();
        assert_eq!(error.reason(), Reason::InvalidArgument);
        assert!(
            error.text().contains("takes a stream of requests"),
            "{error}"
        );
        let client = client_of(runtime, &one).await;
        let (feed, mut reply) = client.call_many().await.unwrap();
        let error = reply.next_item().await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument);
        drop(feed);
        let checked = endpoint(runtime, "checked").health_check(&1).unwrap();
        let refused = checked.serve_many(sums).await;
        assert!(matches!(refused, Err(Error::NotChecked(_))));
        settled(&[&many, &one], &client).await;
    });
}
