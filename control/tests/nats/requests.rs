//! Requests over NATS: workers and clients of ours, and a router between the two transports.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use corelane::component::{
    Admission, Client, Endpoint, MemoryStore, NatsOptions, Options, Outcome, PayloadCodec, Request,
    RequestPlane, Runtime, Stream,
};
use corelane::discovery::{Discovery, MemoryDiscovery};
use corelane::nats::Nats;
use corelane_codec::discovery::{EndpointRecord, Transport};
use corelane_codec::path::{EndpointId, INSTANCES_BUCKET, instance_subject};
use serde_json::{Value, json};

use crate::lab::{DEADLINE, NatsServer, run};

const PATIENCE: Duration = Duration::from_secs(60);

fn options(server: &NatsServer, store: &MemoryStore, plane: RequestPlane) -> Options {
    let options = Options::local().unwrap().signals(false).memory(store);
    let nats = NatsOptions {
        request_max: PATIENCE,
        ..server.options()
    };
    options.nats(nats).request_plane(plane).shards(2)
}

fn generate(runtime: &Runtime) -> Endpoint {
    let namespace = runtime.namespace("production").unwrap();
    namespace
        .component("worker")
        .unwrap()
        .endpoint("generate")
        .unwrap()
}

async fn echo(request: Request, stream: &mut Stream) -> Outcome {
    let value: Value = request.parse()?;
    for _ in 0..3 {
        stream.send(&value).await?;
    }
    Ok(())
}

async fn all(client: &Client, value: &Value) -> Vec<Value> {
    let mut reply = client.call(value).await.unwrap();
    let mut items = Vec::new();
    while let Some(item) = reply.next_data().await {
        items.push(item.unwrap());
    }
    items
}

#[test]
fn a_worker_on_nats_is_called_by_its_subject() {
    let server = NatsServer::start();
    run(async {
        let store = MemoryStore::default();
        for codec in [PayloadCodec::Json, PayloadCodec::MessagePack] {
            let worker = Runtime::start(options(&server, &store, RequestPlane::Nats));
            let worker = worker.await.unwrap();
            let endpoint = generate(&worker)
                .codec(codec)
                .stats(|| json!({"weight": 3}));
            let served = endpoint.serve(echo).await.unwrap();
            let watcher = Discovery::Memory(MemoryDiscovery::new(&store));
            let watch = watcher
                .watch::<EndpointRecord>(&format!("{INSTANCES_BUCKET}/"), |_, value| {
                    serde_json::from_slice(value)
                });
            {
                let directory = watch.directory();
                let (_, record, _) = directory.entries().next().unwrap();
                let subject = instance_subject(worker.instance_id(), served.id());
                assert_eq!(record.transport, Transport::NatsTcp(subject));
            }
            // The caller itself is not offered on NATS, and needs not be.
            let caller = Runtime::start(options(&server, &store, RequestPlane::Nats));
            let caller = caller.await.unwrap();
            let client = generate(&caller).client();
            client.wait_for_instances(PATIENCE).await.unwrap();
            for number in 0..50 {
                let value = json!({"n": number, "text": "grüße"});
                assert_eq!(all(&client, &value).await, vec![value; 3]);
            }
            let figures = stats_of(&server).await;
            assert_eq!(figures["weight"], 3);
            caller.stop().await;
            worker.stop().await;
        }
    });
}

/// What the service of the component says of its one endpoint, once it says all of it.
async fn stats_of(server: &NatsServer) -> Value {
    let nats = Nats::connect(&server.options()).await.unwrap();
    let told = async {
        loop {
            let gather = Duration::from_millis(300);
            let stats = nats
                .service_stats("production_worker", gather)
                .await
                .unwrap();
            let endpoints = stats.iter().flat_map(|service| &service.endpoints);
            for endpoint in endpoints {
                assert!(endpoint.instance_id().is_some());
                let Some(figures) = &endpoint.figures else {
                    continue;
                };
                if figures.data.is_object() && figures.num_requests >= 50 {
                    return figures.data.clone();
                }
            }
        }
    };
    tokio::time::timeout(DEADLINE, told)
        .await
        .expect("a service that tells")
}

/// Waits for ever, or until its caller goes.
async fn hold(_: Request, stream: &mut Stream) -> Outcome {
    stream.send(&"begun").await?;
    stream.stopped().await;
    Ok(())
}

