//! The request paths that the shards serve: one for each endpoint and each of our last identities
//! (`spec/request-plane.md` §2.1).

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use corelane_codec::path::{EndpointId, instance_path};
use corelane_engine::command::LocalPath;
use corelane_engine::shard::Command;
use tokio::sync::Mutex;

use crate::cores::Cores;

/// Identities whose paths are served at the same time: callers may hold the one from before a
/// lost lease.
const IDENTITIES_MAX: usize = 4;
/// Longest wait until the shards serve what they were told.
const SERVED_MAX: Duration = Duration::from_secs(2);

/// What is served where.
pub(super) struct Paths {
    cores: Rc<Cores>,
    /// The newest first.
    identities: RefCell<Vec<u64>>,
    served: RefCell<Vec<(EndpointId, u32)>>,
    /// Lists handed to the shards.
    told: Cell<u64>,
    /// One list at a time, so that an older one never follows a newer one.
    turn: Mutex<()>,
}

impl Paths {
    pub(super) fn new(cores: &Rc<Cores>) -> Rc<Paths> {
        Rc::new(Paths {
            cores: Rc::clone(cores),
            identities: RefCell::default(),
            served: RefCell::default(),
            told: Cell::new(0),
            turn: Mutex::new(()),
        })
    }

    /// We are `id` from now on, and are asked under it.
    pub(super) async fn be(&self, id: u64) {
        {
            let mut identities = self.identities.borrow_mut();
            if identities.first() == Some(&id) {
                return;
            }
            identities.retain(|earlier| *earlier != id);
            identities.insert(0, id);
            identities.truncate(IDENTITIES_MAX);
        }
        self.publish().await;
    }

    /// `endpoint` is answered by the handler of that index.
    pub(super) async fn add(&self, endpoint: &EndpointId, handler: u32) {
        self.served.borrow_mut().push((endpoint.clone(), handler));
        self.publish().await;
    }

    /// `endpoint` is refused as unknown from now on.
    pub(super) async fn remove(&self, endpoint: &EndpointId) {
        self.served.borrow_mut().retain(|(id, _)| id != endpoint);
        self.publish().await;
    }

    /// Whether somebody answers at `endpoint`.
    pub(super) fn has(&self, endpoint: &EndpointId) -> bool {
        self.served.borrow().iter().any(|(id, _)| id == endpoint)
    }

    async fn publish(&self) {
        let _turn = self.turn.lock().await;
        let list = self.list();
        self.cores.tell(|| Command::Serve(list.clone())).await;
        self.told.set(self.told.get() + 1);
        let updates = |stats: &corelane_engine::stats::Stats| stats.shard.path_updates.get();
        let told = self.told.get();
        if !self.cores.reached(told, SERVED_MAX, updates).await {
            tracing::error!("a core has not taken over its paths after {SERVED_MAX:?}");
        }
    }

    fn list(&self) -> Vec<LocalPath> {
        let identities = self.identities.borrow();
        let served = self.served.borrow();
        let of = |(endpoint, handler): &(EndpointId, u32)| {
            let (endpoint, handler) = (endpoint.clone(), *handler);
            identities.iter().map(move |id| LocalPath {
                path: instance_path(*id, &endpoint).into_bytes(),
                handler,
            })
        };
        served.iter().flat_map(of).collect()
    }
}
