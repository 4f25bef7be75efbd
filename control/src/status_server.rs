//! `/live`, `/health` and `/metrics` over HTTP/1.1 on the control runtime
//! (`spec/events-discovery.md` §7.3, §7.4).
//!
//! | route | answer |
//! |---|---|
//! | `/live` | 200 (unlike Dynamo's, which repeats `/health`); 503 when a core stands still |
//! | `/health` | 200 or 503: `status`, `uptime`, `endpoints`, `paths`, `states`, `generation` |
//! | `/metrics` | 200, text |
//! | what is added ([`StatusOptions::extras`]) | what that says |
//! | what acts ([`StatusOptions::actions`]) | GET: what that says; POST: what it has done |
//! | `/engine/{path}` | what a worker's callback answers, 400, 404 or 500 with JSON |
//! | `/metadata`, `/v1/metadata/..` | 404 in Dynamo's words: nothing is published here |
//! | else | 404 `Route not found` |
//!
//! The first two may have other paths ([`StatusOptions::read`]). To act, one must be on this host
//! and send the header `x-corelane`, which no page in a browser can without asking first.
//!
//! A probe must be answered even when somebody holds connections open: there are at most
//! [`CONNECTIONS_MAX`], each lives for a bounded time, and the oldest makes room for a new one.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::ser::{Serialize, SerializeMap, Serializer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle, spawn_local};
use tokio::time::timeout;

use crate::engine_routes::EngineRoutes;
use crate::env::Env;
use crate::health::{Endpoints, Seen, State};

/// Most connections at a time.
pub const CONNECTIONS_MAX: usize = 64;
/// Longest wait for a request's head.
const HEAD_MAX: Duration = Duration::from_secs(5);
/// Longest life of a connection, slow readers included.
const CONNECTION_LIFE: Duration = Duration::from_secs(30);
/// How long a stop waits for answers under way.
const STOP_MAX: Duration = Duration::from_secs(1);
/// Bytes of a request's head that are buffered.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// What Dynamo's answers carry.
const PLAIN: &str = "text/plain; charset=utf-8";
/// What the text encoder of `prometheus-client` writes.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The header of those who want something done.
pub const ACTS: &str = "x-corelane";

const METRICS: &str = "/metrics";
const ENGINE: &str = "/engine/";

/// How the process is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Whether traffic should be sent here.
    pub ready: bool,
    /// Each endpoint that we listen for, and whether it is ready.
    pub endpoints: Vec<(String, bool)>,
    /// Each endpoint that we listen for, and the address that reaches it: `IP:PORT/PATH`.
    pub paths: Vec<(String, String)>,
    /// Each endpoint, and how far its life has come.
    pub states: Vec<(String, State)>,
    /// Parts of the process that have made no progress for long; with one it is not live.
    pub stuck: Vec<String>,
    /// Number of the configuration in force, from 1; where it can be changed.
    pub generation: Option<u64>,
}

impl Health {
    /// What a process says whose endpoints are these.
    pub fn of(endpoints: &Endpoints) -> Self {
        let seen = endpoints.seen();
        let named = |seen: &Seen| seen.id.to_string();
        Self {
            ready: endpoints.is_ready(),
            endpoints: seen.iter().map(|seen| (named(seen), seen.ready)).collect(),
            paths: Vec::new(),
            stuck: Vec::new(),
            generation: None,
            states: seen.iter().map(|seen| (named(seen), seen.state)).collect(),
        }
    }
}

/// Decides what `/health` says; asked at each request, so it must be cheap.
pub trait HealthSource {
    /// How the process is now.
    fn health(&self) -> Health;
}

impl<F: Fn() -> Health> HealthSource for F {
    fn health(&self) -> Health {
        self()
    }
}

