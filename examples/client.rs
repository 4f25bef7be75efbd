//! A client of the worker beside it: sends a prompt and prints the words as they come.
//!
//! ```sh
//! ETCD_ENDPOINTS=http://127.0.0.1:2379 cargo run --example client "the quick brown fox"
//! ```

use std::time::Duration;

use corelane::component::{Options, RoutingMode, Runtime};
use serde_json::{Value, json};

fn main() -> anyhow::Result<()> {
    let text = std::env::args().nth(1);
    let prompt = json!({ "text": text.unwrap_or_else(|| "the quick brown fox".to_owned()) });
    Runtime::run(Options::from_env()?.calls_only(), async |runtime| {
        let client = runtime.client("dyn://production.worker.generate")?;
        let client = client.mode(RoutingMode::LeastLoaded);
        client.wait_for_instances(Duration::from_secs(10)).await?;
        let mut reply = client.call(&prompt).await?;
        while let Some(word) = reply.next_data::<Value>().await {
            println!("{}", word?["text"].as_str().unwrap_or_default());
        }
        Ok(())
    })?;
    Ok(())
}
