//! What each endpoint of this process is at the moment: told by whoever serves it, read by
//! `/health`, `/metrics` and the log.
//!
//! ```text
//! add -> Created -> Registered -> Running -> Healthy -> Stopping -> Deregistered
//!           ^            |           |  ^------'  |         ^
//!           '------------+-----------+------------'         '--- from any of the four
//!             the lease was lost, a new record follows
//! ```
//!
//! A component keeps the [`Endpoint`] that [`Endpoints::add`] gave it and calls
//! [`Endpoint::turn`] at each step; dropping it takes the endpoint off the list. All handles may
//! be cloned and used from any thread; nothing here waits, and nothing here is on the way of a
//! request.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use corelane_codec::path::EndpointId;

use crate::env::Env;

/// How far the life of an endpoint has come.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum State {
    /// It exists; nobody can find it.
    Created,
    /// Its handler is in place and its record stands in discovery.
    Registered,
    /// It takes requests.
    Running,
    /// It has answered a health check, or a real request, well.
    Healthy,
    /// It is leaving: out of discovery, running requests end.
    Stopping,
    /// Nothing of it runs any more.
    Deregistered,
}

impl State {
    /// Every state, in order.
    pub const ALL: [Self; 6] = [
        Self::Created,
        Self::Registered,
        Self::Running,
        Self::Healthy,
        Self::Stopping,
        Self::Deregistered,
    ];

    /// Its word in `/health`, metrics and log.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Registered => "registered",
            Self::Running => "running",
            Self::Healthy => "healthy",
            Self::Stopping => "stopping",
            Self::Deregistered => "deregistered",
        }
    }

    /// Whether an endpoint may go from here to `next`: one step or more forward, back to
    /// [`State::Running`] when a health check fails, back to [`State::Created`] when its record is
    /// lost, and from [`State::Deregistered`] to [`State::Created`] to be served again.
    pub fn may_become(self, next: Self) -> bool {
        match (self, next) {
            (Self::Stopping, next) => next == Self::Deregistered,
            (Self::Deregistered, next) => next == Self::Created,
            (_, Self::Created) => self != Self::Created,
            (Self::Healthy, Self::Running) => true,
            (now, next) => next > now,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What the environment says about readiness (`spec/events-discovery.md` §7.1).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Settings {
    /// `DYN_SYSTEM_STARTING_HEALTH_STATUS`: whether a process without endpoints is ready.
    pub starts_ready: bool,
    /// `DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS`: if not empty, exactly these endpoints count. Names
    /// as `generate`, or whole ones as `dynamo/backend/generate`.
    pub decisive: Vec<String>,
}

impl Settings {
    /// Reads them, and says what could not be understood.
    pub fn read(env: &Env) -> (Self, Vec<String>) {
        let mut complaints = Vec::new();
        let name = "DYN_SYSTEM_STARTING_HEALTH_STATUS";
        let starting = env.get(name).map(|text| text.trim().to_ascii_lowercase());
        let starts_ready = match starting.as_deref() {
            Some("ready") => true,
            None | Some("notready") => false,
            Some(_) => {
                complaints.push(format!(
                    "environment {name}: neither ready nor notready; going on with notready"
                ));
                false
            }
        };
        let name = "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS";
        let decisive = match env.get(name).map(serde_json::from_str::<Vec<String>>) {
            None => Vec::new(),
            Some(Ok(list)) => list,
            Some(Err(_)) => {
                complaints.push(format!(
                    "environment {name}: not a JSON list of names; every endpoint counts, write \
                     [\"generate\"]"
                ));
                Vec::new()
            }
        };
        let settings = Self {
            starts_ready,
            decisive,
        };
        (settings, complaints)
    }
}

/// The endpoints of this process. Clones are the same list.
#[derive(Clone, Debug, Default)]
pub struct Endpoints(Arc<Mutex<List>>);

#[derive(Debug, Default)]
struct List {
    settings: Settings,
    /// By number, which is that of their order.
    entries: BTreeMap<u64, Entry>,
    next: u64,
    /// What was said of the whole process.
    said: Option<bool>,
    holds: usize,
    leaving: bool,
}

#[derive(Debug)]
struct Entry {
    id: EndpointId,
    state: State,
    /// It counts as ready only when it is healthy.
    checked: bool,
    instance_id: Option<u64>,
    changes: [u64; State::ALL.len()],
}

impl Entry {
    fn is_ready(&self) -> bool {
        match self.state {
            State::Healthy => true,
            State::Running => !self.checked,
            _ => false,
        }
    }
}

/// One endpoint as readers see it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seen {
    /// Its whole name.
    pub id: EndpointId,
    /// What it is.
    pub state: State,
    /// Whether requests should be sent to it: running, and healthy if it is checked.
    pub ready: bool,
    /// The instance that it is in discovery, if it is there.
    pub instance_id: Option<u64>,
    /// How often it has become each state, in the order of [`State::ALL`].
    pub changes: [u64; State::ALL.len()],
}

impl Endpoints {
    /// An empty list.
    pub fn new(settings: Settings) -> Self {
        let list = List {
            settings,
            ..List::default()
        };
        Self(Arc::new(Mutex::new(list)))
    }

    /// Another endpoint, [`State::Created`].
    pub fn add(&self, id: EndpointId) -> Endpoint {
        let mut list = self.list();
        let number = list.next;
        list.next += 1;
        let mut changes = [0; State::ALL.len()];
        changes[State::Created as usize] = 1;
        let entry = Entry {
            id,
            state: State::Created,
            checked: false,
            instance_id: None,
            changes,
        };
        list.entries.insert(number, entry);
        Endpoint(Arc::new(Place {
            list: self.clone(),
            number,
        }))
    }

    /// Keeps the process not ready until what is returned is dropped.
    pub fn hold(&self) -> Hold {
        self.list().holds += 1;
        Hold(self.clone())
    }

    /// Says what the whole process is, whatever its endpoints are; None leaves it to them again.
    pub fn say(&self, ready: Option<bool>) {
        self.list().said = ready;
    }

    /// The process is leaving: from now on it is not ready.
    pub fn leave(&self) {
        self.list().leaving = true;
    }

    /// Whether traffic should be sent to this process. The first that applies: leaving or held,
    /// no; the decisive endpoints of [`Settings`]; those that are checked; what was said; all
    /// endpoints; how the process starts. Unlike Dynamo's, a process with all defaults becomes
    /// ready (`spec/events-discovery.md` §12, Q9).
    pub fn is_ready(&self) -> bool {
        let list = self.list();
        if list.leaving || list.holds > 0 {
            return false;
        }
        let there = |entry: &&Entry| entry.state != State::Deregistered;
        let entries = || list.entries.values().filter(there);
        let decisive = &list.settings.decisive;
        if !decisive.is_empty() {
            let named =
                |entry: &&Entry, name: &str| entry.id.name == name || entry.id.to_string() == name;
            let ready = |name: &String| {
                let mut all = entries().filter(|entry| named(entry, name)).peekable();
                all.peek().is_some() && all.all(Entry::is_ready)
            };
            return decisive.iter().all(ready);
        }
        if entries().any(|entry| entry.checked) {
            return entries().filter(|entry| entry.checked).all(Entry::is_ready);
        }
        if let Some(ready) = list.said {
            return ready;
        }
        if entries().next().is_some() {
            return entries().all(Entry::is_ready);
        }
        list.settings.starts_ready
    }

    /// Every endpoint, in the order in which they were added.
    pub fn seen(&self) -> Vec<Seen> {
        let list = self.list();
        let seen = |entry: &Entry| Seen {
            id: entry.id.clone(),
            state: entry.state,
            ready: entry.is_ready() && !list.leaving,
            instance_id: entry.instance_id,
            changes: entry.changes,
        };
        list.entries.values().map(seen).collect()
    }

    fn list(&self) -> MutexGuard<'_, List> {
        // Whoever panicked while he held it left numbers and words that are whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Endpoints::hold`].
#[derive(Debug)]
pub struct Hold(Endpoints);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.list().holds -= 1;
    }
}

