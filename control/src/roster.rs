//! Who is looked for, and what is offered, for the routes in force: brought in line with them at
//! the start and after each change.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::timeout;

use crate::discovery::Discovery;
use crate::nats::Requests;
use crate::offer::Offer;
use crate::publish::{Board, Listed};
use crate::watch::InstanceWatch;

/// Longest wait for the first list of instances.
const LIST_MAX: Duration = Duration::from_secs(2);
/// Longest wait for what an offer is writing when it is to end.
const OFFER_MAX: Duration = Duration::from_secs(6);

/// See the module.
pub struct Roster {
    board: Rc<Board>,
    discovery: Discovery,
    requests: Option<Requests>,
    address: SocketAddr,
    stopping: watch::Sender<bool>,
    /// By what is listened for.
    offers: RefCell<BTreeMap<String, Offered>>,
}

struct Offered {
    listed: watch::Sender<Option<Rc<Listed>>>,
    task: JoinHandle<()>,
}

impl Roster {
    /// Nobody is looked for and nothing is offered yet; callers are told `address`.
    pub fn new(
        board: &Rc<Board>,
        discovery: &Discovery,
        requests: Option<&Requests>,
        address: SocketAddr,
    ) -> Roster {
        Roster {
            board: Rc::clone(board),
            discovery: discovery.clone(),
            requests: requests.cloned(),
            address,
            stopping: watch::Sender::new(false),
            offers: RefCell::default(),
        }
    }

    /// Looks for the instances of all targets that nobody looks for yet, and waits until the store
    /// has listed them, a moment at most. Needs a `LocalSet`.
    pub async fn follow(&self) {
        let sights = self.board.sights().all();
        let gateway = self.requests.as_ref().map(Requests::gateway);
        for sight in sights.iter().filter(|sight| !sight.is_followed()) {
            let watch = InstanceWatch::new(&self.discovery, &sight.target).over_nats(gateway);
            let follower = Rc::clone(&self.board).follow(Rc::downgrade(sight), watch);
            sight.followed_by(spawn_local(follower).abort_handle());
        }
        let all = async {
            for sight in &sights {
                sight.listed().await;
            }
        };
        if timeout(LIST_MAX, all).await.is_err() {
            tracing::warn!("the store has not listed all instances after {LIST_MAX:?}");
        }
    }

    /// Offers the routes in force from now on, and those that are not no more. Waits until the
    /// latter have left discovery, a moment at most.
    pub async fn offer(&self) {
        let routes = self.board.routes();
        let mut gone: BTreeMap<String, Offered> = self.offers.take();
        for listed in routes {
            let listen = listed.route.listen.to_string();
            let offered = match gone.remove(&listen) {
                Some(offered) => {
                    offered.now(listed);
                    offered
                }
                None => self.begin(listed),
            };
            self.offers.borrow_mut().insert(listen, offered);
        }
        for offered in gone.values() {
            offered.listed.send_replace(None);
        }
        self.end(gone).await;
    }

    fn begin(&self, listed: Rc<Listed>) -> Offered {
        let listen = listed.route.listen.clone();
        let listed = watch::Sender::new(Some(listed));
        let offer = Offer {
            listen,
            listed: listed.subscribe(),
            discovery: self.discovery.clone(),
            address: self.address,
            requests: self.requests.clone(),
            stopping: self.stopping.subscribe(),
        };
        Offered {
            listed,
            task: spawn_local(offer.keep()),
        }
    }

    async fn end(&self, offers: BTreeMap<String, Offered>) {
        let ended = async {
            for offered in offers.into_values() {
                let _ = offered.task.await;
            }
        };
        if timeout(OFFER_MAX, ended).await.is_err() {
            tracing::warn!("the store is slow; leaving it anyway");
        }
    }

    /// Takes endpoints and cards out of discovery; answers how many endpoints.
    pub async fn withdraw(&self) -> usize {
        self.stopping.send_replace(true);
        let offers = self.offers.take();
        let count = offers.len();
        self.end(offers).await;
        self.discovery.unregister_all().await;
        for listed in self.board.routes() {
            listed.set_registered(false);
        }
        count
    }
}

impl Offered {
    /// Another route has the endpoint, or the same as before.
    fn now(&self, listed: Rc<Listed>) {
        self.listed.send_if_modified(|before| {
            let Some(standing) = before else { return false };
            if Rc::ptr_eq(standing, &listed) {
                return false;
            }
            // Its record stands; nobody is to see it as one that does not.
            listed.set_registered(standing.is_registered());
            *before = Some(listed);
            true
        });
    }
}
