//! The real program between fake workers, raw callers and a real etcd. Everything dies with the
//! test that made it.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use corelane_codec::{Decoded, reply_frame, request_frame};
use rustix::process::{Pid, Signal, kill_process};

#[path = "../common/mod.rs"]
mod common;
#[path = "../ports/mod.rs"]
mod ports;

pub(crate) use ports::free_port;

/// Longest wait for anything; the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Waits until `look` finds something; panics with `what` when it does not.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(what, || condition().then_some(()));
}

/// A process of the program under test.
pub struct Program {
    pub child: Child,
    pub status_port: u16,
    folder: tempfile::TempDir,
}

impl Program {
    /// `corelane serve` with this configuration below its `[server]`.
    pub fn serve(text: &str, env: &[(&str, &str)]) -> Program {
        Program::wrapped(&[], text, env)
    }

    /// The same, started by a command line that ends with it.
    pub fn wrapped(wrap: &[&str], text: &str, env: &[(&str, &str)]) -> Program {
        let status_port = free_port();
        let text = format!("[server]\nstatus_port = {status_port}\n{text}");
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("corelane.toml");
        std::fs::write(&config, text).unwrap();
        let config = config.to_string_lossy();
        let line = [wrap, &[PROGRAM, "serve", "--config", &*config]].concat();
        Program::start(&line, env, folder, status_port)
    }

    /// Any other command of the program.
    pub fn command(args: &[&str]) -> Program {
        Program::command_in(args, &[])
    }

    /// The same in an environment.
    pub fn command_in(args: &[&str], env: &[(&str, &str)]) -> Program {
        let line = [&[PROGRAM], args].concat();
        Program::start(&line, env, tempfile::tempdir().unwrap(), 0)
    }

    fn start(
        line: &[&str],
        env: &[(&str, &str)],
        folder: tempfile::TempDir,
        status_port: u16,
    ) -> Program {
        let file = |name: &str| File::create(folder.path().join(name)).unwrap();
        let child = Command::new(line[0])
            .args(&line[1..])
            .env_clear()
            .env("CORELANE_LOG", "debug,h2=info,hyper_util=info")
            .envs(default_io())
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(file("out"))
            .stderr(file("log"))
            .spawn()
            .unwrap();
        Program {
            child,
            status_port,
            folder,
        }
    }

    /// Writes a file beside its configuration, and the folder that it lies in.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// Takes such a file away.
    pub fn remove(&self, name: &str) {
        let _ = std::fs::remove_file(self.folder.path().join(name));
    }

    /// Another configuration below its `[server]`; nobody has read it yet.
    pub fn rewrite(&self, text: &str) {
        let server = format!("[server]\nstatus_port = {}\n", self.status_port);
        self.write("corelane.toml", &(server + text));
    }

    fn read(&self, name: &str) -> String {
        let path: PathBuf = self.folder.path().join(name);
        std::fs::read_to_string(path).unwrap_or_default()
    }

    /// What it has written to standard error so far.
    pub fn log(&self) -> String {
        self.read("log")
    }

    /// What it has written to standard output so far.
    pub fn out(&self) -> String {
        self.read("out")
    }

    /// Its standard output once it has this word.
    pub fn says(&mut self, word: &str) -> String {
        wait_for(word, || {
            let out = self.out();
            assert!(out.contains(word) || self.is_alive(), "{}", self.log());
            out.contains(word).then_some(out)
        })
    }

