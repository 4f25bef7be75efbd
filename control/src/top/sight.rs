//! What two samples of a process say of the time between them.

use std::time::Duration;

use super::scrape::{Scrape, Series};
use crate::overview::{Instance, Overview, Route};

/// Turns a second below which a core that has slept is cold.
const COLD_TURNS: f64 = 100.0;

/// What a process said at one moment.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Since some moment that all samples share.
    pub at: Duration,
    /// `/metrics`.
    pub metrics: Scrape,
    /// `/overview`; a process that routes nothing has none.
    pub overview: Option<Overview>,
}

/// What rows are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    /// Number, name, id.
    #[default]
    Name,
    /// Requests a second.
    Requests,
    /// Load; of cores, requests in flight.
    Load,
    /// Errors; of cores, refusals.
    Errors,
}

impl Sort {
    /// The next one.
    #[must_use]
    pub fn next(self) -> Self {
        match self {
            Self::Name => Self::Requests,
            Self::Requests => Self::Load,
            Self::Load => Self::Errors,
            Self::Errors => Self::Name,
        }
    }

    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Requests => "requests",
            Self::Load => "load",
            Self::Errors => "errors",
        }
    }
}

/// All that is shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sight {
    /// The process.
    pub head: Head,
    /// Its cores.
    pub cores: Vec<CoreRow>,
    /// Its routes.
    pub routes: Vec<RouteRow>,
    /// Name and state of what it is connected with.
    pub planes: Vec<(&'static str, String)>,
    /// Pools of GPU memory.
    pub pools: Vec<PoolRow>,
}

/// The process as a whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Head {
    /// Version of the program.
    pub program: String,
    /// Since its start.
    pub uptime: Duration,
    /// It is leaving.
    pub draining: bool,
    /// Requests a second.
    pub requests_s: f64,
    /// Refusals a second.
    pub refused_s: f64,
    /// Requests between arrival and end.
    pub in_flight: u64,
    /// Connections.
    pub connections: u64,
    /// Parts that make no progress.
    pub stuck: u64,
}

/// One core.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CoreRow {
    /// Its number.
    pub core: String,
    /// Its CPU.
    pub cpu: String,
    /// Its ring.
    pub ring: String,
    /// `hot`, `warm`, `cold`, `spin`, or `still`: it does not answer.
    pub gear: &'static str,
    /// Requests a second.
    pub requests_s: f64,
    /// Half of the requests were on their way within this, in seconds.
    pub hop_p50_s: Option<f64>,
    /// 99 of 100.
    pub hop_p99_s: Option<f64>,
    /// System calls for each request.
    pub calls: Option<f64>,
    /// The least buffers that were ever free, and how many there are.
    pub buffers: Option<(u64, u64)>,
    /// Requests between arrival and end.
    pub in_flight: u64,
    /// Refusals a second.
    pub refused_s: f64,
    /// Connections that came by the core's own NIC queue, of 1.
    pub locality: Option<f64>,
}

/// One route.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteRow {
    /// The endpoint that we offer.
    pub listen: String,
    /// How an instance is chosen.
    pub policy: String,
    /// It stands in discovery.
    pub registered: bool,
    /// Instances that get requests from all cores.
    pub ready: usize,
    /// All together.
    pub sum: Figures,
    /// Its instances.
    pub instances: Vec<InstanceRow>,
    /// Instances that are not listed.
    pub left_out: usize,
}

/// One instance.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InstanceRow {
    /// Its id.
    pub id: String,
    /// Where it is dialled.
    pub address: String,
    /// Its numbers.
    pub figures: Figures,
    /// Why it gets nothing, and for how many ms.
    pub barrier: Option<(String, Option<u64>)>,
}

/// Numbers of a route or an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// Requests accepted a second.
    pub requests_s: f64,
    /// What policies by load compare.
    pub load: f64,
    /// Requests that wait for an answer, and responses under way.
    pub busy: u64,
    /// Requests refused or lost since the start.
    pub failed: u64,
    /// The same a second.
    pub failed_s: f64,
}

/// One pool of GPU memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PoolRow {
    /// The GPU.
    pub gpu: String,
    /// The pool.
    pub tag: String,
    /// State of its lock.
    pub state: String,
    /// Who holds it.
    pub holder: String,
    /// Clients that wait for it.
    pub waiters: u64,
    /// Writers among them.
    pub writers: u64,
    /// Bytes that it holds.
    pub bytes: u64,
}

