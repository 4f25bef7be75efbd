//! A worker: answers each prompt word by word.
//!
//! ```sh
//! ETCD_ENDPOINTS=http://127.0.0.1:2379 cargo run --example worker
//! ```

use corelane::component::{Options, Outcome, Request, Runtime, Stream};
use serde_json::json;

#[derive(serde::Deserialize)]
struct Prompt {
    text: String,
}

async fn generate(request: Request, stream: &mut Stream) -> Outcome {
    let prompt: Prompt = request.parse()?;
    for word in prompt.text.split_whitespace() {
        stream.send(&json!({ "text": word })).await?;
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    Runtime::run(Options::from_env()?, async |runtime| {
        let worker = runtime.namespace("production")?.component("worker")?;
        let endpoint = worker.endpoint("generate")?;
        let endpoint = endpoint.health_check(&json!({ "text": "are you there" }))?;
        let served = endpoint.serve(generate).await?;
        println!("serving {} at {}", served.id(), runtime.address());
        runtime.stopping().await;
        Ok(())
    })?;
    Ok(())
}
