//! What the bytes of a request say of its prompt: when it comes, and once more from what is held of
//! it when it is tried again.

use corelane_codec::limits::TWO_PART_PREFIX_BYTES;
use corelane_codec::request_frame::Prefix;
use corelane_codec::{Decoded, two_part};

use super::{Prompt, Source};
use crate::directory::KvRule;
use crate::in_flight::Request;
use crate::ring::Ring;
use crate::shard::Shard;
use crate::table::NONE;

/// A frame of `route` is about to become a request: what do its headers say of its prompt?
pub(crate) fn read_headers<R: Ring>(shard: &mut Shard<R>, slot: u32, prefix: &Prefix, route: u32) {
    let Some(rule) = shard.directory.routes[route as usize].kv else {
        return;
    };
    let incoming = shard.connections[slot].incoming;
    let scratch = &mut shard.scratch;
    let front = shard.pieces.lay_out(&incoming, prefix.headers.end, scratch);
    let headers = front.get(prefix.headers.clone()).unwrap_or_default();
    shard.kv.prompt.read_headers(headers, rule.block_tokens);
}

/// The request stands in the table and is about to be placed: its body may say what its headers do
/// not.
pub(crate) fn read_body<R: Ring>(shard: &mut Shard<R>, request: u32) {
    let entry = &shard.requests[request];
    let Some(rule) = shard.directory.routes[entry.route as usize].kv else {
        return;
    };
    let mut prompt = std::mem::take(&mut shard.kv.prompt);
    look_into(shard, &shard.requests[request], rule, &mut prompt);
    let stats = &shard.stats.shard;
    match prompt.source() {
        Source::Nothing => stats.kv_prompts_unknown.add(1),
        Source::Unreadable => stats.kv_prompts_unreadable.add(1),
        Source::Headers | Source::Body => {}
    }
    shard.kv.prompt = prompt;
    shard.kv.request = request;
}

/// The request is tried again, and others have come since: its prompt is read once more.
pub(super) fn read_again<R: Ring>(shard: &mut Shard<R>, request: u32, rule: KvRule) {
    let mut prompt = std::mem::take(&mut shard.kv.prompt);
    let mut headers = std::mem::take(&mut shard.kv.headers);
    prompt.clear();
    let entry = &shard.requests[request];
    // What has been sent and dropped is not tried again.
    if let Some(bytes) = header_bytes(shard, entry).filter(|_| entry.dropped_bytes == 0) {
        headers.resize(bytes, 0);
        if copy_out(shard, entry, 2, &mut headers) == bytes {
            prompt.read_headers(&headers, rule.block_tokens);
        }
        look_into(shard, entry, rule, &mut prompt);
    }
    shard.kv.headers = headers;
    shard.kv.prompt = prompt;
    // Whoever is being placed reads his own again.
    shard.kv.request = NONE;
}

/// Reads the prompt out of the body, where the route wants that and the headers say nothing.
fn look_into<R: Ring>(shard: &Shard<R>, entry: &Request, rule: KvRule, prompt: &mut Prompt) {
    if rule.body_bytes_max == 0 || prompt.source() != Source::Nothing {
        return;
    }
    let mut skip = body_offset(shard, entry);
    let pieces = image(shard, entry).map(|bytes| {
        let from = skip.min(bytes.len());
        skip -= from;
        &bytes[from..]
    });
    prompt.read_body(pieces, rule.body_bytes_max as usize, rule.block_tokens);
}

/// All that is held of a request: `u16 H, headers, u32 N, payload`, of which the front may be of
/// our own making.
fn image<'a, R: Ring>(
    shard: &'a Shard<R>,
    entry: &'a Request,
) -> impl Iterator<Item = &'a [u8]> + use<'a, R> {
    let front = shard.relays.heads.unsent(&entry.head);
    let pieces = shard.pieces.iter(&entry.frame);
    front.chain(pieces.map(|piece| shard.pieces.bytes_of(piece)))
}

/// Copies the bytes from `offset` on; answers how many were there to copy.
fn copy_out<R: Ring>(shard: &Shard<R>, entry: &Request, offset: usize, to: &mut [u8]) -> usize {
    let (mut skip, mut filled) = (offset, 0);
    for bytes in image(shard, entry) {
        let from = &bytes[skip.min(bytes.len())..];
        skip -= bytes.len() - from.len();
        let here = from.len().min(to.len() - filled);
        to[filled..filled + here].copy_from_slice(&from[..here]);
        filled += here;
        if filled == to.len() {
            break;
        }
    }
    filled
}

fn header_bytes<R: Ring>(shard: &Shard<R>, entry: &Request) -> Option<usize> {
    let mut bytes = [0; 2];
    let there = copy_out(shard, entry, 0, &mut bytes) == bytes.len();
    there.then(|| usize::from(u16::from_be_bytes(bytes)))
}

/// Where the body begins; beyond all that is there if the envelope is none.
fn body_offset<R: Ring>(shard: &Shard<R>, entry: &Request) -> usize {
    let Some(header_bytes) = header_bytes(shard, entry) else {
        return usize::MAX;
    };
    let begin = 2 + header_bytes + 4;
    let mut fixed = [0; TWO_PART_PREFIX_BYTES];
    copy_out(shard, entry, begin, &mut fixed);
    match two_part::decode_prefix(&fixed, None) {
        Decoded::Frame(message) => begin.saturating_add(message.header.end),
        _ => usize::MAX,
    }
}
