//! `corelane gms`: the GPU memory service alone; and `corelane gms probe`, which asks one.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result};
use corelane_gpu_mem::client::{Dial, event_history, runtime_state};
use corelane_gpu_mem::protocol::v1::{EventRecord, GetRuntimeStateResponse};
use prometheus_client::encoding::text;
use serde_json::json;

use super::serve::on_this_thread;
use crate::cli::{self, Exit, GmsArgs, ProbeArgs};
use crate::gpu_memory::GpuMemory;
use crate::signals::Signals;
use crate::status_server::{Health, StatusOptions, StatusServer};
use crate::{gpu_metrics, metrics};

/// Serves until a signal.
///
/// # Errors
/// As [`GpuMemory::start`]; or the status port is taken.
pub fn gms(args: GmsArgs) -> Result<Exit> {
    corelane_engine::preflight::raise_limits();
    on_this_thread(async move {
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let service = Rc::new(GpuMemory::start(&args.gpu, &args.names)?);
        let status = status(&args, &service).await?;
        cli::print(&announcement(&service, status.as_ref()))?;
        let exit = tokio::select! {
            name = signals.next() => {
                tracing::info!("{name}: stopping");
                Exit::Done
            }
            () = service.ended() => {
                tracing::error!("the GPU memory service has ended by itself");
                Exit::Failed
            }
        };
        let stopping = async {
            service.stop().await;
            if let Some(status) = status {
                status.stop().await;
            }
            exit
        };
        Ok(tokio::select! {
            exit = stopping => exit,
            name = signals.next() => {
                tracing::warn!("{name} again: ending at once");
                Exit::Failed
            }
        })
    })
}

async fn status(args: &GmsArgs, service: &Rc<GpuMemory>) -> Result<Option<StatusServer>> {
    let Some(port) = args.server.status_port else {
        return Ok(None);
    };
    let address = SocketAddr::new(args.server.status_host, port);
    let (seen, counted) = (Rc::clone(service), Rc::clone(service));
    let health = move || health(&seen);
    let metrics = move || {
        let mut out = String::new();
        gpu_metrics::write(&counted, &mut out);
        metrics::write_log(&mut out);
        // Writing into a string does not fail.
        let _ = text::encode_eof(&mut out);
        out
    };
    let started = StatusServer::start(StatusOptions::new(address), health, metrics).await;
    let status = started
        .with_context(|| format!("cannot serve /health at {address}; choose another port"))?;
    tracing::info!(address = %status.address(), "status server: /live /health /metrics");
    Ok(Some(status))
}

fn health(service: &GpuMemory) -> Health {
    let ready = service.is_running();
    let pools = service.pools().iter();
    Health {
        ready,
        endpoints: pools
            .map(|pool| (pool.path.display().to_string(), ready))
            .collect(),
        ..Health::default()
    }
}

/// What listens where.
fn announcement(service: &GpuMemory, status: Option<&StatusServer>) -> String {
    let mut lines = Vec::new();
    for pool in service.pools() {
        lines.push(format!(
            "pool    {} of {} ({} memory): {}",
            pool.tag,
            pool.gpu_uuid,
            pool.backend,
            pool.path.display()
        ));
    }
    if let Some(status) = status {
        let address = status.address();
        lines.push(format!(
            "status  http://{address}/health and http://{address}/metrics"
        ));
    }
    lines.join("\n") + "\n"
}

/// Asks sockets how they stand, and prints it.
///
/// # Errors
/// Standard output cannot be written, or the folder cannot be read.
pub fn probe(args: ProbeArgs) -> Result<Exit> {
    let sockets = match args.sockets.is_empty() {
        true => found(&args)?,
        false => args.sockets.clone(),
    };
    if sockets.is_empty() {
        tracing::error!(
            "there is no gms_GPU-*.sock in {}; name a socket, or set GMS_SOCKET_DIR",
            args.folder.display()
        );
        return Ok(Exit::Failed);
    }
    let mut exit = Exit::Done;
    for socket in sockets {
        let dial = Dial {
            dial_timeout: args.timeout,
            reply_timeout: args.timeout,
            ..Dial::new(&socket)
        };
        let answer = runtime_state(&dial).and_then(|state| {
            let events = args.history.then(|| event_history(&dial)).transpose()?;
            Ok((state, events))
        });
        match answer {
            Ok((state, events)) => {
                cli::print(&told(&socket, &state, events.as_deref(), args.json))?;
                if args.ready && !state.is_ready {
                    tracing::error!("{}: nothing is published", socket.display());
                    exit = Exit::Failed;
                }
            }
            Err(error) => {
                tracing::error!("{}: {error}", socket.display());
                exit = Exit::Failed;
            }
        }
    }
    Ok(exit)
}

/// The sockets of the first generation in the folder, sorted.
fn found(args: &ProbeArgs) -> Result<Vec<PathBuf>> {
    let folder = &args.folder;
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read the folder {}", folder.display()))?;
    let mut sockets: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("gms_GPU-") && name.ends_with(".sock"))
        })
        .collect();
    sockets.sort();
    Ok(sockets)
}

fn told(
    socket: &std::path::Path,
    state: &GetRuntimeStateResponse,
    events: Option<&[EventRecord]>,
    json: bool,
) -> String {
    if json {
        let events = events.map(|events| events.iter().map(event_json).collect::<Vec<_>>());
        let line = json!({
            "socket": socket.display().to_string(),
            "state": state.state.as_str(),
            "ready": state.is_ready,
            "writer": state.has_rw_session,
            "readers": state.ro_session_count,
            "waiting_writers": state.waiting_writers,
            "waiting_clients": state.waiting_clients.0,
            "committed": state.committed,
            "layout_committed": state.layout_committed.0.unwrap_or_default(),
            "allocations": state.allocation_count,
            "bytes": state.total_bytes.0,
            "memory_layout_hash": state.memory_layout_hash,
            "events": events,
        });
        return format!("{line}\n");
    }
    let waiting = state.waiting_clients.0.unwrap_or(state.waiting_writers);
    let mut text = format!(
        "{}: {}, readers {}, waiting {waiting}, allocations {}",
        socket.display(),
        state.state,
        state.ro_session_count,
        state.allocation_count
    );
    if let Some(bytes) = state.total_bytes.0 {
        text.push_str(&format!(" of {bytes} bytes"));
    }
    if !state.memory_layout_hash.is_empty() {
        text.push_str(&format!(", layout {}", state.memory_layout_hash));
    }
    text.push('\n');
    for event in events.unwrap_or_default() {
        let number = |found: Option<u64>| found.map_or("-".to_owned(), |n| n.to_string());
        text.push_str(&format!(
            "  {} ms: {} ({} allocations, session {}, pid {})\n",
            number(event.unix_ms.0),
            event.kind,
            event.allocation_count,
            number(event.session.0),
            number(event.pid.0)
        ));
    }
    text
}

fn event_json(event: &EventRecord) -> serde_json::Value {
    json!({
        "kind": event.kind,
        "allocations": event.allocation_count,
        "unix_ms": event.unix_ms.0,
        "session": event.session.0,
        "pid": event.pid.0,
    })
}