/// One endpoint, for whoever serves it. The last clone that is dropped takes it off the list.
#[derive(Clone, Debug)]
pub struct Endpoint(Arc<Place>);

#[derive(Debug)]
struct Place {
    list: Endpoints,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.list.list().entries.remove(&self.number);
    }
}

impl Endpoint {
    /// It is in this state from now on. Answers false, and changes nothing, when the state does
    /// not follow the one it is in ([`State::may_become`]); to become what it is, is fine.
    pub fn turn(&self, next: State) -> bool {
        let (id, now) = {
            let mut list = self.0.list.list();
            let Some(entry) = list.entries.get_mut(&self.0.number) else {
                return false;
            };
            let now = entry.state;
            if now == next {
                return true;
            }
            if now.may_become(next) {
                entry.state = next;
                entry.changes[next as usize] += 1;
            }
            (entry.id.clone(), now)
        };
        let fits = now.may_become(next);
        if fits {
            tracing::info!(endpoint = %id, from = %now, to = %next, "endpoint changed its state");
        } else {
            tracing::error!(endpoint = %id, from = %now, to = %next, "endpoint cannot change so");
        }
        fits
    }

    /// What it is.
    pub fn state(&self) -> State {
        let list = self.0.list.list();
        let entry = list.entries.get(&self.0.number);
        entry.map_or(State::Deregistered, |entry| entry.state)
    }