/// Status, content type, body.
pub type Answer = (StatusCode, &'static str, Vec<u8>);

/// Answers a GET, whose query it is given.
pub type Extra = Box<dyn Fn(&str) -> Answer>;

/// The same, in its own time, which it must bound.
pub type Later = Box<dyn Fn(&str) -> LocalBoxFuture<'static, Answer>>;

/// Answers a GET (false), or acts on a POST and answers then. It may take its time, but not as long
/// as a connection lives (30 s).
pub type Action = Box<dyn Fn(bool) -> LocalBoxFuture<'static, Answer>>;

/// What to serve and where.
pub struct StatusOptions {
    /// Where to listen; port 0 takes any.
    pub address: SocketAddr,
    /// A socket that listens already, in place of `address`.
    pub handed: Option<std::net::TcpListener>,
    /// `DYN_SYSTEM_HEALTH_PATH`.
    pub health_path: String,
    /// `DYN_SYSTEM_LIVE_PATH`.
    pub live_path: String,
    /// The content type of what the metrics closure writes.
    pub metrics_content_type: &'static str,
    /// What answers below `/engine/`.
    pub engine: EngineRoutes,
    /// Further paths, and what answers there.
    pub extras: Vec<(&'static str, Extra)>,
    /// The same of those that ask others first.
    pub later: Vec<(&'static str, Later)>,
    /// Further paths at which something can be done, by those on this host.
    pub actions: Vec<(&'static str, Action)>,
}

impl StatusOptions {
    /// Dynamo's paths, and the content type of `prometheus-client`.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            handed: None,
            health_path: "/health".to_owned(),
            live_path: "/live".to_owned(),
            metrics_content_type: OPENMETRICS,
            engine: EngineRoutes::default(),
            extras: Vec::new(),
            later: Vec::new(),
            actions: Vec::new(),
        }
    }

    /// The same with the paths that the environment names; a name that cannot be one is said in
    /// the log and not used.
    pub fn read(address: SocketAddr, env: &Env) -> Self {
        let mut options = Self::new(address);
        let paths = [
            ("DYN_SYSTEM_HEALTH_PATH", &mut options.health_path),
            ("DYN_SYSTEM_LIVE_PATH", &mut options.live_path),
        ];
        for (name, path) in paths {
            let Some(wanted) = env.get(name).map(str::trim) else {
                continue;
            };
            let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '?' | '#');
            let taken = wanted == METRICS || wanted.starts_with(ENGINE);
            if wanted.starts_with('/') && wanted.chars().all(plain) && !taken {
                wanted.clone_into(path);
            } else {
                tracing::warn!("environment {name}: not a free path; going on with {path}");
            }
        }
        options
    }
}

/// The running server; dropping it without [`StatusServer::stop`] cuts it off.
pub struct StatusServer {
    address: SocketAddr,
    stopping: watch::Sender<bool>,
    accepting: JoinHandle<()>,
    connections: Rc<RefCell<VecDeque<AbortHandle>>>,
}

struct Routes {
    options: StatusOptions,
    health: Box<dyn HealthSource>,
    metrics: Box<dyn Fn() -> String>,
    began: Instant,
}

impl StatusServer {
    /// Listens and serves from now on; needs a `LocalSet`.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn start(
        mut options: StatusOptions,
        health: impl HealthSource + 'static,
        metrics: impl Fn() -> String + 'static,
    ) -> io::Result<Self> {
        let listener = match options.handed.take() {
            Some(handed) => {
                handed.set_nonblocking(true)?;
                TcpListener::from_std(handed)?
            }
            None => TcpListener::bind(options.address).await?,
        };
        let address = listener.local_addr()?;
        let routes = Rc::new(Routes {
            options,
            health: Box::new(health),
            metrics: Box::new(metrics),
            began: Instant::now(),
        });
        let stopping = watch::Sender::new(false);
        let connections = Rc::new(RefCell::new(VecDeque::new()));
        let accepting = spawn_local(accept(
            listener,
            routes,
            stopping.subscribe(),
            connections.clone(),
        ));
        Ok(Self {
            address,
            stopping,
            accepting,
            connections,
        })
    }

    /// Where it listens, with the port that was chosen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops listening, lets answers under way end, and cuts off what is left after a second.
    pub async fn stop(mut self) {
        self.stopping.send_replace(true);
        let _ = timeout(STOP_MAX, &mut self.accepting).await;
        let idle = async {
            while self
                .connections
                .borrow()
                .iter()
                .any(|task| !task.is_finished())
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = timeout(STOP_MAX, idle).await;
    }
}

impl Drop for StatusServer {
    fn drop(&mut self) {
        self.accepting.abort();
        self.connections
            .borrow()
            .iter()
            .for_each(AbortHandle::abort);
    }
}

async fn accept(
    listener: TcpListener,
    routes: Rc<Routes>,
    mut stopping: watch::Receiver<bool>,
    connections: Rc<RefCell<VecDeque<AbortHandle>>>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let serving = serve(stream, routes.clone(), stopping.clone());
                let mut open = connections.borrow_mut();
                open.retain(|task| !task.is_finished());
                if open.len() >= CONNECTIONS_MAX
                    && let Some(oldest) = open.pop_front()
                {
                    oldest.abort();
                }
                open.push_back(spawn_local(serving).abort_handle());
            }
            Err(error) => {
                // Most likely out of descriptors: it does not get better by asking at once.
                tracing::warn!(%error, "status server cannot accept");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, routes: Rc<Routes>, mut stopping: watch::Receiver<bool>) {
    let is_local = stream
        .peer_addr()
        .is_ok_and(|peer| peer.ip().to_canonical().is_loopback());
    let service = service_fn(move |request: Request<Incoming>| {
        let routes = routes.clone();
        async move { Ok::<_, Infallible>(routes.answer(request, is_local).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let serving = async {
        tokio::select! {
            ended = connection.as_mut() => return ended,
            _ = stopping.wait_for(|stop| *stop) => connection.as_mut().graceful_shutdown(),
        }
        connection.await
    };
    // Broken clients are their own problem.
    let _ = timeout(CONNECTION_LIFE, serving).await;
}

impl Routes {
    async fn answer(&self, request: Request<Incoming>, is_local: bool) -> Response<Full<Bytes>> {
        if let Some(path) = request.uri().path().strip_prefix(ENGINE) {
            let path = path.to_owned();
            let (status, answer) = self.options.engine.answer(&path, request.into_body()).await;
            return respond(status, PLAIN, answer.to_string());
        }
        let mut later = self.options.later.iter();
        let later = later.find(|(at, _)| *at == request.uri().path());
        if let Some((_, later)) = later.filter(|_| reads(&request)) {
            let (status, kind, body) = later(request.uri().query().unwrap_or("")).await;
            return respond(status, kind, body);
        }
        let mut actions = self.options.actions.iter();
        if let Some((_, action)) = actions.find(|(at, _)| *at == request.uri().path()) {
            let (status, kind, body) = act(action, &request, is_local).await;
            return respond(status, kind, body);
        }
        self.answer_of_ours(&request)
    }

    fn answer_of_ours(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        let is_live = path == self.options.live_path;
        let is_health = path == self.options.health_path;
        let mut extras = self.options.extras.iter();
        let extra = extras.find(|(at, _)| *at == path);
        let is_later = self.options.later.iter().any(|(at, _)| *at == path);
        let is_extra = extra.is_some() || is_later;
        if !is_live && !is_health && path != METRICS && !is_extra {
            let text = match path {
                // Of Kubernetes discovery, and of files of models that are published.
                "/metadata" => "Discovery metadata not available",
                path if path.starts_with("/v1/metadata/") => "Not found",
                _ => "Route not found",
            };
            return respond(StatusCode::NOT_FOUND, PLAIN, text);
        }
        if !reads(request) {
            let mut response = respond(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "");
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET,HEAD"));
            return response;
        }
        if let Some((_, extra)) = extra {
            let (status, kind, body) = extra(request.uri().query().unwrap_or(""));
            return respond(status, kind, body);
        }
        if is_live {
            let (status, word) = match self.health.health().stuck.is_empty() {
                true => (StatusCode::OK, "live"),
                false => (StatusCode::SERVICE_UNAVAILABLE, "stuck"),
            };
            return respond(status, PLAIN, self.body(word, &Health::default()));
        }
        if is_health {
            let health = self.health.health();
            let status = if health.ready {
                StatusCode::OK
            } else {
                StatusCode::SERVICE_UNAVAILABLE
            };
            return respond(status, PLAIN, self.body(word(health.ready), &health));
        }
        respond(
            StatusCode::OK,
            self.options.metrics_content_type,
            (self.metrics)(),
        )
    }

    fn body(&self, status: &str, health: &Health) -> String {
        let uptime = self.began.elapsed();
        let uptime = Uptime {
            secs: uptime.as_secs(),
            nanos: uptime.subsec_nanos(),
        };
        let body = Body {
            status,
            uptime,
            endpoints: Words(&health.endpoints),
            paths: Pairs(&health.paths),
            states: States(&health.states),
            generation: health.generation,
        };
        // A struct of strings and numbers always has a JSON form.
        serde_json::to_string(&body).unwrap_or_default()
    }
}

fn reads(request: &Request<Incoming>) -> bool {
    matches!(*request.method(), Method::GET | Method::HEAD)
}

#[derive(serde::Serialize)]
struct Body<'a> {
    status: &'a str,
    uptime: Uptime,
    endpoints: Words<'a>,
    #[serde(skip_serializing_if = "Pairs::is_empty")]
    paths: Pairs<'a>,
    #[serde(skip_serializing_if = "States::is_empty")]
    states: States<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
}

#[derive(serde::Serialize)]
struct Uptime {
    secs: u64,
    nanos: u32,
}

/// Lets those on this host act, and all others look.
async fn act(action: &Action, request: &Request<Incoming>, is_local: bool) -> Answer {
    let refuse = |status, why: &str| (status, PLAIN, why.as_bytes().to_vec());
    match *request.method() {
        Method::GET | Method::HEAD => action(false).await,
        Method::POST if is_local && request.headers().contains_key(ACTS) => action(true).await,
        Method::POST => {
            let why = "only from this host, by its loopback address, with the header x-corelane\n";
            refuse(StatusCode::FORBIDDEN, why)
        }
        _ => refuse(StatusCode::METHOD_NOT_ALLOWED, ""),
    }
}

/// Endpoint names and their state, as a JSON object in the given order.
struct Words<'a>(&'a [(String, bool)]);

impl Serialize for Words<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, ready) in self.0 {
            map.serialize_entry(name, word(*ready))?;
        }
        map.end()
    }
}