/// A reply over NATS says "accepted" whatever it says, so a refusal is told at home.
#[test]
fn a_worker_that_is_full_calls_its_caller_home() {
    let server = NatsServer::start();
    run(async {
        let store = MemoryStore::default();
        let full = options(&server, &store, RequestPlane::Nats).admission(Admission {
            running_max: 1,
            queue_max: 0,
        });
        let worker = Runtime::start(full).await.unwrap();
        let served = generate(&worker).serve(hold).await.unwrap();
        let caller = Runtime::start(options(&server, &store, RequestPlane::Nats))
            .await
            .unwrap();
        let client = generate(&caller).client().detect_faults(false);
        client.wait_for_instances(PATIENCE).await.unwrap();
        let mut first = client.call(&1).await.unwrap();
        assert_eq!(first.next_data::<String>().await.unwrap().unwrap(), "begun");
        let refused = match client.call(&2).await {
            Err(error) => error,
            Ok(mut reply) => reply.next_data::<String>().await.unwrap().unwrap_err(),
        };
        assert!(refused.to_string().contains("at capacity"), "{refused}");
        // A caller who ends before his wish is on its way leaves the handler to the drain.
        while served.busy() > 0 {
            first.kill();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(first);
        caller.stop().await;
        worker.stop().await;
    });
}

/// As Dynamo's own caller would be told (spec/request-plane.md §8), and the instance stays in use.
#[test]
fn a_request_larger_than_the_server_takes_is_told_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let server = NatsServer::configured(folder, "max_payload: 65536\n");
    run(async {
        let store = MemoryStore::default();
        let worker = Runtime::start(options(&server, &store, RequestPlane::Nats));
        let worker = worker.await.unwrap();
        let _served = generate(&worker).serve(echo).await.unwrap();
        let caller = Runtime::start(options(&server, &store, RequestPlane::Nats));
        let caller = caller.await.unwrap();
        let client = generate(&caller).client();
        client.wait_for_instances(PATIENCE).await.unwrap();
        for _ in 0..2 {
            let large = json!({"text": "x".repeat(70_000)});
            let refused = match client.call(&large).await {
                Err(error) => error.to_string(),
                Ok(mut reply) => match reply.next_data::<Value>().await.unwrap() {
                    Err(error) => error.to_string(),
                    Ok(item) => panic!("{item}"),
                },
            };
            assert!(refused.contains("NATS takes 65536"), "{refused}");
            let small = json!({"text": "x".repeat(1000)});
            assert_eq!(all(&client, &small).await, vec![small; 3]);
        }
        caller.stop().await;
        worker.stop().await;
    });
}

#[test]
fn a_subject_without_a_listener_is_told_at_once() {
    let server = NatsServer::start();
    run(async {
        let store = MemoryStore::default();
        let endpoint = EndpointId::new("production", "worker", "generate");
        let transport = Transport::NatsTcp(instance_subject(0x2a, &endpoint));
        let record = EndpointRecord::new(&endpoint, 0x2a, transport);
        let value = serde_json::to_vec(&record).unwrap();
        store.put(&record.key().to_string(), &value);
        let caller = Runtime::start(options(&server, &store, RequestPlane::Nats))
            .await
            .unwrap();
        let client = generate(&caller).client();
        client.wait_for_instances(PATIENCE).await.unwrap();
        let began = std::time::Instant::now();
        let error = client.call(&1).await.err().expect("nobody is there");
        assert!(began.elapsed() < PATIENCE, "{error}");
        caller.stop().await;
    });
}

/// A program of ours, which ends with the test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(folder: &Path, server: &NatsServer, plane: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    command.args(args).env_clear().current_dir(folder);
    command.env("NATS_SERVER", server.url("nats"));
    command.env("DYN_REQUEST_PLANE", plane);
    command.env("DYN_DISCOVERY_BACKEND", "file");
    command.env("DYN_FILE_KV", folder.join("store"));
    command.env("DYN_NATS_REQUEST_TIMEOUT_SECS", "60");
    command.stdin(Stdio::null()).stderr(Stdio::null());
    if let Ok(io) = std::env::var("CORELANE_IO") {
        command.env("CORELANE_IO", io);
    }
    command
}

fn start(mut command: Command) -> Program {
    Program(command.stdout(Stdio::piped()).spawn().unwrap())
}

/// Waits for the first line of a program.
fn ready(program: &mut Program) {
    let output = program.0.stdout.take().unwrap();
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line).unwrap();
    assert!(!line.is_empty(), "the program has ended");
}

/// The worker's transport, the transport that the router is offered on.
fn through_a_router(worker: &str, router: &str) {
    let server = NatsServer::start();
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("store")).unwrap();
    std::fs::write(
        folder.path().join("corelane.toml"),
        "[server]\nhost = \"127.0.0.1\"\nport = 0\nstatus_port = -1\n[drain]\ngrace_s = 0\n\
         [discovery]\nbackend = \"file\"\n[[route]]\nlisten = \"routed/backend/generate\"\n\
         target = \"dynamo/backend/generate\"\n[core]\ncpus = \"0\"\n",
    )
    .unwrap();
    let echo = [
        "worker",
        "echo",
        "--endpoint",
        "dynamo/backend/generate",
        "--items",
        "3",
    ];
    let mut worker = start(command(folder.path(), &server, worker, &echo));
    ready(&mut worker);
    let _router = start(command(folder.path(), &server, router, &["serve"]));
    let body = "{\"n\":7}";
    let call = [
        "call",
        "--endpoint",
        "routed/backend/generate",
        "--body",
        body,
    ];
    let began = std::time::Instant::now();
    loop {
        // The router is found once it is registered, which takes as long as it takes.
        let called = command(folder.path(), &server, "tcp", &call)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&called.stdout).into_owned();
        if called.status.success() {
            assert_eq!(text.matches("\"n\":7").count(), 3, "{text}");
            return;
        }
        assert!(began.elapsed() < DEADLINE, "{text}");
    }
}

#[test]
fn a_route_takes_requests_on_tcp_to_workers_on_nats() {
    through_a_router("nats", "tcp");
}

#[test]
fn a_route_takes_requests_on_nats_to_workers_on_tcp() {
    through_a_router("tcp", "nats");
}
