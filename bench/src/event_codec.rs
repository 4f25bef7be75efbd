//! `corelane-bench event-codec`: reading an event in place beside reading it with `rmp-serde`, in
//! instructions and in nanoseconds.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Context;
use corelane_codec::event::{Envelope, KvChange, KvEvents, frame, multipart, topic, typed};
use corelane_codec::fuzz::Derived;
use serde::Serialize;
use serde_json::json;

use crate::hiccup::HiccupMeter;
use crate::instructions;
use crate::output::{OutputArgs, Told};
use crate::report::{Quantiles, Table, figure, host, now_utc, round};

/// Bytes of frame and envelope in the first row.
const EVENT_BYTES: usize = 200;

#[derive(clap::Args)]
pub(crate) struct EventCodecArgs {
    /// Rounds of each reader, in turns; the best one counts
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Events read in a round
    #[arg(long, default_value_t = 200_000)]
    events: u32,
    /// Do not count instructions, one by one, which takes its time on a busy machine
    #[arg(long)]
    no_instructions: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// One way of reading one event.
#[derive(Debug, Serialize)]
struct Row {
    arm: &'static str,
    /// None where ptrace is forbidden.
    instructions: Option<f64>,
    ns: f64,
}

/// One event, and all ways of reading it.
#[derive(Debug, Serialize)]
struct Group {
    group: String,
    bytes: usize,
    hiccup_us: Quantiles,
    arms: Vec<Row>,
}

/// A frame of exactly so many bytes.
fn frame_of(bytes: usize, topic: &str) -> anyhow::Result<Vec<u8>> {
    let write = |payload: &[u8]| -> anyhow::Result<Vec<u8>> {
        let mut out = vec![];
        let envelope = Envelope {
            publisher_id: 0x0007_6351_4149_a9fb,
            sequence: 70_000,
            published_at_ms: 1_795_289_986_740,
            topic,
            payload,
        };
        multipart::write_frame(&envelope, &mut out)?;
        Ok(out)
    };
    let least = write(&[])?.len();
    let payload_bytes = bytes.checked_sub(least).context("too few bytes")?;
    write(&vec![7; payload_bytes])
}

/// A message about `blocks` blocks that were stored.
fn stored(blocks: u64) -> anyhow::Result<Vec<u8>> {
    let blocks = (0..blocks).map(|block| typed::KvBlock {
        block_hash: block.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        tokens_hash: block.wrapping_mul(0xc2b2_ae3d_27d4_eb4f),
        mm_extra_info: None,
    });
    let change = typed::KvChange::Stored {
        parent_hash: Some(u64::MAX / 3),
        start_position: None,
        blocks: blocks.collect(),
    };
    let worker = corelane_codec::event::KvWorker {
        worker_id: 0x7d7b_a1ff_9b37_7a25,
        dp_rank: 0,
    };
    let event = typed::KvEvent::new(worker, 9, change);
    Ok(typed::to_payload(&vec![event])?)
}

fn in_place(message: &[u8]) {
    let envelope = frame::payload(black_box(message)).map(Envelope::decode);
    let _ = black_box(envelope);
}

fn derived(message: &[u8]) {
    // The frame is read alike: only the envelopes are compared.
    let Ok(envelope) = frame::payload(black_box(message)) else {
        return;
    };
    if let Ok(read) = rmp_serde::from_slice::<Derived<'_>>(envelope) {
        black_box((read.publisher_id, read.sequence, read.published_at));
        black_box((read.topic, read.payload));
    }
}

fn blocks_in_place(payload: &[u8]) {
    let Ok(mut events) = KvEvents::open(black_box(payload)) else {
        return;
    };
    while let Ok(Some(event)) = events.next_event() {
        if let KvChange::Stored { mut blocks, .. } = event.change {
            while let Ok(Some(block)) = blocks.next_block() {
                black_box(block);
            }
        }
    }
}

fn blocks_derived(payload: &[u8]) {
    let _ = black_box(typed::from_payload::<Vec<typed::KvEvent>>(black_box(
        payload,
    )));
}