    /// From now on it counts as ready only while it is [`State::Healthy`]: a health check decides.
    pub fn is_checked(&self, checked: bool) {
        self.change(|entry| entry.checked = checked);
    }

    /// The instance that it is in discovery; another one after its lease was lost.
    pub fn is_instance(&self, id: u64) {
        self.change(|entry| entry.instance_id = Some(id));
    }

    fn change(&self, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.0.list.list().entries.get_mut(&self.0.number) {
            change(entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> EndpointId {
        format!("ns/comp/{name}").parse().unwrap()
    }

    fn env(pairs: &[(&str, &str)]) -> Env {
        Env::of(
            pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        )
    }

    #[test]
    fn a_life_from_beginning_to_end() {
        let endpoints = Endpoints::default();
        let endpoint = endpoints.add(id("generate"));
        for state in State::ALL.into_iter().skip(1) {
            assert!(endpoint.turn(state), "{state}");
            assert!(endpoint.turn(state), "{state} again is nothing new");
        }
        let seen = &endpoints.seen()[0];
        assert_eq!(
            (seen.state, seen.changes),
            (State::Deregistered, [1, 1, 1, 1, 1, 1])
        );
        drop(endpoint);
        assert!(endpoints.seen().is_empty());
    }

    #[test]
    fn steps_that_may_be_taken_and_others() {
        use State::{Created, Deregistered, Healthy, Registered, Running, Stopping};
        for (now, next) in [
            (Created, Running),
            (Healthy, Running),
            (Running, Created),
            (Healthy, Created),
            (Registered, Stopping),
            (Created, Deregistered),
            (Deregistered, Created),
        ] {
            assert!(now.may_become(next), "{now} {next}");
        }
        for (now, next) in [
            (Stopping, Running),
            (Stopping, Created),
            (Running, Registered),
            (Deregistered, Running),
            (Created, Created),
        ] {
            assert!(!now.may_become(next), "{now} {next}");
        }
        let endpoint = Endpoints::default().add(id("generate"));
        assert!(endpoint.turn(Stopping) && !endpoint.turn(Healthy));
        assert_eq!(endpoint.state(), Stopping);
    }

    #[test]
    fn a_process_with_all_defaults_becomes_ready() {
        let endpoints = Endpoints::default();
        assert!(!endpoints.is_ready());
        let (one, two) = (endpoints.add(id("one")), endpoints.add(id("two")));
        assert!(one.turn(State::Running) && !endpoints.is_ready());
        assert!(two.turn(State::Running) && endpoints.is_ready());
        let hold = endpoints.hold();
        assert!(!endpoints.is_ready());
        drop(hold);
        assert!(endpoints.is_ready());
        // One that has gone in good order is missed by nobody.
        assert!(two.turn(State::Deregistered) && endpoints.is_ready());
        endpoints.leave();
        assert!(!endpoints.is_ready() && !endpoints.seen()[0].ready);
    }

    #[test]
    fn who_decides() {
        // Line 5 of the table: a process without endpoints.
        let (settings, complaints) =
            Settings::read(&env(&[("DYN_SYSTEM_STARTING_HEALTH_STATUS", "ready")]));
        assert!(complaints.is_empty() && Endpoints::new(settings).is_ready());
        // Line 2: those that are named.
        let list = r#"["generate","ns/comp/other"]"#;
        let (settings, complaints) =
            Settings::read(&env(&[("DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS", list)]));
        assert!(complaints.is_empty());
        let endpoints = Endpoints::new(settings);
        let all = ["generate", "other", "third"].map(|name| endpoints.add(id(name)));
        assert!(all[0].turn(State::Running) && !endpoints.is_ready());
        assert!(all[1].turn(State::Running) && endpoints.is_ready());
        // Line 3: those that are checked.
        let endpoints = Endpoints::default();
        let (plain, checked) = (endpoints.add(id("plain")), endpoints.add(id("checked")));
        checked.is_checked(true);
        endpoints.say(Some(true));
        assert!(plain.turn(State::Running) && checked.turn(State::Running));
        assert!(!endpoints.is_ready());
        assert!(checked.turn(State::Healthy) && endpoints.is_ready());
        assert!(checked.turn(State::Running) && !endpoints.is_ready());
        // What was said counts where nothing is checked.
        checked.is_checked(false);
        endpoints.say(Some(false));
        assert!(!endpoints.is_ready());
        endpoints.say(None);
        assert!(endpoints.is_ready());
    }

    #[test]
    fn words_that_nobody_understands_are_said() {
        let (settings, complaints) = Settings::read(&env(&[
            ("DYN_SYSTEM_STARTING_HEALTH_STATUS", "maybe"),
            ("DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS", "generate"),
        ]));
        assert_eq!((settings, complaints.len()), (Settings::default(), 2));
    }
}
