//! The second part of `lane`: whole requests of Dynamo's wire, from a caller over TCP to a worker's
//! memory, and the response back over a call home.
//!
//! ```text
//! lane         caller --TCP--> corelane --lane--> worker;  corelane calls the caller home
//! tcp          caller --TCP--> corelane --TCP---> worker;  the worker calls the caller home
//! unix-direct  caller --Unix socket-------------> worker;  the same, with no router
//! tcp-direct   caller --TCP---------------------> worker;  the same
//! ```

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;

use crate::cpu::{Pins, Usage};
use crate::frames::RequestFrame;
use crate::lane_worker::{Way, now_ns, read_exact, read_response};
use crate::middle::{Ack, Corelane, CorelaneArgs, Discovery, Route, instance_address};
use crate::report::new_histogram;
use crate::servers::{Server, http_get};

const TARGET: &str = "bench/worker/generate";
const LISTEN: &str = "bench/router/generate";
const DIRECT_PATH: &str = "1/bench/worker/generate";

/// One way from a caller to a worker.
pub(crate) struct PathArm {
    /// Its name in reports.
    pub(crate) name: &'static str,
    path: String,
    stream: Stream,
    home: TcpListener,
    corelane: Option<Corelane>,
    worker: Server,
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// What one slice has found.
pub(crate) struct Found {
    /// From the first byte sent to the body in the worker's memory.
    pub(crate) request_ns: Histogram<u64>,
    /// From there to the end of the response at the caller.
    pub(crate) whole_ns: Histogram<u64>,
    /// CPU for each request: of the router, of the worker, of the caller.
    pub(crate) cpu_us: [f64; 3],
    /// Bytes copied in user space on the way to the worker, by each byte of the bodies; none
    /// without a lane.
    pub(crate) copied: Option<f64>,
}

impl PathArm {
    /// Starts router and worker, and connects.
    pub(crate) fn start(
        name: &'static str,
        args: &CorelaneArgs,
        program: &Path,
        dir: &Path,
        pins: Pins,
    ) -> Result<PathArm> {
        let way = match name {
            "lane" => Way::Lane,
            "unix-direct" => Way::Unix,
            _ => Way::Tcp,
        };
        let socket = dir.join(format!("path-{name}.sock"));
        let router = |discovery: &Discovery<'_>| {
            let route = Route {
                listen: LISTEN,
                target: TARGET,
                ack: Ack::OnForward,
            };
            Corelane::start(args, program, dir, discovery, &route, pins.middle, &[])
        };
        let mut corelane = match name {
            "lane" => Some(router(&Discovery::Lane(&socket))?),
            _ => None,
        };
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["lane-worker", way.name(), "path", "--socket"]);
        command.arg(&socket);
        let mut worker = Server::start(&format!("worker-{name}"), command, dir, pins.sink)?;
        let out = worker.stdout.clone();
        let said = worker.wait_until("to be ready", || {
            let text = std::fs::read_to_string(&out).ok()?;
            text.strip_suffix('\n').map(ToOwned::to_owned)
        })?;
        if name == "tcp" {
            let address: SocketAddr = said.parse()?;
            let instance = instance_address(address, DIRECT_PATH);
            corelane = Some(router(&Discovery::Memory(&instance))?);
        }
        let stream = match (&corelane, way) {
            (Some(corelane), _) => Stream::Tcp(TcpStream::connect(corelane.address)?),
            (None, Way::Unix) => Stream::Unix(UnixStream::connect(&socket)?),
            (None, _) => Stream::Tcp(TcpStream::connect(said.parse::<SocketAddr>()?)?),
        };
        if let Stream::Tcp(stream) = &stream {
            stream.set_nodelay(true)?;
        }
        let path = corelane.as_ref().map(|corelane| corelane.path.clone());
        let mut arm = PathArm {
            name,
            path: path.unwrap_or_else(|| DIRECT_PATH.into()),
            stream,
            home: TcpListener::bind("127.0.0.1:0")?,
            corelane,
            worker,
        };
        arm.wait_until_served()?;
        Ok(arm)
    }

    /// Until the router reaches the worker it refuses.
    fn wait_until_served(&mut self) -> Result<()> {
        let mut frame = self.frame(128)?;
        let end = Instant::now() + Duration::from_secs(20);
        while let Err(error) = self.one(&mut frame) {
            self.worker.check_alive()?;
            if Instant::now() > end {
                return Err(error.context(format!("{} serves nothing", self.name)));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn frame(&self, bytes: usize) -> Result<RequestFrame> {
        RequestFrame::calling(&self.path, bytes, &self.home.local_addr()?.to_string())
    }

    /// One request and its response: when it was sent, was there, was over.
    fn one(&mut self, frame: &mut RequestFrame) -> Result<[u64; 3]> {
        let bytes = frame.stamp();
        let began = now_ns();
        let mut reply = [0; 4];
        match &mut self.stream {
            Stream::Tcp(stream) => {
                stream.write_all(bytes)?;
                read_exact(stream, &mut reply)?;
            }
            Stream::Unix(stream) => {
                stream.write_all(bytes)?;
                read_exact(stream, &mut reply)?;
            }
        }
        let length = u32::from_be_bytes(reply);
        if length > 0 {
            let mut text = vec![0; length as usize];
            match &mut self.stream {
                Stream::Tcp(stream) => stream.read_exact(&mut text)?,
                Stream::Unix(stream) => stream.read_exact(&mut text)?,
            }
            bail!("refused: {}", String::from_utf8_lossy(&text));
        }
        let (mut home, _) = self.home.accept()?;
        let there = read_response(&mut home)?;
        Ok([began, there, now_ns()])
    }

    /// Requests of this size, one after the other, for so long.
    pub(crate) fn slice(
        &mut self,
        bytes: usize,
        warmup: Duration,
        time: Duration,
    ) -> Result<Found> {
        let mut frame = self.frame(bytes)?;
        let warm = Instant::now() + warmup;
        while Instant::now() < warm {
            self.one(&mut frame)?;
        }
        let (router, worker) = (
            self.corelane.as_ref().map(|c| c.server.pid()),
            self.worker.pid(),
        );
        let usage = || {
            [
                router.map(Usage::of_tree).unwrap_or_default(),
                Usage::of_tree(worker),
                Usage::of_this_thread(),
            ]
        };
        let (copies, before) = (self.copied()?, usage());
        let (mut request_ns, mut whole_ns) = (new_histogram(), new_histogram());
        let end = Instant::now() + time;
        while Instant::now() < end || request_ns.is_empty() {
            let [began, there, over] = self.one(&mut frame)?;
            request_ns.saturating_record(there.saturating_sub(began));
            whole_ns.saturating_record(over.saturating_sub(began));
        }
        let after = usage();
        let count = request_ns.len() as f64;
        let copied = match (copies, self.copied()?) {
            (Some(before), Some(after)) => Some((after - before) / count / bytes as f64),
            _ => None,
        };
        let cpu_us = [0, 1, 2].map(|part: usize| after[part].since(before[part]).cpu_us() / count);
        Ok(Found {
            request_ns,
            whole_ns,
            cpu_us,
            copied,
        })
    }

    /// Bytes of requests that the router has copied so far; none where it has no lane.
    fn copied(&self) -> Result<Option<f64>> {
        let Some(corelane) = self.corelane.as_ref().filter(|_| self.name == "lane") else {
            return Ok(None);
        };
        let text = http_get(corelane.status, "/metrics").context("no metrics of the router")?;
        let value = |name: &str| -> f64 {
            let lines = text.lines().filter(|line| line.starts_with(name));
            let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
            values.sum()
        };
        let names = [
            "corelane_lane_copied_bytes_total",
            "corelane_joined_bytes_total",
        ];
        Ok(Some(names.map(value).iter().sum()))
    }
}
