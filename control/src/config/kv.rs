//! Keys of a route about what its workers say of themselves: KV caches and load.

use super::keys;
use super::layers::{Layers, Of};
use super::routes::{idle, typed};
use super::words::{LoadSource, Policy, Response};

/// The index of a route with the policy `kv`, and its costs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RouteKv {
    /// Bytes of a body that are looked into; 0: none.
    pub body_bytes_max: u32,
    /// Blocks of the index.
    pub blocks_max: u32,
    /// Ranks of the index.
    pub ranks_max: u32,
    /// Percent that a cached block is worth.
    pub overlap_credit_pct: u32,
    /// Percent that a block to be computed costs.
    pub prefill_scale_pct: u32,
    /// Percent; 0 is no chance.
    pub temperature_pct: u32,
}

/// What the load of a route's instances is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RouteLoad {
    /// Whom to believe.
    pub source: LoadSource,
    /// For how long.
    pub stale_ms: u32,
    /// Blocks of a request whose prompt is not known.
    pub request_blocks: u32,
}

impl Default for RouteLoad {
    fn default() -> Self {
        Self {
            source: LoadSource::Own,
            stale_ms: 5_000,
            request_blocks: 32,
        }
    }
}

/// The keys of the policy `kv`, which nobody else reads.
pub(super) fn kv(layers: &mut Layers, index: usize, policy: Policy) -> Option<RouteKv> {
    let of = Of::Item(index);
    let kv = RouteKv {
        body_bytes_max: layers.int(&keys::ROUTE_KV_BODY_BYTES_MAX, of),
        blocks_max: layers.int(&keys::ROUTE_KV_BLOCKS_MAX, of),
        ranks_max: layers.int(&keys::ROUTE_KV_RANKS_MAX, of),
        overlap_credit_pct: layers.int(&keys::ROUTE_KV_OVERLAP_CREDIT_PCT, of),
        prefill_scale_pct: layers.int(&keys::ROUTE_KV_PREFILL_SCALE_PCT, of),
        temperature_pct: layers.int(&keys::ROUTE_KV_TEMPERATURE_PCT, of),
    };
    if policy != Policy::Kv {
        let keys = [
            (&keys::ROUTE_KV_BODY_BYTES_MAX, kv.body_bytes_max),
            (&keys::ROUTE_KV_BLOCKS_MAX, kv.blocks_max),
            (&keys::ROUTE_KV_RANKS_MAX, kv.ranks_max),
            (&keys::ROUTE_KV_OVERLAP_CREDIT_PCT, kv.overlap_credit_pct),
            (&keys::ROUTE_KV_PREFILL_SCALE_PCT, kv.prefill_scale_pct),
            (&keys::ROUTE_KV_TEMPERATURE_PCT, kv.temperature_pct),
        ];
        let why = format!("policy = \"{policy}\"");
        let instead = "write policy = \"kv\", or take it out";
        for (key, value) in keys {
            idle(layers, (index, key), &value.to_string(), &why, instead);
        }
        return None;
    }
    if let Some(at) = typed(layers, index, &keys::ROUTE_LANE) {
        let what = "policy = \"kv\" does not go with a lane: its workers publish no KV events";
        let instead = "write policy = \"least_loaded\", or take lane out";
        layers.error(&at, what.to_owned(), instead);
    }
    Some(kv)
}

/// The keys about load.
pub(super) fn load(
    layers: &mut Layers,
    index: usize,
    policy: Policy,
    response: Response,
) -> RouteLoad {
    let of = Of::Item(index);
    let load = RouteLoad {
        source: layers.word_of(&keys::ROUTE_LOAD, of, LoadSource::parse, LoadSource::Own),
        stale_ms: layers.int(&keys::ROUTE_LOAD_STALE_MS, of),
        request_blocks: layers.int(&keys::ROUTE_LOAD_REQUEST_BLOCKS, of),
    };
    if load.source == LoadSource::Own {
        let instead = "write load = \"forward_pass\" or \"kv_metrics\", or take it out";
        let (place, value) = ((index, &keys::ROUTE_LOAD_STALE_MS), load.stale_ms);
        idle(layers, place, &value.to_string(), "load = \"own\"", instead);
        return load;
    }
    let by_load = matches!(
        policy,
        Policy::LeastLoaded | Policy::PowerOfTwoChoices | Policy::Kv
    );
    let (place, value) = ((index, &keys::ROUTE_LOAD), load.source.as_str());
    if !by_load {
        let why = format!("policy = \"{policy}\"");
        let instead = "write policy = \"least_loaded\", or take it out";
        idle(layers, place, value, &why, instead);
    } else if response == Response::Relay {
        let instead = "take it out: where responses pass through, load is known exactly";
        idle(layers, place, value, "response = \"relay\"", instead);
    }
    load
}
