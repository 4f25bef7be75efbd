//! Requests with random ends through the API, both ways: calls that are read, read slowly, stopped,
//! killed, and dropped before and after they began. At the end nothing is left.
//!
//! The normal run makes 1,000; all 100,000 take a few minutes on two cores:
//!
//! ```sh
//! CORELANE_SOAK=100000 cargo test --release -p corelane --test component_soak
//! ```

mod component_lab;

use std::time::Duration;

use component_lab::{endpoint, options, settled, until, with_runtime};
use corelane::component::{Client, Ending, LocalClient, Outcome, Request, Runtime, Shard, Stream};

/// Calls under way at the same time.
const TOGETHER: u64 = 64;

/// Answers with as many items as it is asked for, some of them large.
async fn count(request: Request, stream: &mut Stream) -> Outcome {
    let items: u64 = request.parse()?;
    let large = "x".repeat(20_000);
    for number in 0..items {
        if number % 7 == 6 {
            stream.send(&large).await?;
        } else {
            stream.send(&number).await?;
        }
        if number % 13 == 12 {
            stream.sleep(Duration::from_micros(200)).await?;
        }
    }
    Ok(())
}

/// One call that goes as its number says.
async fn one(client: &Client, number: u64) {
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let (way, items) = (mixed % 8, 1 + mixed / 8 % 40);
    if way == 0 {
        // Dropped at any moment, also before it has begun.
        let patience = Duration::from_micros(mixed / 64 % 2_000);
        let _ = tokio::time::timeout(patience, client.call(&items)).await;
        return;
    }
    let mut reply = client.call(&items).await.unwrap();
    let mut seen = 0;
    while let Some(item) = reply.next_item().await {
        item.unwrap();
        seen += 1;
        match way {
            1 if seen == 2 => return,
            2 if seen == 2 => reply.stop(),
            3 if seen == 2 => reply.kill(),
            4 => tokio::time::sleep(Duration::from_micros(300)).await,
            _ => {}
        }
    }
    if way > 3 {
        assert_eq!(
            (reply.ending(), seen),
            (Some(Ending::Complete), items),
            "way {way}"
        );
    }
}

/// The same from a shard: a handler that calls `inner` and passes on what comes.
async fn pass_on(inner: &LocalClient, request: Request, stream: &mut Stream) -> Outcome {
    let mut reply = inner.call(&request.parse::<u64>()?).await?;
    while let Some(item) = reply.next_item().await {
        stream.send_item(&item?).await?;
    }
    Ok(())
}

fn files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn memory_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

async fn round(clients: &[Client; 2], from: u64, to: u64) {
    let lanes = (0..TOGETHER).map(|lane| {
        let clients = clients.clone();
        tokio::task::spawn_local(async move {
            for number in (from..to).filter(|number| number % TOGETHER == lane) {
                one(&clients[(number / TOGETHER % 2) as usize], number).await;
            }
        })
    });
    for lane in lanes.collect::<Vec<_>>() {
        lane.await.unwrap();
    }
}

async fn client_of(runtime: &Runtime, name: &str) -> Client {
    let client = endpoint(runtime, name).client().detect_faults(false);
    client
        .wait_for_instances(Duration::from_secs(30))
        .await
        .unwrap();
    client
}

#[test]
fn nothing_is_left_of_requests_whatever_their_end() {
    let calls = std::env::var("CORELANE_SOAK").ok();
    let calls: u64 = calls.map_or(1_000, |calls| calls.parse().unwrap());
    with_runtime(options().shards(2), async |runtime| {
        let inner = endpoint(runtime, "inner").serve(count).await.unwrap();
        let client = client_of(runtime, "inner").await;
        let factory = move |shard: &Shard| {
            let local = shard.client(&client);
            async move |request: Request, stream: &mut Stream| -> Outcome {
                pass_on(&local, request, stream).await
            }
        };
        let outer = endpoint(runtime, "outer")
            .serve_with(factory)
            .await
            .unwrap();
        let clients = [
            client_of(runtime, "inner").await,
            client_of(runtime, "outer").await,
        ];
        // What grows once and stays: connections, tables, the allocator's own.
        round(&clients, 0, calls / 5).await;
        for client in &clients {
            settled(&[&inner, &outer], client).await;
        }
        let before = memory_bytes();
        round(&clients, calls / 5, calls).await;
        for client in &clients {
            settled(&[&inner, &outer], client).await;
        }
        until("all tables are empty", || runtime.is_idle()).await;
        let grown = memory_bytes().saturating_sub(before);
        assert!(grown < 32 << 20, "memory has grown by {grown} bytes");
        until("all response sockets are closed", || files() < 150).await;
        let ended = |name: &str| {
            let served = if name == "inner" { &inner } else { &outer };
            served.count(|stats| stats.finished.get() + stats.failed.get() + stats.abandoned.get())
        };
        let begun =
            |served: &corelane::component::Served| served.count(|stats| stats.requests.get());
        assert_eq!(begun(&inner), ended("inner"));
        assert_eq!(begun(&outer), ended("outer"));
        assert_eq!(inner.count(|stats| stats.panicked.get()), 0);
    });
}
