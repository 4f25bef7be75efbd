//! Counters and gauges of one shard, read by others while it runs.
//!
//! One writer: each cell is an atomic only so that a reader sees whole values. Writes are a load
//! and a store, never a read-modify-write, and no cell is shared by two shards.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use corelane_codec::path::EndpointId;

use crate::times::Times;

pub mod flight;

use flight::Flight;

/// A number with one writer.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds to a counter.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(amount),
            Ordering::Relaxed,
        );
    }

    /// Sets a gauge.
    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! cells {
    ($(#[$meta:meta])* $name:ident { $($(#[doc = $doc:literal])+ $kind:ident $field:ident,)+ }
     $(beside { $($(#[doc = $about:literal])+ $other:ident: $type:ty,)+ })?) => {
        $(#[$meta])*
        #[derive(Debug, Default)]
        pub struct $name {
            $($(#[doc = $doc])+ pub $field: Cell,)+
            $($($(#[doc = $about])+ pub $other: $type,)+)?
        }

        impl $name {
            /// Every cell: name, kind, what it is, value. The order is that of the type.
            pub fn each(&self) -> Vec<(&'static str, CellKind, &'static str, u64)> {
                vec![$((
                    stringify!($field),
                    CellKind::$kind,
                    concat!($($doc),+).trim_ascii(),
                    self.$field.get(),
                ),)+]
            }
        }
    };
}

pub(crate) use cells;

/// How a cell moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CellKind {
    /// Only up.
    Counter,
    /// Up and down.
    Gauge,
}

cells! {
    /// What happened on one shard.
    ShardStats {
        /// Request frames that arrived whole, or began to be cut through
        Counter requests,
        /// Requests acknowledged to the caller
        Counter acknowledged,
        /// Frames written to an instance's socket
        Counter forwarded,
        /// Requests answered by the instance
        Counter accepted_upstream,
        /// Forwards tried again on another instance
        Counter retried,
        /// Refused: no such endpoint here
        Counter refused_unknown_endpoint,
        /// Refused: no instance can be reached
        Counter refused_no_instance,
        /// Refused: a table or queue of this shard is full
        Counter refused_overloaded,
        /// Refused: the frame is larger than allowed
        Counter refused_frame_too_large,
        /// Refused: the frame's path is not text
        Counter refused_bad_frame,
        /// Refused: a route relays, and the request's envelope cannot be used for that
        Counter refused_bad_envelope,
        /// Refused: every instance tried was overloaded or gone
        Counter refused_by_instances,
        /// Callers told over their call-home address that their request failed
        Counter callers_told,
        /// Callers that could not be told: address unknown, unreachable, or too many at once
        Counter callers_untold,
        /// Callers of a dead worker that had been called home already, or were gone
        Counter callers_settled,
        /// Forwards whose answer did not come in time
        Counter ack_timeouts,
        /// Answers of an instance that answered nothing
        Counter protocol_errors,
        /// Connections accepted
        Counter connections_accepted,
        /// Connections accepted whose packets this core's own CPU has handled last
        Counter connections_local,
        /// Connections accepted whose packets another CPU has handled last
        Counter connections_remote,
        /// Connections handed to a core with fewer callers
        Counter connections_handed_over,
        /// Connections accepted by another core and taken over
        Counter connections_taken_over,
        /// Connections refused because the table was full
        Counter connections_refused,
        /// Connections closed because no handshake could be begun: too many wait already
        Counter handshakes_refused,
        /// Connections closed because the peer speaks TLS where we do not
        Counter tls_strangers,
        /// Connections closed because the peer has changed its keys, which the kernel's TLS cannot
        Counter tls_key_updates_refused,
        /// Connections of the kernel's TLS that were closed without its farewell
        Counter tls_farewells_lost,
        /// Accepts that failed, for lack of descriptors for example
        Counter accept_failures,
        /// Connections closed, of all kinds
        Counter connections_closed,
        /// Downstream connections closed for standing still inside a frame
        Counter slow_frames_closed,
        /// Connects to instances that failed
        Counter connect_failures,
        /// Established connections to instances that were lost
        Counter upstreams_lost,
        /// Bytes received
        Counter received_bytes,
        /// Bytes sent
        Counter sent_bytes,
        /// Bytes copied in user space to join a frame that arrived in crumbs
        Counter joined_bytes,
        /// Receives that found no free buffer
        Counter buffers_exhausted,
        /// Times a downstream connection had to wait: its replies unread, or an instance slow
        Counter receives_paused,
        /// Completions of operations whose connection was gone
        Counter stale_completions,
        /// Turns of the loop
        Counter ticks,
        /// Turns that found nothing to do
        Counter idle_ticks,
        /// Times the shard slept in its executor
        Counter parks,
        /// System calls made by the ring
        Counter system_calls,
        /// Requests that ran in handlers of this process
        Counter handled,
        /// Directories taken over from control
        Counter directories,
        /// Changes of settings taken over
        Counter settings,
        /// Times the paths that handlers serve were changed
        Counter path_updates,
        /// Requests acknowledged whose envelope could not be understood
        Counter undecodable,
        /// Responses of our handlers whose caller could not be reached
        Counter responses_unreachable,
        /// Responses of our handlers that were cut off by their caller's end
        Counter responses_lost,
        /// Spans of requests that were routed, told to control
        Counter spans_routed,
        /// Spans of requests that control did not take in time
        Counter spans_lost,
        /// Calls made
        Counter calls_made,
        /// Calls home that named no call of ours, or named it too late
        Counter homes_refused,
        /// Requests whose response was to be relayed
        Counter relays_begun,
        /// Relayed responses tried again on another instance after the first had accepted
        Counter relays_retried,
        /// Relayed responses that came to their end
        Counter relays_finished,
        /// Relayed responses whose caller was told of an error in place of the first item
        Counter relays_failed,
        /// Relayed responses that broke off after their first item
        Counter relays_cut,
        /// Relayed responses whose caller went away, or could not be dialled
        Counter relays_abandoned,
        /// Deadlines of relayed responses that ran out: call home, first item, inactivity
        Counter relay_timeouts,
        /// Requests no longer kept for another try because buffers were short
        Counter relays_let_go,
        /// Requests that went to workers behind lanes
        Counter lane_requests,
        /// Bytes of requests copied in user space on their way into a slab, their fronts included
        Counter lane_copied_bytes,
        /// Bytes of bodies that the kernel wrote into a slab
        Counter lane_landed_bytes,
        /// Times no lane of a route had room for a request
        Counter lane_full,
        /// Items that workers sent over lanes
        Counter lane_items,
        /// Bytes of those items
        Counter lane_item_bytes,
        /// Bytes of small items copied in user space, each twice
        Counter lane_item_copied_bytes,
        /// Requests that workers behind lanes ended with a failure
        Counter lane_failures,
        /// Requests whose worker behind a lane died with them
        Counter lane_abandoned,
        /// Times a sleeping worker was woken over its lane
        Counter lane_wakes,
        /// Requests of routes by KV cache whose prompt was looked up
        Counter kv_lookups,
        /// Of those, requests whose instance had some of the prompt
        Counter kv_hits,
        /// Blocks of the prompts that were looked up
        Counter kv_prompt_blocks,
        /// Of those, blocks that the chosen instance had
        Counter kv_overlap_blocks,
        /// Requests of routes by KV cache whose prompt was looked up once more, to be tried again
        Counter kv_lookups_again,
        /// Requests of routes by KV cache that say nothing of their prompt
        Counter kv_prompts_unknown,
        /// Requests whose header or body should tell their prompt and cannot be read
        Counter kv_prompts_unreadable,
        /// Batches of changes of KV caches taken over
        Counter kv_batches,
        /// Blocks that were stored in KV caches
        Counter kv_stored,
        /// Blocks that were removed from KV caches
        Counter kv_removed,
        /// Blocks that were to be removed and were not known
        Counter kv_removed_unknown,
        /// Blocks not taken in because the block before them is not known
        Counter kv_orphans,
        /// Blocks forgotten to make room: the oldest leaves of the rank that holds most
        Counter kv_evicted,
        /// Blocks not taken in because there are too many ranks
        Counter kv_rankless,
        /// Ranks whose blocks were all forgotten
        Counter kv_cleared,
        /// Reports of load that instances of routes have made
        Counter load_reports,
        /// Requests placed where the instance's own report was its load
        Counter chosen_by_report,
        /// Requests placed where a report was wanted and this core's count had to do
        Counter chosen_by_own_count,
        /// Lanes that workers attached
        Counter lanes_attached,
        /// Lanes that have ended
        Counter lanes_lost,
        /// Lanes ended because their worker broke the rules or took nothing
        Counter lane_faults,
        /// Connections open now
        Gauge connections,
        /// Of those, connections of callers
        Gauge callers,
        /// Receive queues of devices, 64 at most, that have brought connections of callers here
        Gauge receive_queues,
        /// Microseconds that this core polls its receive queues before it sleeps; 0: it does not
        Gauge busy_poll_us,
        /// Connections to instances open now
        Gauge upstreams,
        /// Requests between arrival and end
        Gauge in_flight,
        /// Receive buffers that hold bytes
        Gauge buffers_held,
        /// Most receive buffers ever held at once
        Gauge buffers_held_peak,
        /// Entries of the piece table in use
        Gauge pieces,
        /// Chunks of the send pool in use
        Gauge chunks,
        /// Timers set
        Gauge timers,
        /// Callers remembered in case their worker dies
        Gauge ledger,
        /// Callers being told
        Gauge tells,
        /// 1 while new requests are refused because the process is to end
        Gauge draining,
        /// Shared connections to callers that could be used
        Counter mux_connected,
        /// Shared connections to callers that could not be made; their responses get their own
        Counter mux_refused,
        /// Shared connections that broke off while responses were under way
        Counter mux_lost,
        /// Responses of our handlers that were given to a shared connection
        Counter mux_sent,
        /// Responses to our calls that came on a shared connection
        Counter mux_received,
        /// Requests that handlers of this process run or that wait for one
        Gauge handling,
        /// Those of them that wait
        Gauge queued,
        /// Call-home sockets of our handlers
        Gauge responses,
        /// Calls under way
        Gauge calls,
        /// Responses that are relayed
        Gauge relays,
        /// Workers that have called a relaying router home and not said yet for which request
        Gauge relay_strangers,
        /// Chunks that hold the fronts of relayed requests
        Gauge relay_heads,
        /// Blocks in the index of KV caches, each for every rank that holds it
        Gauge kv_blocks,
        /// Different blocks in it
        Gauge kv_nodes,
        /// Ranks in it
        Gauge kv_ranks,
        /// Lanes to workers
        Gauge lanes,
        /// Requests of lanes between arrival and end
        Gauge lane_jobs,
        /// Instances in the directory
        Gauge instances,
        /// Instances that can be reached
        Gauge instances_ready,
    }
}

cells! {
    /// What happened to the requests of one handler on one shard.
    HandlerStats {
        /// Requests acknowledged
        Counter requests,
        /// Requests refused because slots and queue were full
        Counter refused,
        /// Requests acknowledged whose envelope could not be understood
        Counter undecodable,
        /// Requests answered to the end
        Counter finished,
        /// Requests that ended with an error of the handler
        Counter failed,
        /// Requests whose caller stopped or was gone before the end
        Counter abandoned,
        /// Requests whose handler panicked
        Counter panicked,
        /// Response items written
        Counter items,
        /// Bytes of the envelopes of requests
        Counter request_bytes,
        /// Bytes of response items, encoded
        Counter response_bytes,
        /// Requests that their caller stopped or killed
        Counter cancelled,
        /// Requests that were answered with an error, in the prologue or as the last item
        Counter error_answers,
        /// Requests whose caller could not be called home
        Counter unreachable,
        /// Requests whose caller was lost before the end of the response
        Counter cut_off,
        /// Requests that run or wait for a slot
        Gauge busy,
    }
    beside {
        /// Who it is, for spans and metrics; set once by whoever made the handler.
        id: OnceLock<EndpointId>,
        /// Its instance in discovery, for the same; 0 as long as it has none.
        instance: Cell,
        /// How long its requests took.
        times: Times,
    }
}

/// Latencies by power of two, four steps to each: 1 us to over an hour, 4 bytes of error at most
/// in 16.
#[derive(Debug)]
pub struct Latency {
    buckets: [Cell; Latency::BUCKETS],
    sum_ns: Cell,
}

impl Default for Latency {
    fn default() -> Self {
        Latency {
            buckets: std::array::from_fn(|_| Cell::default()),
            sum_ns: Cell::default(),
        }
    }
}

impl Latency {
    const BUCKETS: usize = 128;

    /// Counts one latency.
    #[inline]
    pub fn record(&self, ns: u64) {
        self.buckets[Latency::bucket(ns)].add(1);
        self.sum_ns.add(ns);
    }

    fn bucket(ns: u64) -> usize {
        let quarter_us = (ns >> 8).max(4);
        let power = 63 - quarter_us.leading_zeros() as usize;
        let step = (quarter_us >> (power - 2)) as usize & 3;
        ((power - 2) * 4 + step).min(Latency::BUCKETS - 1)
    }

    fn clear(&self) {
        self.buckets.iter().for_each(|cell| cell.set(0));
        self.sum_ns.set(0);
    }

    /// Upper bound of bucket `index`, in ns (exclusive).
    pub fn bound_ns(index: usize) -> u64 {
        let (power, step) = (index / 4 + 2, index as u64 % 4);
        ((4 + step + 1) << (power - 2)) << 8
    }

    /// Pairs of (upper bound in ns, count), for buckets that are not empty.
    pub fn counts(&self) -> Vec<(u64, u64)> {
        let counts = self.buckets.iter().enumerate();
        counts
            .map(|(index, cell)| (Latency::bound_ns(index), cell.get()))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// Sum of all latencies, in ns.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns.get()
    }
}

/// All that a shard shows to others.
#[derive(Debug, Default)]
pub struct Stats {
    /// Counters and gauges.
    pub shard: ShardStats,
    /// From a request's arrival to the moment its frame was in an instance's socket.
    pub hop: Latency,
    /// From there to the instance's answer.
    pub answer: Latency,
    /// One entry for each relayed route, under its place in the directory.
    pub routes: Routes,
    /// The last things that happened.
    pub flight: Flight,
}

impl Stats {
    /// With a flight recorder of so many records.
    pub fn new(flight_records: u32) -> Stats {
        Stats {
            flight: Flight::new(flight_records),
            ..Stats::default()
        }
    }
}

/// Latencies of one relayed route.
#[derive(Debug, Default)]
pub struct RouteStats {
    /// From a request's arrival to the first item of its response.
    pub first_item: Latency,
    /// From one item to the next.
    pub inter_item: Latency,
}

/// Routes whose latencies are kept, at most; the others of a directory go uncounted.
pub const ROUTES_MAX: usize = 256;

/// The latencies of relayed routes; made when a route is first published.
#[derive(Debug)]
pub struct Routes([OnceLock<Box<RouteStats>>; ROUTES_MAX]);

impl Default for Routes {
    fn default() -> Self {
        Routes(std::array::from_fn(|_| OnceLock::new()))
    }
}

impl Routes {
    /// Nothing stands at this place any more: the next begins at zero.
    pub fn clear(&self, route: usize) {
        if let Some(stats) = self.get(route) {
            stats.first_item.clear();
            stats.inter_item.clear();
        }
    }

    /// Begins to count for a route.
    pub fn open(&self, route: usize) {
        if let Some(place) = self.0.get(route) {
            place.get_or_init(Box::default);
        }
    }

    /// What was counted for a route; `None` if it is not relayed.
    pub fn get(&self, route: usize) -> Option<&RouteStats> {
        self.0.get(route)?.get().map(|stats| &**stats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_lies_below_its_bound_and_not_below_the_one_before() {
        for ns in (0..40)
            .map(|power| 1u64 << power)
            .flat_map(|ns| [ns - 1, ns, ns + ns / 3])
        {
            let bucket = Latency::bucket(ns);
            assert!(ns < Latency::bound_ns(bucket) || bucket == 127, "{ns}");
            assert!(
                bucket == 0 || ns >= Latency::bound_ns(bucket - 1),
                "{ns} {bucket}"
            );
        }
    }

    #[test]
    fn names_and_help_of_cells_are_listed() {
        let stats = ShardStats::default();
        stats.requests.add(3);
        let first = stats.each()[0];
        assert_eq!(
            (first.0, first.1, first.3),
            ("requests", CellKind::Counter, 3)
        );
        assert!(first.2.starts_with("Request frames"));
    }
}