/// Endpoint names and their addresses, likewise; Dynamo's answer has none.
struct Pairs<'a>(&'a [(String, String)]);

impl Pairs<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Pairs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, address)| (name, address)))
    }
}

/// Endpoint names and how far their life has come, likewise.
struct States<'a>(&'a [(String, State)]);

impl States<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for States<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, state)| (name, state.word())))
    }
}

fn word(ready: bool) -> &'static str {
    if ready { "ready" } else { "notready" }
}

fn respond(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::task::LocalSet;

    use super::*;

    async fn start(ready: Rc<Cell<bool>>) -> StatusServer {
        let health = move || Health {
            ready: ready.get(),
            endpoints: vec![
                ("generate".to_owned(), true),
                ("a\"b".to_owned(), ready.get()),
            ],
            paths: vec![("generate".to_owned(), "127.0.0.1:1/0/a/b/c".to_owned())],
            states: vec![("generate".to_owned(), State::Running)],
            stuck: Vec::new(),
            generation: None,
        };
        let set = [
            ("DYN_SYSTEM_LIVE_PATH", "/alive"),
            ("DYN_SYSTEM_HEALTH_PATH", "/metrics"),
        ];
        let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let env = Env::of(set.into_iter().map(own));
        let options = StatusOptions::read("127.0.0.1:0".parse().unwrap(), &env);
        options
            .engine
            .set("sleep/deep", async |body| match body["level"].as_u64() {
                Some(level) => Ok(serde_json::json!({ "slept": level })),
                None => Err("no level".to_owned()),
            });
        StatusServer::start(options, health, || "x_total 1\n# EOF\n".to_owned())
            .await
            .unwrap()
    }

    async fn ask(address: SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn body(answer: &str) -> &str {
        answer.split_once("\r\n\r\n").unwrap().1
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_routes_and_their_answers() {
        let test = async {
            let ready = Rc::new(Cell::new(false));
            let server = start(ready.clone()).await;
            let address = server.address();
            let answer = ask(address, "GET /health").await;
            assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
            assert!(answer.contains("content-type: text/plain; charset=utf-8"));
            let health: serde_json::Value = serde_json::from_str(body(&answer)).unwrap();
            assert_eq!(health["status"], "notready");
            assert!(health["uptime"]["secs"].is_u64() && health["uptime"]["nanos"].is_u64());
            assert_eq!(health["endpoints"]["generate"], "ready");
            assert_eq!(health["endpoints"]["a\"b"], "notready");
            assert_eq!(health["paths"]["generate"], "127.0.0.1:1/0/a/b/c");
            assert_eq!(health["states"]["generate"], "running");
            ready.set(true);
            assert!(
                ask(address, "GET /health?x=1")
                    .await
                    .starts_with("HTTP/1.1 200 ")
            );
            assert!(
                ask(address, "GET /alive")
                    .await
                    .starts_with("HTTP/1.1 200 ")
            );
            let metrics = ask(address, "GET /metrics").await;
            assert!(metrics.contains(OPENMETRICS) && body(&metrics) == "x_total 1\n# EOF\n");
            let unknown = ask(address, "GET /live").await;
            assert!(unknown.starts_with("HTTP/1.1 404 ") && body(&unknown) == "Route not found");
            assert!(
                ask(address, "POST /health")
                    .await
                    .starts_with("HTTP/1.1 405 ")
            );
            assert_eq!(body(&ask(address, "HEAD /health").await), "");
            server.stop().await;
            assert!(TcpStream::connect(address).await.is_err());
        };
        LocalSet::new().run_until(test).await;
    }

    /// Answers of a stock worker, but for their date (`http-*.txt` of the description).
    #[tokio::test(flavor = "current_thread")]
    async fn what_is_not_there_is_answered_as_dynamo_does() {
        let test = async {
            let server = start(Rc::new(Cell::new(true))).await;
            let engine = r#"{"error":"Route not found","message":"Route /engine/foo not found"}"#;
            for (path, text) in [
                ("/engine/foo", engine),
                ("/metadata", "Discovery metadata not available"),
                ("/nosuch", "Route not found"),
                ("/v1/loras", "Route not found"),
                ("/v1/metadata/a/b/c/d/e/f", "Not found"),
            ] {
                let answer = ask(server.address(), &format!("GET {path}")).await;
                assert!(answer.starts_with("HTTP/1.1 404 Not Found\r\n"), "{answer}");
                assert!(answer.contains("content-type: text/plain; charset=utf-8\r\n"));
                let length = format!("content-length: {}\r\n", text.len());
                assert!(answer.contains(&length), "{answer}");
                assert_eq!(body(&answer), text, "{path}");
            }
            server.stop().await;
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_engine_is_asked() {
        let post = async |address, text: &str| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let head = "POST /engine/sleep/deep HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
            let request = format!("{head}content-length: {}\r\n\r\n{text}", text.len());
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            let status = answer[9..12].to_owned();
            (
                status,
                serde_json::from_str::<serde_json::Value>(body(&answer)).unwrap(),
            )
        };
        let test = async {
            let server = start(Rc::new(Cell::new(true))).await;
            let (status, answer) = post(server.address(), r#"{"level":2}"#).await;
            assert_eq!((&*status, &answer["slept"]), ("200", &2.into()));
            let (status, answer) = post(server.address(), "").await;
            assert_eq!(
                (&*status, &answer["error"]),
                ("500", &"Handler error".into())
            );
            assert_eq!(answer["message"], "no level");
            let (status, answer) = post(server.address(), "{").await;
            assert_eq!(
                (&*status, &answer["error"]),
                ("400", &"Invalid JSON".into())
            );
            server.stop().await;
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn idle_connections_do_not_keep_probes_out() {
        let test = async {
            let server = start(Rc::new(Cell::new(true))).await;
            let mut idle = Vec::new();
            for _ in 0..CONNECTIONS_MAX + 10 {
                let mut stream = TcpStream::connect(server.address()).await.unwrap();
                stream.write_all(b"GET /health HT").await.unwrap();
                idle.push(stream);
            }
            let answer = timeout(
                Duration::from_secs(60),
                ask(server.address(), "GET /health"),
            );
            assert!(answer.await.unwrap().starts_with("HTTP/1.1 200 "));
            assert!(server.connections.borrow().len() <= CONNECTIONS_MAX);
            let mut first = [0; 1];
            let cut = timeout(Duration::from_secs(60), idle[0].read(&mut first))
                .await
                .unwrap();
            assert!(matches!(cut, Ok(0) | Err(_)), "the oldest made room");
            timeout(Duration::from_secs(60), server.stop())
                .await
                .unwrap();
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_part_that_stands_still_ends_liveness_and_extras_answer() {
        let test = async {
            let stuck = Rc::new(Cell::new(false));
            let seen = Rc::clone(&stuck);
            let health = move || Health {
                ready: true,
                stuck: seen
                    .get()
                    .then(|| "core 1".to_owned())
                    .into_iter()
                    .collect(),
                ..Health::default()
            };
            let mut options = StatusOptions::new("127.0.0.1:0".parse().unwrap());
            let echo = |query: &str| (StatusCode::ACCEPTED, PLAIN, query.as_bytes().to_vec());
            options.extras.push(("/more", Box::new(echo)));
            let slow = |query: &str| -> LocalBoxFuture<'static, Answer> {
                let query = query.as_bytes().to_vec();
                Box::pin(async move {
                    tokio::task::yield_now().await;
                    (StatusCode::OK, PLAIN, query)
                })
            };
            options.later.push(("/slow", Box::new(slow)));
            let server = StatusServer::start(options, health, String::new)
                .await
                .unwrap();
            let address = server.address();
            assert!(ask(address, "GET /live").await.starts_with("HTTP/1.1 200 "));
            stuck.set(true);
            let answer = ask(address, "GET /live").await;
            assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
            assert!(body(&answer).contains("\"status\":\"stuck\""), "{answer}");
            let answer = ask(address, "GET /more?a=1&b").await;
            assert!(answer.starts_with("HTTP/1.1 202 ") && body(&answer) == "a=1&b");
            let answer = ask(address, "GET /slow?b").await;
            assert!(answer.starts_with("HTTP/1.1 200 ") && body(&answer) == "b");
            for path in ["/more", "/slow"] {
                let answer = ask(address, &format!("POST {path}")).await;
                assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
            }
            assert!(
                ask(address, "GET /more/")
                    .await
                    .starts_with("HTTP/1.1 404 ")
            );
            server.stop().await;
        };
        LocalSet::new().run_until(test).await;
    }
}
