//! Both ends of the interoperability matrix on the component API, as `matrix_worker.py` and
//! `matrix_client.py` are on the stock wheel: they say the same in the same words.
//!
//! ```sh
//! interop-peer worker NS/COMP           # serves `generate` and, bidirectional, `chat`
//! interop-peer client CASES NS/COMP...  # all cases against each
//! interop-peer kv NS/COMP 4 [1,2,..]    # a worker with blocks of 4 of these tokens in its cache
//! ```

use std::time::Duration;

use anyhow::{Result, bail};
use corelane::component::{
    Client, DynamoError, Ending, Fault, Input, Options, Outcome, Reply, Request, Runtime, Stream,
};
use corelane_codec::event::block_hashes;
use corelane_codec::event::typed::KvBlock;
use serde_json::{Value, json};
use tokio::time::timeout;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// The texts of failures, which must arrive.
const FAILURE: &str = "the engine failed as it was asked to";

fn say(line: &Value) {
    println!("{line}");
}

/// Answers as the request asks for; says how it ended.
async fn generate(request: Request, stream: &mut Stream) -> Outcome {
    let asked: Value = request.parse()?;
    if asked["refuse"].as_bool() == Some(true) {
        return Err(DynamoError::invalid_argument(FAILURE).into());
    }
    let sent = answer(&asked, stream).await;
    let stopped = stream.is_stopped();
    say(&json!({"event": if stopped { "cancelled" } else { "finished" }, "key": asked["key"]}));
    sent
}

async fn answer(asked: &Value, stream: &mut Stream) -> Outcome {
    let pause = Duration::from_secs_f64(asked["delay_s"].as_f64().unwrap_or(0.0));
    for index in 0..asked["items"].as_u64().unwrap_or(1) {
        if asked["fail_after"].as_u64() == Some(index) {
            return Err(Fault::from(DynamoError::backend_unknown(FAILURE)));
        }
        if !pause.is_zero() {
            stream.sleep(pause).await?;
        }
        stream
            .send(&json!({"i": index, "echo": asked["text"]}))
            .await?;
    }
    Ok(())
}

/// Answers each value with the sum so far.
async fn chat(_: Request, mut input: Input, stream: &mut Stream) -> Outcome {
    let mut sum = 0;
    while let Some(value) = input.next::<i64>().await {
        sum += value?;
        stream.send(&sum).await?;
    }
    stream.send("over").await
}

async fn work(runtime: Runtime, name: &str) -> Result<()> {
    let one = runtime.endpoint(&format!("{name}/generate"))?;
    let one = one.serve(generate).await?;
    let many = runtime.endpoint(&format!("{name}/chat"))?;
    many.serve_many(chat).await?;
    say(&json!({"event": "ready", "instance": one.instance_id()}));
    runtime.stopping().await;
    Ok(())
}

/// Answers each request with its own name; its cache holds the blocks of these tokens, which is
/// told once, and to whoever asks.
async fn cached(runtime: Runtime, name: &str, block_tokens: &str, tokens: &str) -> Result<()> {
    let tokens: Vec<u32> = serde_json::from_str(tokens)?;
    let id = runtime.instance_id();
    let endpoint = runtime.endpoint(&format!("{name}/generate"))?;
    let cache = endpoint.kv_cache(0).await?;
    let generate = async move |_: Request, stream: &mut Stream| {
        stream.send(&json!({"worker": format!("{id:x}")})).await
    };
    let served = endpoint.serve(generate).await?;
    let hashes = block_hashes(&tokens, block_tokens.parse()?);
    let block = |(at, tokens_hash): (usize, u64)| KvBlock {
        block_hash: 2001 + at as u64,
        tokens_hash,
        mm_extra_info: None,
    };
    let blocks: Vec<KvBlock> = hashes.enumerate().map(block).collect();
    cache.stored(None, blocks).await?;
    say(&json!({"event": "ready", "instance": served.instance_id()}));
    runtime.stopping().await;
    Ok(())
}

/// What a reply gave: data, error texts, and whether it ended well.
async fn read(mut reply: Reply, end: impl Fn(&Reply, usize)) -> Value {
    let (mut items, mut error) = (Vec::new(), Value::Null);
    while let Some(item) = reply.next_data::<Value>().await {
        match item {
            Ok(item) => items.push(item),
            Err(failed) => error = failed.text().into(),
        }
        end(&reply, items.len());
    }
    let complete = reply.ending() == Some(Ending::Complete);
    json!({"items": items, "error": error, "complete": complete})
}

/// One case against `generate`.
async fn case(client: &Client, name: &str, request: &Value) -> Value {
    let reply = match client.call(request).await {
        Ok(reply) => reply,
        Err(error) => return json!({"items": [], "error": error.text(), "complete": false}),
    };
    match name {
        "drop" => {
            let mut reply = reply;
            let mut items = Vec::new();
            while items.len() < 3 {
                items.extend(reply.next_data::<Value>().await.and_then(Result::ok));
            }
            json!({"items": items, "error": null, "complete": false})
        }
        _ => {
            read(reply, |reply, seen| match name {
                "stop" if seen == 3 => reply.stop(),
                "kill" if seen == 3 => reply.kill(),
                _ => {}
            })
            .await
        }
    }
}

/// Each value is written when the answer to the one before has come.
async fn conversation(client: &Client) -> Result<Value> {
    let (mut feed, mut reply) = client.call_many().await?;
    let mut items = Vec::new();
    for value in 1..=100 {
        feed.send(&value).await?;
        match reply.next_data::<Value>().await {
            Some(Ok(item)) => items.push(item),
            other => bail!("after {value}: {other:?}"),
        }
    }
    feed.finish().await?;
    let rest = read(reply, |_, _| ()).await;
    items.extend(rest["items"].as_array().cloned().unwrap_or_default());
    Ok(json!({"items": items, "error": rest["error"], "complete": rest["complete"]}))
}

async fn all(runtime: &Runtime, name: &str, cases: &Value) -> Result<()> {
    let client = runtime.client(&format!("{name}/generate"))?;
    let client = client.detect_faults(false);
    client.wait_for_instances(PATIENCE).await?;
    for (case_name, request) in cases.as_object().into_iter().flatten() {
        let mut request = request.clone();
        request["key"] = format!("corelane {name} {case_name}").into();
        let found = timeout(PATIENCE, case(&client, case_name, &request)).await;
        let found = found.unwrap_or_else(|_| json!({"hung": true}));
        say(&json!({"event": "case", "target": name, "case": case_name, "found": found}));
    }
    let chat = runtime.client(&format!("{name}/chat"))?;
    chat.wait_for_instances(PATIENCE).await?;
    let found = match timeout(PATIENCE, conversation(&chat)).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => json!({"items": [], "error": error.to_string(), "complete": false}),
        Err(_) => json!({"hung": true}),
    };
    say(&json!({"event": "case", "target": name, "case": "bidirectional", "found": found}));
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    Runtime::run(Options::from_env()?, async move |runtime| match &arguments
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()[..]
    {
        ["worker", name] => work(runtime, name).await,
        ["client", cases, names @ ..] => {
            let cases = serde_json::from_str(cases)?;
            for name in names {
                all(&runtime, name, &cases).await?;
            }
            say(&json!({"event": "done"}));
            Ok(())
        }
        ["kv", name, block_tokens, tokens] => cached(runtime, name, block_tokens, tokens).await,
        _ => bail!("interop-peer worker NS/COMP | client CASES NS/COMP... | kv NS/COMP N TOKENS"),
    })?;
    Ok(())
}
