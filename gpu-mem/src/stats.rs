//! What each pool counts, readable from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

/// Declares the counters once: variant, name, what it counts.
macro_rules! counters {
    ($($variant:ident $name:literal $what:literal,)+) => {
        /// Something that is counted from the start of the service.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub enum Counter {
            $( #[doc = $what] $variant, )+
        }

        impl Counter {
            /// All of them.
            pub const ALL: &'static [Counter] = &[$(Counter::$variant),+];

            /// The name, without a prefix.
            pub fn name(self) -> &'static str {
                match self { $(Counter::$variant => $name,)+ }
            }

            /// What it counts, in a sentence.
            pub fn help(self) -> &'static str {
                match self { $(Counter::$variant => $what,)+ }
            }
        }

        const COUNTERS: usize = [$(Counter::$variant),+].len();
    };
}

counters! {
    Connections "connections_total" "Connections that were accepted.",
    ConnectionsRefused "connections_refused_total" "Connections of users outside the allow-list.",
    ConnectionsOverLimit "connections_over_limit_total" "Connections over the service's limit.",
    ConnectionsShed "connections_shed_total" "Connections that held too much memory in all.",
    GrantsWriter "grants_writer_total" "Grants of rw and rw_data.",
    GrantsReader "grants_reader_total" "Grants of ro.",
    WaitsTimedOut "waits_timed_out_total" "Waiters whose time ran out.",
    WaitersGone "waiters_gone_total" "Waiters that died before their turn.",
    Refused "refused_total" "Lock requests that were refused without waiting.",
    Commits "commits_total" "Publications.",
    LayoutCommits "layout_commits_total" "Layouts made durable.",
    Aborts "aborts_total" "Writers that left without publishing.",
    Allocations "allocations_total" "Blocks that were made.",
    AllocationOom "allocation_oom_total" "Allocations that found no memory at first.",
    AllocationTimedOut "allocation_timed_out_total" "Allocations that found no memory in time.",
    Exports "exports_total" "Descriptors that were lent.",
    ExportsWithheld "exports_withheld_total" "Descriptors that the kernel would not pass on.",
    IpcOffers "ipc_offers_total" "CUDA IPC handles that writers offered.",
    IpcOpens "ipc_opens_total" "CUDA IPC handles that were lent.",
    ContentsLost "contents_lost_total" "Publications that went with the process that lent them.",
    BackendErrors "backend_errors_total" "Calls that the kernel or the driver refused.",
    FramesBad "frames_bad_total" "Frames that cost their sender the session.",
    NotAllowed "not_allowed_total" "Requests that the grant did not allow.",
    DeadlinesPassed "deadlines_passed_total" "Connections that stalled in a frame or a reply.",
}

/// The counters of one pool.
#[derive(Debug, Default)]
pub struct Stats {
    counts: [AtomicU64; COUNTERS],
}

impl Stats {
    /// Counts one.
    pub fn count(&self, counter: Counter) {
        // One thread writes; readers need no order with anything else.
        self.counts[counter as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many so far.
    pub fn get(&self, counter: Counter) -> u64 {
        self.counts[counter as usize].load(Ordering::Relaxed)
    }
}