    /// Waits until `/health` is 200 and all endpoints are ready.
    pub fn ready(&mut self) {
        wait_until("everything is ready", || {
            assert!(self.is_alive(), "{}", self.log());
            let health = self.get("/health");
            matches!(health, Some((200, body)) if !body.contains("notready"))
        });
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Status and body of its status server.
    pub fn get(&self, path: &str) -> Option<(u16, String)> {
        get(self.status_port, path)
    }

    pub fn health(&self) -> serde_json::Value {
        serde_json::from_str(&self.get("/health").unwrap().1).unwrap()
    }

    /// The value of the series that has all these words in it; panics when there is none.
    pub fn metric(&self, words: &[&str]) -> f64 {
        let (_, text) = self.get("/metrics").unwrap();
        let has = |line: &&str| !line.starts_with('#') && words.iter().all(|w| line.contains(w));
        let found: Vec<&str> = text.lines().filter(has).collect();
        assert!(!found.is_empty(), "{words:?}\n{text}");
        let value = |line: &str| -> f64 { line.rsplit_once(' ').unwrap().1.parse().unwrap() };
        found.into_iter().map(value).sum()
    }

    /// Address and path of a listen endpoint.
    pub fn path(&self, endpoint: &str) -> (SocketAddr, String) {
        let health = self.health();
        let text = health["paths"][endpoint].as_str().unwrap();
        let (address, path) = text.split_once('/').unwrap();
        (address.parse().unwrap(), path.to_owned())
    }

    /// A connection to a listen endpoint and the path to ask for.
    pub fn dial(&self, endpoint: &str) -> (Caller, String) {
        let (address, path) = self.path(endpoint);
        (Caller::dial(address), path)
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Its exit code.
    pub fn ended(&mut self) -> i32 {
        wait_for("the process ends", || self.child.try_wait().unwrap())
            .code()
            .unwrap_or(-1)
    }
}

/// The tests keep to the ring that the whole run is made on.
fn default_io() -> Option<(&'static str, String)> {
    Some(("CORELANE_IO", std::env::var("CORELANE_IO").ok()?))
}

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_corelane");

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the program\n{}", self.log());
        }
    }
}

fn get(port: u16, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

/// A worker that takes frames, and answers them while it is not held back.
pub struct Worker {
    pub address: SocketAddr,
    pub frames: Arc<Mutex<Vec<Vec<u8>>>>,
    held: Arc<AtomicBool>,
}

impl Worker {
    pub fn start() -> Worker {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let worker = Worker {
            address: listener.local_addr().unwrap(),
            frames: Arc::default(),
            held: Arc::default(),
        };
        let (frames, held) = (Arc::clone(&worker.frames), Arc::clone(&worker.held));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let (frames, held) = (Arc::clone(&frames), Arc::clone(&held));
                std::thread::spawn(move || answer(stream, &frames, &held));
            }
        });
        worker
    }

    /// Whether answers are held back from now on.
    pub fn hold(&self, held: bool) {
        self.held.store(held, Ordering::SeqCst);
    }

    pub fn taken(&self) -> usize {
        self.frames.lock().unwrap().len()
    }

    /// Drops the frames that it has taken.
    pub fn forget(&self) {
        self.frames.lock().unwrap().clear();
    }

    /// The lines that make it an instance of `endpoint` in a configuration.
    pub fn instance(&self, endpoint: &str) -> String {
        let address = self.address;
        format!("[[instance]]\nendpoint = \"{endpoint}\"\naddress = \"{address}/a1/{endpoint}\"\n")
    }
}

fn answer(mut stream: TcpStream, frames: &Mutex<Vec<Vec<u8>>>, held: &AtomicBool) {
    stream.set_nodelay(true).unwrap();
    let mut bytes = Vec::new();
    let mut chunk = [0; 64 * 1024];
    while let Ok(read @ 1..) = stream.read(&mut chunk) {
        bytes.extend_from_slice(&chunk[..read]);
        while let Decoded::Frame(prefix) = request_frame::decode_prefix(&bytes) {
            let end = prefix.frame_bytes() as usize;
            if end > bytes.len() {
                break;
            }
            let frame: Vec<u8> = bytes.drain(..end).collect();
            frames.lock().unwrap().push(frame);
            while held.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            if stream.write_all(&reply_frame::ACCEPTED).is_err() {
                return;
            }
        }
    }
}

/// A raw caller.
pub struct Caller {
    pub stream: TcpStream,
    bytes: Vec<u8>,
}

impl Caller {
    pub fn dial(address: SocketAddr) -> Caller {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        let bytes = Vec::new();
        Caller { stream, bytes }
    }

    pub fn send(&mut self, path: &str) {
        self.stream.write_all(&frame(path)).unwrap();
    }

    /// The next reply's text.
    pub fn reply(&mut self) -> String {
        self.reply_within(PATIENCE).expect("a reply in time")
    }

