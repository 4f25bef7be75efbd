//! Clients of the component model against workers of the same process: what is asked is answered,
//! what is not wanted ends, and what fails is told and counted.

mod component_lab;

use std::time::Duration;

use component_lab::{
    client_of, echo, endless, endpoint, ends_early, options, settled, with_runtime,
};
use corelane::component::{
    Call, Client, Deadlines, DynamoError, Ending, EndpointId, Fault, MemoryStore, Outcome,
    PayloadCodec, Reason, Request, RoutingMode, Stream, TokioRequest, TokioStream,
};
use serde_json::{Value, json};

/// A wait that is over at once if all is well.
const PATIENCE: Duration = Duration::from_secs(30);

async fn all(client: &Client, call: Call) -> Result<Vec<Value>, DynamoError> {
    let mut reply = client.send(call).await?;
    let mut items = Vec::new();
    while let Some(item) = reply.next_data().await {
        items.push(item?);
    }
    assert_eq!(reply.ending(), Some(Ending::Complete));
    Ok(items)
}

#[test]
fn values_come_back_in_both_codecs() {
    for codec in [PayloadCodec::Json, PayloadCodec::MessagePack] {
        with_runtime(options().shards(2), async |runtime| {
            let served = endpoint(runtime, "generate").codec(codec);
            let served = served.serve(echo).await.unwrap();
            let client = client_of(runtime, &served).await;
            assert_eq!(client.codec(), codec);
            let want = json!({"text": "grüße", "n": [1, -2.5, null]});
            let call = client.request(&want).unwrap();
            assert_eq!(all(&client, call).await.unwrap(), vec![want; 3]);
            settled(&[&served], &client).await;
        });
    }
}

#[test]
fn a_handler_calls_another_endpoint_from_its_shard() {
    with_runtime(options().shards(2), async |runtime| {
        let inner = endpoint(runtime, "inner").serve(echo).await.unwrap();
        let client = client_of(runtime, &inner).await;
        let relay = move |shard: &corelane::component::Shard| {
            let local = shard.client(&client);
            async move |request: Request, stream: &mut Stream| -> Outcome {
                let mut reply = local.call(&request.parse::<Value>()?).await?;
                while let Some(item) = reply.next_data::<Value>().await {
                    stream.send(&json!({"inner": item?})).await?;
                }
                Ok(())
            }
        };
        let outer = endpoint(runtime, "outer").serve_with(relay).await.unwrap();
        let client = client_of(runtime, &outer).await;
        for number in 0..20 {
            let call = client.request(&number).unwrap();
            let want = vec![json!({"inner": number}); 3];
            assert_eq!(all(&client, call).await.unwrap(), want);
        }
        assert_eq!(inner.count(|stats| stats.finished.get()), 20);
        settled(&[&inner, &outer], &client).await;
    });
}

#[test]
fn a_call_ends_when_it_is_stopped_killed_or_dropped() {
    with_runtime(options(), ends_early);
}

#[test]
fn every_wait_has_a_deadline() {
    with_runtime(options(), async |runtime| {
        let silent = async |_: Request, stream: &mut Stream| -> Outcome {
            stream.stopped().await;
            Ok(())
        };
        let served = endpoint(runtime, "silent").serve(silent).await.unwrap();
        let client = client_of(runtime, &served).await;
        let short = Duration::from_millis(200);
        let deadlines = |first_item, total| Deadlines {
            first_item,
            total,
            ..Deadlines::default()
        };
        for (deadlines, reason) in [
            (deadlines(short, PATIENCE), Reason::ResponseTimeout),
            (deadlines(PATIENCE, short), Reason::DeadlineExceeded),
        ] {
            let lenient = client.clone().detect_faults(false);
            let call = lenient.request(&1).unwrap().deadlines(deadlines);
            let ended = all(&lenient, call).await;
            assert_eq!(ended.unwrap_err().reason(), reason);
        }
        settled(&[&served], &client).await;
        let once = async |_: Request, stream: &mut Stream| -> Outcome {
            stream.send(&1).await?;
            stream.stopped().await;
            Ok(())
        };
        let served = endpoint(runtime, "once").serve(once).await.unwrap();
        let client = client_of(runtime, &served).await;
        let call = client.request(&1).unwrap().inactivity(Some(short));
        let mut reply = client.send(call).await.unwrap();
        assert_eq!(reply.next_data::<u32>().await.unwrap().unwrap(), 1);
        let error = reply.next_data::<u32>().await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::ResponseTimeout);
        assert!(client.instances()[0].failed);
        drop(reply);
        settled(&[&served], &client).await;
    });
}

#[test]
fn errors_of_handlers_arrive_as_they_are() {
    with_runtime(options(), async |runtime| {
        let fails = async |request: Request, stream: &mut Stream| -> Outcome {
            let after: u32 = request.parse()?;
            for number in 0..after {
                stream.send(&number).await?;
            }
            Err(DynamoError::not_found("no such model").into())
        };
        let served = endpoint(runtime, "fails").serve(fails).await.unwrap();
        let client = client_of(runtime, &served).await;
        let error = all(&client, client.request(&0).unwrap()).await.unwrap_err();
        let text = "no such model";
        assert_eq!((error.reason(), error.text()), (Reason::NotFound, text));
        let mut reply = client.call(&2).await.unwrap();
        for want in 0..2u32 {
            assert_eq!(reply.next_data::<u32>().await.unwrap().unwrap(), want);
        }
        let error = reply.next_data::<u32>().await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::NotFound);
        assert!(reply.next_data::<u32>().await.is_none());
        let error = client.call("no number").await.err().unwrap();
        assert_eq!(error.reason(), Reason::InvalidArgument);
        settled(&[&served], &client).await;
        assert!(
            !client.instances()[0].failed,
            "none of these is the instance's fault"
        );
    });
}