/// Two samples, the older one first.
struct Pair<'a> {
    before: &'a Sample,
    now: &'a Sample,
    seconds: f64,
}

impl Sight {
    /// What is to be seen; without an older sample, since the start of the process.
    pub fn of(before: Option<&Sample>, now: &Sample, sort: Sort) -> Self {
        let start = Sample::default();
        let uptime = now.metrics.sum("corelane_uptime_seconds", &[]);
        let seconds = match before {
            Some(before) => now.at.saturating_sub(before.at).as_secs_f64(),
            None => uptime.unwrap_or(1.0),
        };
        let pair = Pair {
            before: before.unwrap_or(&start),
            now,
            seconds: seconds.max(1e-3),
        };
        let mut sight = Self {
            head: head(&pair),
            cores: cores(&pair),
            routes: routes(&pair),
            planes: planes(&pair),
            pools: pools(&now.metrics),
        };
        sight.sort(sort);
        sight
    }

    fn sort(&mut self, sort: Sort) {
        let falling = |a: f64, b: f64| b.total_cmp(&a);
        let by = |a: &Figures, b: &Figures| match sort {
            Sort::Name => std::cmp::Ordering::Equal,
            Sort::Requests => falling(a.requests_s, b.requests_s),
            Sort::Load => falling(a.load, b.load),
            Sort::Errors => b.failed.cmp(&a.failed),
        };
        self.cores.sort_by(|a, b| match sort {
            Sort::Name => std::cmp::Ordering::Equal,
            Sort::Requests => falling(a.requests_s, b.requests_s),
            Sort::Load => b.in_flight.cmp(&a.in_flight),
            Sort::Errors => falling(a.refused_s, b.refused_s),
        });
        self.routes.sort_by(|a, b| by(&a.sum, &b.sum));
        for route in &mut self.routes {
            route.instances.sort_by(|a, b| by(&a.figures, &b.figures));
        }
    }
}

impl Pair<'_> {
    /// How much a counter has grown; one that has begun anew has grown from 0.
    fn grown(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let now = self.now.metrics.sum(name, labels).unwrap_or(0.0);
        let before = self.before.metrics.sum(name, labels).unwrap_or(0.0);
        if now < before { now } else { now - before }
    }

    fn rate(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.grown(name, labels) / self.seconds
    }

    fn gauge(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        self.now.metrics.sum(name, labels).unwrap_or(0.0) as u64
    }
}

fn head(pair: &Pair<'_>) -> Head {
    let uptime_s = pair.now.metrics.sum("corelane_uptime_seconds", &[]);
    let mut builds = pair.now.metrics.each("corelane_build_info").iter();
    let program = builds.find_map(|build| build.label("version"));
    Head {
        program: program.unwrap_or_default().to_owned(),
        uptime: Duration::try_from_secs_f64(uptime_s.unwrap_or(0.0)).unwrap_or_default(),
        draining: pair.gauge("corelane_process_draining", &[]) > 0,
        requests_s: pair.rate("corelane_requests_total", &[]),
        refused_s: pair.rate("corelane_refused_total", &[]),
        in_flight: pair.gauge("corelane_in_flight", &[]),
        connections: pair.gauge("corelane_connections", &[]),
        stuck: pair.gauge("corelane_process_stuck", &[]),
    }
}

fn cores(pair: &Pair<'_>) -> Vec<CoreRow> {
    let infos = pair.now.metrics.each("corelane_ring_info").iter();
    infos.map(|info| core(pair, info)).collect()
}

fn core(pair: &Pair<'_>, info: &Series) -> CoreRow {
    let number = info.label("core").unwrap_or_default();
    let of = [("core", number)];
    let overview = pair.now.overview.iter().flat_map(|all| &all.cores);
    let known = overview
        .clone()
        .find(|core| core.core.to_string() == number);
    let requests = pair.grown("corelane_requests_total", &of);
    let calls = pair.grown("corelane_system_calls_total", &of);
    let peak = pair.gauge("corelane_buffers_held_peak", &of);
    let spins = known.is_some_and(|core| core.idle == "spin");
    let answers = known.is_none_or(|core| core.answers);
    let hops = hops(pair, number);
    CoreRow {
        core: number.to_owned(),
        cpu: info.label("cpu").unwrap_or_default().to_owned(),
        ring: info.label("ring").unwrap_or_default().to_owned(),
        gear: match (answers, spins) {
            (false, _) => "still",
            (true, true) => "spin",
            (true, false) => gear(pair, &of),
        },
        requests_s: requests / pair.seconds,
        hop_p50_s: quantile(&hops, 0.5),
        hop_p99_s: quantile(&hops, 0.99),
        calls: (requests > 0.0).then(|| calls / requests),
        buffers: known.map(|core| (core.buffers.saturating_sub(peak), core.buffers)),
        in_flight: pair.gauge("corelane_in_flight", &of),
        refused_s: pair.rate("corelane_refused_total", &of),
        locality: pair.now.metrics.sum("corelane_locality_ratio", &of),
    }
}