    /// The same, or nothing when for so long nothing comes.
    pub fn reply_within(&mut self, patience: Duration) -> Option<String> {
        self.stream.set_read_timeout(Some(patience)).unwrap();
        loop {
            if let Decoded::Frame(text) = reply_frame::decode(&self.bytes, 1 << 20) {
                let reply = String::from_utf8(self.bytes[text.clone()].to_vec()).unwrap();
                self.bytes.drain(..text.end);
                return Some(reply);
            }
            let mut chunk = [0; 4096];
            let read = self.stream.read(&mut chunk).ok()?;
            assert!(read > 0, "the router closed the connection");
            self.bytes.extend_from_slice(&chunk[..read]);
        }
    }

    /// Sends, and answers the reply.
    pub fn ask(&mut self, path: &str) -> String {
        self.send(path);
        self.reply()
    }
}

pub fn frame(path: &str) -> Vec<u8> {
    let mut frame = Vec::new();
    let headers = b"{\"request-id\":\"r\"}";
    request_frame::write_frame(path.as_bytes(), headers, b"payload", &mut frame).unwrap();
    frame
}

/// A real etcd on loopback.
pub struct Etcd {
    child: Child,
    data: tempfile::TempDir,
    client_port: u16,
    peer_port: u16,
    runtime: tokio::runtime::Runtime,
}

impl Etcd {
    /// None, with a line that says so, where there is no etcd.
    pub fn start() -> Option<Etcd> {
        let data = tempfile::tempdir().unwrap();
        let (client_port, peer_port) = (free_port(), free_port());
        let child = common::etcd(&data.path().join("etcd"), client_port, peer_port)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let etcd = Etcd {
            child,
            data,
            client_port,
            peer_port,
            runtime,
        };
        etcd.serving();
        Some(etcd)
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// On the same data, or on none.
    pub fn restart(&mut self, keep_data: bool) {
        if !keep_data {
            self.data = tempfile::tempdir().unwrap();
        }
        let data = self.data.path().join("etcd");
        self.child = common::etcd(&data, self.client_port, self.peer_port).unwrap();
        self.serving();
    }

    fn serving(&self) {
        wait_until("etcd serves", || self.try_keys("probe").is_some());
    }

    fn try_keys(&self, prefix: &str) -> Option<Vec<(String, String)>> {
        let listing = async {
            let mut client = etcd_client::Client::connect([self.endpoint()], None).await?;
            let options = etcd_client::GetOptions::new().with_prefix();
            let found = client.get(prefix, Some(options)).await?;
            let pair = |kv: &etcd_client::KeyValue| {
                Ok((kv.key_str()?.to_owned(), kv.value_str()?.to_owned()))
            };
            found.kvs().iter().map(pair).collect()
        };
        let limited = async { tokio::time::timeout(Duration::from_secs(10), listing).await };
        let outcome: Result<Vec<(String, String)>, etcd_client::Error> =
            self.runtime.block_on(limited).ok()?;
        outcome.ok()
    }

    /// Keys and values under a prefix.
    pub fn keys(&self, prefix: &str) -> Vec<(String, String)> {
        wait_for("etcd lists keys", || self.try_keys(prefix))
    }

    pub fn put(&self, key: &str, value: &str) {
        let put = async {
            let mut client = etcd_client::Client::connect([self.endpoint()], None).await?;
            client.put(key, value, None).await
        };
        self.runtime.block_on(put).unwrap();
    }

    /// Registers a worker as an instance of an endpoint, without a lease.
    pub fn register(&self, endpoint: &str, id: u64, worker: &Worker) {
        let [namespace, component, name] = endpoint.split('/').collect::<Vec<_>>()[..] else {
            panic!("{endpoint}");
        };
        let value = serde_json::json!({
            "type": "Endpoint", "component": component, "endpoint": name,
            "namespace": namespace, "instance_id": id,
            "transport": {"tcp": format!("{}/{id:x}/{endpoint}", worker.address)},
            "request_plane_codec": "msgpack",
        });
        let key = format!("v1/instances/{endpoint}/{id:x}");
        self.put(&key, &value.to_string());
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
