//! `corelane-bench kv`: what it costs to find which of 64 workers have a prompt in their KV cache,
//! and to take a block over that one has stored.

use std::cell::RefCell;
use std::hint::black_box;
use std::time::Instant;

use corelane_engine::kv::{Index, RankId, Stored};
use serde::Serialize;

use crate::instructions;

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
    /// Print JSON
    #[arg(long)]
    json: bool,
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
    ns_per_lookup: f64,
    ns_per_block_stored: f64,
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

fn row(args: &KvArgs, blocks: usize) -> Row {
    let (mut index, prompts, ns_per_block_stored) = filled(args, blocks);
    let lookups = args.lookups.max(1);
    let (mut ns_per_lookup, mut overlap) = (f64::INFINITY, 0.0);
    for _ in 0..args.rounds.max(1) {
        let mut found = 0;
        let begin = Instant::now();
        for lookup in 0..lookups {
            // Neighbours are not looked up one after the other: they share cache lines.
            let prompt = &prompts[lookup.wrapping_mul(7919) % prompts.len()];
            found += u64::from(best(&mut index, prompt));
        }
        let ns = begin.elapsed().as_nanos() as f64 / lookups as f64;
        ns_per_lookup = ns_per_lookup.min(ns);
        overlap = found as f64 / lookups as f64;
    }
    let (blocks, nodes) = (index.blocks(), index.nodes());
    let index = RefCell::new(index);
    let prompt = &prompts[prompts.len() / 2];
    let once = || {
        black_box(best(&mut index.borrow_mut(), prompt));
    };
    Row {
        blocks,
        nodes,
        overlap,
        instructions_per_lookup: instructions::count(once).ok(),
        ns_per_lookup,
        ns_per_block_stored,
    }
}

/// Runs the bench.
///
/// # Errors
/// The report cannot be made.
pub(crate) fn run(args: &KvArgs) -> anyhow::Result<()> {
    let rows: Vec<Row> = args
        .blocks
        .iter()
        .map(|blocks| row(args, *blocks))
        .collect();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    println!(
        "{:>9} {:>9} {:>8} {:>13} {:>10} {:>10}",
        "blocks", "nodes", "overlap", "instr/lookup", "ns/lookup", "ns/stored"
    );
    for row in rows {
        let counted = row.instructions_per_lookup;
        let counted = counted.map_or("?".into(), |count| format!("{count:.0}"));
        println!(
            "{:>9} {:>9} {:>8.1} {counted:>13} {:>10.0} {:>10.0}",
            row.blocks, row.nodes, row.overlap, row.ns_per_lookup, row.ns_per_block_stored
        );
    }
    Ok(())
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
            json: true,
        };
        let row = row(&args, 2_000);
        assert_eq!(row.overlap, 16.0);
        assert!(row.blocks > 1_500 && row.nodes < row.blocks, "{row:?}");
    }
}
