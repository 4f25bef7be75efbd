//! Several shards in one process: one port, one directory, and what becomes of one that fails.

mod common;

use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::time::Duration;

use common::run;
use corelane::config::{Ack, EndpointId, Policy, Response, Route, StaticInstance};
use corelane::cores::{Cores, CoresError};
use corelane::preflight::{Plan, Planned};
use corelane::publish::{Board, IDENTITIES_MAX};
use corelane_engine::config::{RingKind, ShardConfig};
use corelane_engine::placement::affinity;
use corelane_engine::shard::Command;
use corelane_engine::stats::Stats;
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(90);

async fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    let outcome = timeout(PATIENCE, waiting).await;
    assert!(outcome.is_ok(), "never happened: {what}");
}

fn planned(shard: usize, cpu: usize, ring: RingKind, required: bool) -> Planned {
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut config = ShardConfig::new(shard, cpu, ring, Some(listen));
    config.buffers = 64;
    Planned {
        config,
        cause: "configured",
        required,
        alone: false,
    }
}

fn plan(shards: Vec<Planned>) -> Plan {
    Plan {
        control_cpu: 0,
        shards,
        tls: Default::default(),
        responses: Default::default(),
        placing: Default::default(),
        status: None,
    }
}

fn two() -> Plan {
    let cpus = affinity().unwrap();
    let (first, last) = (cpus[0], *cpus.last().unwrap());
    let shard = |number, cpu| planned(number, cpu, RingKind::Epoll, false);
    plan(vec![shard(0, first), shard(1, last)])
}

fn route() -> Route {
    Route {
        listen: EndpointId::new("a", "router", "g"),
        target: EndpointId::new("a", "worker", "g"),
        policy: Policy::RoundRobin,
        header: None,
        response: Response::Direct,
        ack: Ack::OnForward,
        ack_timeout_ms: 1_000,
        retries_max: 1,
        hold_bytes: 1 << 16,
        relay: corelane::config::RelayTimes::default(),
        lane: None,
        block_tokens: 16,
        kv: None,
        load: corelane::config::RouteLoad::default(),
    }
}

#[test]
fn all_cores_share_one_port_and_take_one_directory() {
    run(async {
        let cores = Cores::spawn(&two()).unwrap();
        cores.started().await.unwrap();
        assert!(cores.all_run());
        let worker = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let statics = [StaticInstance {
            endpoint: EndpointId::new("a", "worker", "g"),
            socket: worker.local_addr().unwrap(),
            path: "1/a/worker/g".into(),
            id: 1,
        }];
        let board = Board::new(&[route()], &statics, &cores);
        board.be_and_publish(7).await;
        wait_until("both have dialled the instance", || {
            cores.sum(|stats| stats.shard.instances_ready.get()) == 2
        })
        .await;
        // Nothing differs: nothing is sent.
        board.publish().await;
        assert_eq!(board.publications(), 1);
        for id in 8..8 + 2 * IDENTITIES_MAX as u64 {
            board.be(id);
        }
        board.publish().await;
        assert_eq!(board.publications(), 2);
        assert_eq!(board.identity(), Some(7 + 2 * IDENTITIES_MAX as u64));

        // The kernel deals connections out by hash: with so many, both get some.
        let all: Vec<TcpStream> = (0..64)
            .map(|_| TcpStream::connect(cores.address()).unwrap())
            .collect();
        let accepted = |stats: &Stats| stats.shard.connections_accepted.get();
        wait_until("all are accepted", || {
            cores.sum(accepted) == all.len() as u64
        })
        .await;
        for core in cores.view() {
            assert!(accepted(&core.stats) > 0, "core {}", core.shard);
        }
        cores.stop().await;
        assert!(TcpStream::connect(cores.address()).is_err());
    });
}

#[test]
fn a_core_that_ends_by_itself_is_noticed() {
    run(async {
        let cores = Cores::spawn(&two()).unwrap();
        cores.started().await.unwrap();
        let quiet = timeout(Duration::from_millis(50), cores.failed()).await;
        assert!(quiet.is_err());
        cores.tell(|| Command::Stop).await;
        timeout(PATIENCE, cores.failed()).await.unwrap();
        assert!(!cores.all_run());
        cores.stop().await;
    });
}

/// No host has so many CPUs, and glommio insists on the one that it is told.
const NO_CPU: usize = 100_000;

#[test]
fn a_core_that_io_uring_fails_goes_on_with_epoll_unless_that_will_not_do() {
    run(async {
        let cores = Cores::spawn(&plan(vec![planned(0, NO_CPU, RingKind::Uring, false)])).unwrap();
        cores.started().await.unwrap();
        let view = cores.view();
        assert_eq!((view[0].ring, view[0].cause), ("epoll", "start_failed"));
        assert!(TcpStream::connect(cores.address()).is_ok());
        cores.stop().await;

        let strict: Rc<Cores> =
            Cores::spawn(&plan(vec![planned(0, NO_CPU, RingKind::Uring, true)])).unwrap();
        let error = strict.started().await.unwrap_err();
        assert!(
            matches!(
                error,
                CoresError::Ended {
                    shard: 0,
                    cpu: NO_CPU,
                    ..
                }
            ),
            "{error}"
        );
    });
}
