//! The real shard on a simulated network: seeded scenarios in which callers, workers and the
//! network do their worst, and what must hold all the same.
//!
//! A failure names its seed; `CORELANE_SEED=<seed> cargo test -p corelane-engine --test simulation`
//! plays that scenario alone, step for step the same.

#![allow(missing_docs, unreachable_pub)]

mod common;

#[path = "simulation/book.rs"]
mod book;
#[path = "simulation/caller.rs"]
mod caller;
#[path = "simulation/dice.rs"]
mod dice;
#[path = "simulation/home.rs"]
mod home;
#[path = "simulation/scenario.rs"]
mod scenario;
#[path = "simulation/worker.rs"]
mod worker;

use std::panic::{AssertUnwindSafe, catch_unwind};

/// The scenarios of one test, or the one that the environment names.
fn play_all(seeds: std::ops::Range<u64>) {
    // Big tables of thousands of shards: their untouched pages must stay untouched.
    // SAFETY: sets a number of the allocator.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10) };
    if let Ok(seed) = std::env::var("CORELANE_SEED") {
        return scenario::run(seed.parse().expect("CORELANE_SEED is a number"));
    }
    let ends_badly = |seed: &u64| catch_unwind(AssertUnwindSafe(|| scenario::run(*seed))).is_err();
    // Some failures say more than one; all say no more than some.
    let failed: Vec<u64> = seeds.filter(ends_badly).take(FAILURES_MAX).collect();
    assert!(
        failed.is_empty(),
        "replay with CORELANE_SEED= one of {failed:?}"
    );
}

const FAILURES_MAX: usize = 10;

#[test]
fn scenarios_of_even_seeds_end_well() {
    play_all(0..1000);
}

#[test]
fn scenarios_of_odd_seeds_end_well() {
    play_all(1000..2000);
}
