//! `corelane-bench kv`: what it costs to find which of 64 workers have a prompt in their KV cache,
//! and to take a block over that one has stored.

use std::cell::RefCell;
use std::hint::black_box;
use std::time::Instant;

use corelane_engine::kv::{Index, RankId, Stored};
use serde::Serialize;
use serde_json::json;

use crate::hiccup::HiccupMeter;
use crate::instructions;
use crate::output::{OutputArgs, Told};
use crate::report::{Quantiles, Table, figure, host, now_utc, round};

#[derive(clap::Args)]
pub(crate) struct KvArgs {
    /// Blocks in the index, each counted for every worker that holds it
    #[arg(long, value_delimiter = ',', default_values_t = [10_000, 1_000_000])]
    blocks: Vec<usize>,
    /// Workers
    #[arg(long, default_value_t = 64)]
    workers: u64,
    /// Blocks of a prompt
    #[arg(long, default_value_t = 64)]
    prompt_blocks: usize,
    /// Lookups in a round
    #[arg(long, default_value_t = 100_000)]
    lookups: usize,
    /// Rounds; the best one counts
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Do not count instructions, one by one, which takes its time on a busy machine
    #[arg(long)]
    no_instructions: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// One size of the index.
#[derive(Debug, Serialize)]
struct Row {
    blocks: usize,
    nodes: usize,
    /// Blocks of the prompt that the best worker had, in the mean.
    overlap: f64,
    /// None where ptrace is forbidden.
    instructions_per_lookup: Option<f64>,
    ns_per_block_stored: f64,
    hiccup_us: Quantiles,
    /// The index, and the index once more: what the second differs by is noise.
    arms: [Arm; 2],
}

/// The lookups of all rounds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Arm {
    arm: &'static str,
    ns_per_lookup: f64,
}

/// The hash of a block, as good as random.
fn hash(sequence: u64, block: usize) -> u64 {
    corelane_engine::kv::mix((sequence << 20) | block as u64)
}

/// Prompts with a common beginning and an end of their own, each in the caches of four workers, one
/// of which has all of it.
fn filled(args: &KvArgs, blocks: usize) -> (Index, Vec<Vec<u64>>, f64) {
    const HOLDERS: u64 = 4;
    let whole = args.prompt_blocks.max(2);
    let of_one = whole + 3 * (whole / 2);
    let sequences = (blocks / of_one).max(1) as u64;
    let mut index = Index::new(2 * blocks + of_one, args.workers as usize);
    let mut prompts = Vec::new();
    let mut stored = 0;
    let begin = Instant::now();
    for sequence in 0..sequences {
        let common = (sequence / 16) | (1 << 40);
        let block = |at: usize| match at < whole / 4 {
            true => hash(common, at),
            false => hash(sequence, at),
        };
        let prompt: Vec<u64> = (0..whole).map(block).collect();
        for holder in 0..HOLDERS {
            let worker_id = (sequence * HOLDERS + holder) % args.workers;
            let held = if holder == 0 { whole } else { whole / 2 };
            let name = |tokens: &u64| Stored {
                block: tokens.rotate_left(7),
                tokens: *tokens,
            };
            let blocks: Vec<Stored> = prompt[..held].iter().map(name).collect();
            let rank = RankId {
                worker_id,
                dp_rank: 0,
            };
            index.stored(rank, None, &blocks);
            stored += held;
        }
        prompts.push(prompt);
    }
    let ns = begin.elapsed().as_nanos() as f64 / stored as f64;
    (index, prompts, ns)
}

fn best(index: &mut Index, prompt: &[u64]) -> u32 {
    let overlaps = index.overlaps(black_box(prompt)).iter();
    overlaps.map(|one| one.blocks).max().unwrap_or(0)
}

fn row(args: &KvArgs, blocks: usize) -> anyhow::Result<Row> {
    let (mut index, prompts, ns_per_block_stored) = filled(args, blocks);
    let hiccup = HiccupMeter::start()?;
    let mut arms = ["index", "index-again"].map(|arm| Arm {
        arm,
        ns_per_lookup: f64::INFINITY,
    });
    let mut overlap = 0.0;
    for _ in 0..args.rounds.max(1) {
        for arm in &mut arms {
            let (ns, found) = lookups(args, &mut index, &prompts);
            arm.ns_per_lookup = arm.ns_per_lookup.min(round(ns));
            overlap = found;
        }
    }
    let hiccup_us = Quantiles::of_ns(&hiccup.take());
    // Instructions are counted in a fork, which wants no other thread.
    drop(hiccup);
    let (blocks, nodes) = (index.blocks(), index.nodes());
    let index = RefCell::new(index);
    let prompt = &prompts[prompts.len() / 2];
    let once = || {
        black_box(best(&mut index.borrow_mut(), prompt));
    };
    Ok(Row {
        blocks,
        nodes,
        overlap,
        instructions_per_lookup: (!args.no_instructions)
            .then(|| instructions::count(once).ok())
            .flatten(),
        ns_per_block_stored: round(ns_per_block_stored),
        hiccup_us,
        arms,
    })
}

/// Nanoseconds of a lookup, and the overlap, both in the mean.
fn lookups(args: &KvArgs, index: &mut Index, prompts: &[Vec<u64>]) -> (f64, f64) {
    let (lookups, mut found) = (args.lookups.max(1), 0);
    let begin = Instant::now();
    for lookup in 0..lookups {
        // Neighbours are not looked up one after the other: they share cache lines.
        let prompt = &prompts[lookup.wrapping_mul(7919) % prompts.len()];
        found += u64::from(best(index, prompt));
    }
    let ns = begin.elapsed().as_nanos() as f64 / lookups as f64;
    (ns, found as f64 / lookups as f64)
}

/// Runs the bench.
///
/// # Errors
/// The report cannot be made.
pub(crate) fn run(args: &KvArgs) -> anyhow::Result<()> {
    args.output.check()?;
    let rows = args.blocks.iter().map(|blocks| row(args, *blocks));
    let rows = rows.collect::<anyhow::Result<Vec<Row>>>()?;
    let mut table = Table::new(&[
        "blocks",
        "nodes",
        "overlap",
        "instructions/lookup",
        "ns/lookup",
        "again (noise)",
        "ns/stored",
    ]);
    for row in &rows {
        let counted = row.instructions_per_lookup;
        table.row(vec![
            row.blocks.to_string(),
            row.nodes.to_string(),
            format!("{:.1}", row.overlap),
            counted.map_or("?".into(), figure),
            figure(row.arms[0].ns_per_lookup),
            figure(row.arms[1].ns_per_lookup),
            figure(row.ns_per_block_stored),
        ]);
    }
    let tables = table.text();
    args.output.print_table(&tables)?;
    let report = json!({
        "schema": "corelane-bench/kv/1",
        "when": now_utc(),
        "host": host(),
        "settings": {
            "workers": args.workers, "prompt_blocks": args.prompt_blocks,
            "lookups": args.lookups, "rounds": args.rounds,
        },
        "groups": rows,
    });
    args.output.finish(&Told {
        kind: "kv",
        report: &report,
        tables: &tables,
        panels: &[],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_found_whole() {
        let args = KvArgs {
            blocks: vec![2_000],
            workers: 64,
            prompt_blocks: 16,
            lookups: 100,
            rounds: 1,
            no_instructions: false,
            output: OutputArgs::default(),
        };
        let row = row(&args, 2_000).unwrap();
        assert_eq!(row.overlap, 16.0);
        assert!(row.blocks > 1_500 && row.nodes < row.blocks, "{row:?}");
    }
}