#[test]
fn instances_that_fail_are_left_out_and_exact_calls_say_so() {
    let store = MemoryStore::default();
    let options = options()
        .memory(&store)
        .inhibited(Duration::from_secs(3600));
    with_runtime(options, async |runtime| {
        let served = endpoint(runtime, "generate").serve(echo).await.unwrap();
        let client = client_of(runtime, &served).await;
        // An instance that nobody is behind: a port that was free a moment ago.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let value = json!({
            "type": "Endpoint", "namespace": "production", "component": "worker",
            "endpoint": "generate", "instance_id": 1,
            "transport": {"tcp": format!("{address}/1/production/worker/generate")},
        });
        let key = "v1/instances/production/worker/generate/1";
        store.put(key, value.to_string().as_bytes());
        while client.instances().len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut failed = 0;
        for _ in 0..20 {
            match all(&client, client.request(&1).unwrap()).await {
                Ok(items) => assert_eq!(items.len(), 3),
                Err(error) => {
                    assert_eq!(error.reason(), Reason::CannotConnect);
                    failed += 1;
                }
            }
        }
        assert_eq!(failed, 1, "once is enough to know");
        assert!(client.instances()[0].failed && !client.instances()[1].failed);
        let exact = |id| client.request(&1).unwrap().to(id);
        let direct = client.clone().mode(RoutingMode::Direct);
        assert_eq!(
            all(&direct, exact(served.instance_id().unwrap()))
                .await
                .unwrap()
                .len(),
            3
        );
        let error = all(&direct, exact(99)).await.unwrap_err();
        assert_eq!(error.reason(), Reason::CannotConnect);
        let error = all(&direct, client.request(&1).unwrap()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument);
        // Any change of the list gives all another chance.
        store.delete(key);
        while client.instances().len() > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        client.set_busy(&[served.instance_id().unwrap()].into());
        let error = all(&client, client.request(&1).unwrap()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::PoolExhausted);
        client.set_busy(&[].into());
        assert_eq!(
            all(&client, client.request(&1).unwrap())
                .await
                .unwrap()
                .len(),
            3
        );
        settled(&[&served], &client).await;
    });
}

#[test]
fn all_clients_of_an_endpoint_share_one_watch_and_what_they_know() {
    with_runtime(options().shards(2), async |runtime| {
        let served = endpoint(runtime, "generate").serve(endless).await.unwrap();
        let clients: Vec<Client> = (0..50)
            .map(|_| runtime.client("production.worker.generate").unwrap())
            .collect();
        let other = endpoint(runtime, "other").client();
        assert_eq!(runtime.watches(), 2);
        drop(other);
        assert_eq!(runtime.watches(), 1);
        clients[0].wait_for_instances(PATIENCE).await.unwrap();
        let mut replies = Vec::new();
        for client in &clients[..10] {
            replies.push(client.call(&1).await.unwrap());
        }
        assert_eq!(clients[49].instances()[0].load, 10);
        drop(replies);
        settled(&[&served], &clients[49]).await;
        drop(clients);
        assert_eq!(runtime.watches(), 0);
    });
}

#[test]
fn the_older_yaml_reference_resolves() {
    let store = MemoryStore::default();
    with_runtime(options().memory(&store), async |runtime| {
        let served = endpoint(runtime, "completions").serve(echo).await.unwrap();
        let client = runtime.client("dynamo.Processor.chat/completions").unwrap();
        let at = served.called_at().unwrap();
        // Either reading: that of 1.6.1, and the name with its slash.
        for name in ["chat_completions", "chat/completions"] {
            let id = EndpointId::new("dynamo", "Processor", name);
            let value = json!({
                "type": "Endpoint", "namespace": id.namespace, "component": id.component,
                "endpoint": name, "instance_id": 7, "transport": {"tcp": at},
            });
            let key = format!("v1/instances/{id}/7");
            store.put(&key, value.to_string().as_bytes());
            client.wait_for_instances(PATIENCE).await.unwrap();
            let call = client.request(&json!({"model": "m"})).unwrap();
            assert_eq!(all(&client, call).await.unwrap().len(), 3, "{name}");
            store.delete(&key);
            while !client.instances().is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let error = client.call(&1).await.err().unwrap();
        assert_eq!(error.reason(), Reason::Unavailable);
    });
}

#[test]
fn handlers_run_on_tokio_as_well() {
    with_runtime(options(), async |runtime| {
        let tokio = tokio::runtime::Handle::current();
        let slow = |request: TokioRequest, mut stream: TokioStream| async move {
            let count: u32 = request.parse()?;
            assert!(count != 7, "a number that this handler cannot stand");
            for number in 0..count {
                tokio::time::sleep(Duration::from_micros(10)).await;
                stream.send(&number).await?;
            }
            if count == 3 {
                return Err(Fault::from(DynamoError::not_found("three")));
            }
            Ok(())
        };
        let served = endpoint(runtime, "generate")
            .serve_on(tokio, slow)
            .await
            .unwrap();
        let client = client_of(runtime, &served).await;
        for count in [0usize, 1, 200] {
            let items = all(&client, client.request(&count).unwrap()).await.unwrap();
            assert_eq!(items, (0..count).map(Value::from).collect::<Vec<_>>());
        }
        for (count, text) in [(3, "three"), (7, "the handler of this request panicked")] {
            let error = all(&client, client.request(&count).unwrap())
                .await
                .unwrap_err();
            assert_eq!(error.text(), text);
        }
        // Nobody reads: the handler waits, and its request ends when the caller goes.
        let reply = client.call(&1_000_000).await.unwrap();
        drop(reply);
        settled(&[&served], &client).await;
    });
}