/// Cold: it has slept, and hardly turned. Hot: most of its turns had something to do.
fn gear(pair: &Pair<'_>, of: &[(&str, &str)]) -> &'static str {
    let turns = pair.grown("corelane_ticks_total", of);
    let idle = pair.grown("corelane_idle_ticks_total", of);
    let parks = pair.grown("corelane_parks_total", of);
    if turns == 0.0 || parks > 0.0 && turns / pair.seconds < COLD_TURNS {
        "cold"
    } else if idle * 2.0 <= turns {
        "hot"
    } else {
        "warm"
    }
}

/// Hops between the samples: upper bounds in seconds, and how many took no longer.
fn hops(pair: &Pair<'_>, number: &str) -> Vec<(f64, f64)> {
    let before = buckets(&pair.before.metrics, number);
    let mut now = buckets(&pair.now.metrics, number);
    // A core that has begun anew has counted fewer.
    let grows = before
        .iter()
        .zip(&now)
        .all(|(a, b)| a.0 == b.0 && a.1 <= b.1);
    if grows && before.len() == now.len() {
        for (bucket, before) in now.iter_mut().zip(&before) {
            bucket.1 -= before.1;
        }
    }
    now
}

fn buckets(metrics: &Scrape, number: &str) -> Vec<(f64, f64)> {
    let all = metrics.each("corelane_hop_seconds_bucket").iter();
    let own = all.filter(|series| series.label("core") == Some(number));
    let bucket = |series: &Series| Some((series.label("le")?.parse().ok()?, series.value));
    let mut buckets: Vec<(f64, f64)> = own.filter_map(bucket).collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    buckets
}

/// A quantile, in seconds. Within a bucket hops are taken for evenly spread, so it is off by the
/// width of a bucket at most.
fn quantile(buckets: &[(f64, f64)], part: f64) -> Option<f64> {
    let all = buckets.last().filter(|last| last.1 > 0.0)?.1;
    let wanted = all * part;
    let place = buckets.iter().position(|(_, count)| *count >= wanted)?;
    let (below, under) = match place {
        0 => (0.0, 0.0),
        place => buckets[place - 1],
    };
    let (bound, count) = buckets[place];
    if bound.is_infinite() {
        return Some(below);
    }
    let within = (wanted - under) / (count - under).max(1.0);
    Some(below + (bound - below) * within)
}

fn routes(pair: &Pair<'_>) -> Vec<RouteRow> {
    let now = pair.now.overview.iter().flat_map(|all| &all.routes);
    let before = pair.before.overview.iter().flat_map(|all| &all.routes);
    now.map(|route| {
        let earlier = before.clone().find(|other| other.listen == route.listen);
        route_row(pair, route, earlier)
    })
    .collect()
}

fn route_row(pair: &Pair<'_>, route: &Route, before: Option<&Route>) -> RouteRow {
    let row = |instance: &Instance| {
        let earlier = before.map_or(&[][..], |route| &route.instances);
        let earlier = earlier.iter().find(|other| other.id == instance.id);
        instance_row(pair, instance, earlier)
    };
    let instances: Vec<InstanceRow> = route.instances.iter().map(row).collect();
    let mut sum = Figures::default();
    for Figures {
        requests_s,
        load,
        busy,
        failed,
        failed_s,
    } in instances.iter().map(|instance| instance.figures)
    {
        sum.requests_s += requests_s;
        sum.load += load;
        sum.busy += busy;
        sum.failed += failed;
        sum.failed_s += failed_s;
    }
    let ready = instances.iter().filter(|row| row.barrier.is_none()).count();
    RouteRow {
        listen: route.listen.clone(),
        policy: route.policy.clone(),
        registered: route.registered,
        ready,
        sum,
        instances,
        left_out: route.instances_left_out,
    }
}

fn instance_row(pair: &Pair<'_>, now: &Instance, before: Option<&Instance>) -> InstanceRow {
    let grown = |now: u64, before: Option<u64>| {
        let before = before.filter(|before| *before <= now).unwrap_or(0);
        (now - before) as f64
    };
    let requests = grown(now.answered, before.map(|before| before.answered));
    let failed = grown(now.failed, before.map(|before| before.failed));
    InstanceRow {
        id: now.id.clone(),
        address: now.address.clone().unwrap_or_else(|| "lane".to_owned()),
        figures: Figures {
            requests_s: requests / pair.seconds,
            load: now.load,
            busy: now.unanswered + now.streams,
            failed: now.failed,
            failed_s: failed / pair.seconds,
        },
        barrier: now.barrier.clone().map(|why| (why, now.barrier_ms)),
    }
}

fn planes(pair: &Pair<'_>) -> Vec<(&'static str, String)> {
    let metrics = &pair.now.metrics;
    let mut planes = Vec::new();
    if let Some(overview) = &pair.now.overview {
        let registered = overview.routes.iter().filter(|route| route.registered);
        let registered = registered.count();
        let identity = overview.identity.as_deref().unwrap_or("none yet");
        let (store, routes) = (&overview.discovery, overview.routes.len());
        planes.push((
            "discovery",
            format!("{store}, identity {identity}, {registered} of {routes} routes registered"),
        ));
    }
    if let Some(generation) = metrics.sum("corelane_config_generation", &[]) {
        let taken = metrics.sum("corelane_config_last_reload_successful", &[]);
        let last = match taken {
            Some(taken) if taken < 1.0 => ", the last reload was refused or taken back",
            _ => "",
        };
        planes.push(("config", format!("generation {generation}{last}")));
    }
    if metrics
        .sum("corelane_discovery_watched_keys", &[])
        .is_some()
    {
        let gauge = |name: &str| pair.gauge(name, &[]);
        planes.push((
            "watches",
            format!(
                "{} keys, {} stale, {} reconnects, {} leases lost, {} writes deferred",
                gauge("corelane_discovery_watched_keys"),
                gauge("corelane_discovery_stale_watches"),
                gauge("corelane_discovery_reconnects_total"),
                gauge("corelane_discovery_lease_losses_total"),
                gauge("corelane_discovery_writes_deferred_total"),
            ),
        ));
    }
    for (plane, name) in [
        ("nats", "corelane_nats_connected"),
        ("bridge", "corelane_bridge_nats_connected"),
    ] {
        if let Some(connected) = metrics.sum(name, &[]) {
            let word = if connected > 0.0 {
                "connected"
            } else {
                "not connected"
            };
            planes.push((plane, word.to_owned()));
        }
    }
    if metrics.sum("corelane_events_received_total", &[]).is_some() {
        planes.push(("events", events(pair)));
    }
    planes.extend(feeds(pair).map(|text| ("feeds", text)));
    planes
}

fn events(pair: &Pair<'_>) -> String {
    let dropped = ["newest", "oldest", "disconnect", "local", "too_large"];
    let dropped =
        dropped.map(|how| pair.grown(&format!("corelane_events_dropped_{how}_total"), &[]));
    format!(
        "{:.0}/s in, {:.0}/s out, {:.0} dropped, {} publishers, {} subscribers, {} bytes queued",
        pair.rate("corelane_events_received_total", &[]),
        pair.rate("corelane_events_sent_total", &[]),
        dropped.iter().sum::<f64>(),
        pair.gauge("corelane_events_publishers", &[]),
        pair.gauge("corelane_events_subscribers", &[]),
        pair.gauge("corelane_events_queued_bytes", &[]),
    )
}

/// What workers publish about themselves.
fn feeds(pair: &Pair<'_>) -> Option<String> {
    let feeds = pair.now.metrics.each("corelane_feed_connected");
    let connected = feeds.iter().filter(|feed| feed.value > 0.0).count();
    let lags = pair.now.metrics.each("corelane_feed_lag_seconds").iter();
    let lag_s = lags.map(|lag| lag.value).fold(0.0, f64::max);
    let (all, lost) = (feeds.len(), pair.gauge("corelane_feed_lost_total", &[]));
    let rate = pair.rate("corelane_feed_events_total", &[]);
    (all > 0).then(|| {
        format!("{connected} of {all} connected, {rate:.0}/s, lag {lag_s:.2} s, {lost} lost")
    })
}

fn pools(metrics: &Scrape) -> Vec<PoolRow> {
    let states = metrics.each("corelane_gpu_mem_state").iter();
    let states = states.filter(|state| state.value > 0.0);
    let row = |state: &Series| {
        let label = |name: &str| state.label(name).unwrap_or_default();
        let of = ["gpu", "tag", "generation"].map(|name| (name, label(name)));
        let gauge = |name: &str| {
            let name = format!("corelane_gpu_mem_{name}");
            metrics.sum(&name, &of).unwrap_or(0.0) as u64
        };
        let (writer, readers) = (gauge("writer_pid"), gauge("readers"));
        PoolRow {
            gpu: label("gpu").to_owned(),
            tag: label("tag").to_owned(),
            state: label("state").to_owned(),
            holder: match (writer, readers) {
                (1.., _) => format!("pid {writer}"),
                // A process that we have no number for.
                _ if label("state").eq_ignore_ascii_case("rw") => "a writer".to_owned(),
                (0, 0) => "nobody".to_owned(),
                (0, 1) => "1 reader".to_owned(),
                (0, _) => format!("{readers} readers"),
            },
            waiters: gauge("waiters"),
            writers: gauge("waiting_writers"),
            bytes: gauge("bytes_held"),
        }
    };
    states.map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_s: u64, text: &str, overview: Option<Overview>) -> Sample {
        Sample {
            at: Duration::from_secs(at_s),
            metrics: Scrape::parse(text),
            overview,
        }
    }

    #[test]
    fn quantiles_lie_in_their_bucket() {
        let buckets = [(1.0, 0.0), (2.0, 50.0), (4.0, 99.0), (f64::INFINITY, 100.0)];
        assert_eq!(quantile(&buckets, 0.5), Some(2.0));
        assert_eq!(quantile(&buckets, 0.25), Some(1.5));
        assert_eq!(quantile(&buckets, 0.99), Some(4.0));
        assert_eq!(
            quantile(&buckets, 1.0),
            Some(4.0),
            "more than the last bound"
        );
        assert_eq!(quantile(&[(1.0, 0.0), (f64::INFINITY, 0.0)], 0.5), None);
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn gears_follow_from_turns() {
        for (turns, idle, parks, gear) in [
            (100_000, 1_000, 0, "hot"),
            (300, 200, 0, "warm"),
            (60, 20, 2, "cold"),
            (0, 0, 0, "cold"),
            (100_000, 60_000, 1, "warm"),
        ] {
            let text = format!(
                "corelane_ring_info{{core=\"0\",cpu=\"1\",ring=\"uring\"}} 1\n\
                 corelane_ticks_total{{core=\"0\"}} {turns}\n\
                 corelane_idle_ticks_total{{core=\"0\"}} {idle}\n\
                 corelane_parks_total{{core=\"0\"}} {parks}\n"
            );
            let before = sample(1, "", None);
            let sight = Sight::of(Some(&before), &sample(2, &text, None), Sort::Name);
            assert_eq!(sight.cores[0].gear, gear, "{turns} {idle} {parks}");
        }
    }

    #[test]
    fn a_process_that_has_begun_anew_counts_from_nothing() {
        let text = |count: u64| format!("corelane_requests_total{{core=\"0\"}} {count}\n");
        let (before, now) = (sample(1, &text(500), None), sample(3, &text(40), None));
        let sight = Sight::of(Some(&before), &now, Sort::Name);
        assert_eq!(sight.head.requests_s, 20.0);
        assert!(sight.cores.is_empty() && sight.routes.is_empty());
    }

    #[test]
    fn pools_say_who_holds_their_lock() {
        let (a, b) = ["a", "b"]
            .map(|tag| format!("gpu=\"g\",tag=\"{tag}\",generation=\"first\""))
            .into();
        let text = format!(
            "corelane_gpu_mem_state{{{a},state=\"RW\"}} 1\n\
             corelane_gpu_mem_state{{{a},state=\"RO\"}} 0\n\
             corelane_gpu_mem_writer_pid{{{a}}} 77\n\
             corelane_gpu_mem_waiters{{{a}}} 3\n\
             corelane_gpu_mem_state{{{b},state=\"RO\"}} 1\n\
             corelane_gpu_mem_readers{{{b}}} 2\n"
        );
        let sight = Sight::of(None, &sample(1, &text, None), Sort::Name);
        let holders: Vec<&str> = sight.pools.iter().map(|pool| &*pool.holder).collect();
        assert_eq!(holders, ["pid 77", "2 readers"]);
        assert_eq!(sight.pools[0].waiters, 3);
    }
}