type Reader = (&'static str, fn(&[u8]));

/// Nanoseconds of one call, the best round of each reader; readers take turns.
fn nanoseconds(args: &EventCodecArgs, input: &[u8], readers: &[Reader]) -> Vec<f64> {
    let mut best = vec![f64::INFINITY; readers.len()];
    for _ in 0..args.rounds.max(1) {
        for (best, (_, read)) in best.iter_mut().zip(readers) {
            let begin = Instant::now();
            for _ in 0..args.events.max(1) {
                read(input);
            }
            let ns = begin.elapsed().as_nanos() as f64 / f64::from(args.events.max(1));
            *best = best.min(ns);
        }
    }
    best
}

fn group(
    args: &EventCodecArgs,
    what: &str,
    input: &[u8],
    readers: &[Reader],
    may_allocate: bool,
) -> anyhow::Result<Group> {
    // It ends here: instructions are counted in a fork, which wants no other thread.
    let hiccup = HiccupMeter::start()?;
    let ns = nanoseconds(args, input, readers);
    let hiccup_us = Quantiles::of_ns(&hiccup.take());
    drop(hiccup);
    let counts = !args.no_instructions && (!may_allocate || !cfg!(test));
    let rows = readers.iter().zip(ns).map(|((reader, read), ns)| Row {
        arm: reader,
        // What allocates must not be counted in a forked child of a process with threads; this
        // one has none.
        instructions: (counts && !reader.ends_with("-again"))
            .then(|| instructions::count(|| read(input)).ok())
            .flatten(),
        ns: round(ns),
    });
    Ok(Group {
        group: format!("{what}, {} bytes", input.len()),
        bytes: input.len(),
        hiccup_us,
        arms: rows.collect(),
    })
}

/// Runs the bench.
///
/// # Errors
/// The events cannot be made.
pub(crate) fn run(args: &EventCodecArgs) -> anyhow::Result<()> {
    args.output.check()?;
    // The last is the first once more: what it differs by is noise.
    let envelopes: [Reader; 3] = [
        ("in place", in_place),
        ("rmp-serde", derived),
        ("in place-again", in_place),
    ];
    let blocks: [Reader; 3] = [
        ("in place", blocks_in_place),
        ("rmp-serde", blocks_derived),
        ("in place-again", blocks_in_place),
    ];
    let mut groups = vec![];
    for bytes in [EVENT_BYTES, 4096] {
        let message = frame_of(bytes, topic::KV_EVENTS)?;
        groups.push(group(
            args,
            "frame and envelope",
            &message,
            &envelopes,
            false,
        )?);
    }
    let payload = stored(16)?;
    groups.push(group(args, "16 blocks stored", &payload, &blocks, true)?);
    let mut table = Table::new(&["what", "reader", "instructions", "ns"]);
    for group in &groups {
        for row in &group.arms {
            let counted = row.instructions.map_or("?".into(), figure);
            let ns = format!("{:.1}", row.ns);
            table.row(vec![group.group.clone(), row.arm.into(), counted, ns]);
        }
    }
    let tables = table.text();
    args.output.print_table(&tables)?;
    let report = json!({
        "schema": "corelane-bench/event-codec/1",
        "when": now_utc(),
        "host": host(),
        "settings": {"rounds": args.rounds, "events": args.events},
        "groups": groups,
    });
    args.output.finish(&Told {
        kind: "event-codec",
        report: &report,
        tables: &tables,
        panels: &[],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bar: at least five times fewer instructions than the derived reader. They are counted,
    /// not timed, so nothing else on the machine matters.
    #[test]
    fn reading_in_place_takes_a_fifth_of_the_instructions() {
        let message = frame_of(EVENT_BYTES, topic::KV_EVENTS).expect("it fits");
        assert_eq!(message.len(), EVENT_BYTES);
        let Ok(ours) = instructions::count(|| in_place(&message)) else {
            return;
        };
        let theirs = instructions::count(|| derived(&message)).expect("it has just worked");
        println!("in place {ours}, rmp-serde {theirs}");
        if !cfg!(debug_assertions) {
            assert!(theirs >= 5.0 * ours, "in place {ours}, rmp-serde {theirs}");
        }
        assert!(ours > 0.0 && theirs > 2.0 * ours, "{ours} {theirs}");
    }

    #[test]
    fn both_readers_of_blocks_read_them_all() {
        let payload = stored(16).expect("numbers");
        let events: Vec<typed::KvEvent> = typed::from_payload(&payload).expect("just written");
        assert_eq!(events.len(), 1);
        let mut events = KvEvents::open(&payload).expect("just written");
        let event = events.next_event().expect("one").expect("one");
        let KvChange::Stored { blocks, .. } = event.change else {
            panic!("stored");
        };
        assert_eq!(blocks.left(), 16);
    }
}
