"""KV routing between stock workers that tell of their caches, our router, and a stock KV router."""

import base64
import json
import struct
import sys
from pathlib import Path

import pytest

from events_lab import Broker, channel, ours
from lab import corelane_peer, metric_sum, wait_for
from store import MODEL_CARDS, Nats, card

HERE = Path(__file__).resolve().parent
PATIENCE_S = 120
BLOCK_TOKENS = 4
CACHED = list(range(1, 33))
PROMPT = [*CACHED, 70, 71, 72, 73]

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def nats(tmp_path_factory):
    """A NATS server for these tests."""
    server = Nats(tmp_path_factory.mktemp("nats"))
    yield server
    server.stop()


def stock(lab, role, endpoint, tokens, *options, **env):
    """A stock worker with these tokens in its cache, or a stock KV router that asks for them."""
    command = [
        sys.executable, HERE / "stock_kv.py", "--role", role, "--endpoint", endpoint,
        "--tokens", json.dumps(tokens), "--block-tokens", str(BLOCK_TOKENS), *options,
    ]  # fmt: skip
    return lab.start(role, command, lab.env(**env))


def workers(lab, endpoint, *options, **env):
    """One with the prompt in its cache, and two without; their names and ids."""
    caches = [CACHED, [], [900, *CACHED]]
    started = [stock(lab, "worker", endpoint, tokens, *options, **env) for tokens in caches]
    return [lab.ready(worker) for worker in started]


def count(lab, router, name):
    """One of the router's numbers, all cores added up."""
    return metric_sum(lab.metrics(router), rf"^corelane_{name}\{{")


def informed(lab, listen, backend, holders, env):
    """Our router, once it knows of this many caches with the prompt in them; blocks that its cores
    know then."""
    router = lab.router(
        listen, backend, env=env, policy="kv", block_tokens=BLOCK_TOKENS, kv_body_bytes_max=4096,
        kv_prefill_scale_pct=10_000,
    )  # fmt: skip
    cores = metric_sum(lab.metrics(router), r"^corelane_ring_info\{")
    blocks = holders * len(CACHED) // BLOCK_TOKENS * cores
    known = lambda: count(lab, router, "kv_blocks") == blocks  # noqa: E731
    wait_for("every core knows all blocks", known, PATIENCE_S)
    return router, blocks


def recovered(lab, router, workers):
    """All workers have answered: who has nothing in its cache is waited for by nobody else."""
    have = lambda: count(lab, router, "feed_kv_recovered_total") == workers  # noqa: E731
    wait_for("all workers have answered", have, PATIENCE_S)


def routed(lab, *options, **env):
    """Requests through our router, which hears the workers' events over `env`'s transport."""
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    holder, *_ = workers(lab, backend, *options, **env)
    router, blocks = informed(lab, listen, backend, 2, env)
    tokens = base64.b64encode(struct.pack(f"<{len(PROMPT)}I", *PROMPT)).decode()
    for options in [
        ("--header", f"x-corelane-token-ids={tokens}", "--body", "{}"),
        ("--body", json.dumps({"token_ids": PROMPT})),
    ]:
        for _ in range(4):
            status, call = lab.call(listen, *options)
            assert status == 0 and holder.hex in call.out(), call.log()
    assert count(lab, router, "kv_hits_total") == count(lab, router, "kv_lookups_total") == 8
    assert count(lab, router, "kv_prompt_blocks_total") == 8 * len(PROMPT) // BLOCK_TOKENS
    assert count(lab, router, "kv_overlap_blocks_total") == 8 * len(CACHED) // BLOCK_TOKENS
    assert count(lab, router, "feed_kv_lost_total") == 0
    holder.kill()
    lab.etcd.revoke(holder.instance)
    wait_for("its blocks are gone", lambda: count(lab, router, "kv_blocks") < blocks, PATIENCE_S)
    return router


def test_our_router_follows_events_over_nats(lab, nats):
    routed(lab, DYN_EVENT_PLANE="nats", NATS_SERVER=nats.url)


def test_our_router_follows_events_over_zmq(lab):
    routed(lab, DYN_EVENT_PLANE="zmq")


def test_our_router_asks_workers_for_what_they_published_before(lab):
    """The workers say once what they have, when nobody listens yet, and keep it to be asked."""
    router = routed(lab, "--once", "--keeps", DYN_EVENT_PLANE="zmq")
    recovered(lab, router, 3)
    assert count(lab, router, "feed_kv_asked_total") == 3
    assert count(lab, router, "feed_kv_unanswered_total") == 0


def test_our_router_asks_workers_over_nats(lab, nats):
    env = {"DYN_EVENT_PLANE": "nats", "NATS_SERVER": nats.url}
    recovered(lab, routed(lab, "--once", "--keeps", **env), 3)


def cards(lab, backend, started):
    """The model cards without which a stock KV router knows of no worker: their ranks and limits
    are in them."""
    for worker in started:
        record = card(backend, worker, kv_cache_block_size=BLOCK_TOKENS)
        lab.etcd.put(f"{MODEL_CARDS}/{backend}/{worker:x}", record)


def chosen(router):
    """Waits for a choice of the stock KV router by overlap."""

    def best():
        assert router.alive(), router.tail()
        found = [event for event in router.events("best") if event["overlap"] > 0]
        return found and found[-1]

    return wait_for("a choice by overlap", best, PATIENCE_S)


def test_a_stock_kv_router_uses_events_that_passed_our_broker(lab):
    broker = Broker(lab)
    backend = lab.endpoint("backend")
    env = {"DYN_EVENT_PLANE": "zmq", "DYN_ZMQ_BROKER_ENABLED": "1"}
    started = workers(lab, backend, **env)
    cards(lab, backend, [worker.instance for worker in started])
    router = stock(lab, "router", backend, PROMPT, **env)
    found = chosen(router)
    assert found["worker"] == started[0].instance, found
    assert found["overlap"] == len(CACHED) // BLOCK_TOKENS
    assert broker.count("received_total") > 0 and broker.count("bad_total") == 0
    # Whoever keeps nothing to be asked for is heard through the broker or not at all.
    wait_for("the broker has sent", lambda: broker.count("sent_total") > 0, PATIENCE_S)


# Dynamo's hashes of the blocks [1, 2, 3, 4] and [5, 6, 7, 8].
HASHES = [14643705804678351452, 16777012769546811212]


def test_a_stock_kv_router_uses_events_of_our_publisher(lab):
    """spec/events-discovery.md §3.9, row 1: from publisher to subscriber, with both records."""
    backend = lab.endpoint("backend")
    # That nobody answers there is of no interest to the choice.
    idle, holder = lab.etcd.register(backend, 9), lab.etcd.register(backend, 9)
    cards(lab, backend, [idle, holder])
    blocks = [
        {"block_hash": 1001 + at, "tokens_hash": tokens, "mm_extra_info": None}
        for at, tokens in enumerate(HASHES)
    ]
    stored = {"parent_hash": None, "start_position": None, "blocks": blocks}
    event = {
        "worker_id": holder, "storage_tier": "device", "residency_domain": "worker",
        "event": {"event_id": 1, "data": {"stored": stored}, "dp_rank": 0},
    }  # fmt: skip
    # Until the end, so that whoever comes late hears it: a publisher that goes takes what it has
    # said with it.
    ours(
        lab, "publish", "--worker-id", str(holder), "--body", json.dumps([event]),
        "--count", 1_000_000, "--interval-ms", 100, "--wait-s", 300, topic="kv-events",
    )  # fmt: skip
    wait_for("its channel record", lambda: channel(lab, "kv-events"), PATIENCE_S)
    found = chosen(stock(lab, "router", backend, PROMPT, DYN_EVENT_PLANE="zmq"))
    assert (found["worker"], found["overlap"]) == (holder, len(HASHES))


def test_routers_ask_our_worker_for_what_it_published_before(lab):
    """A worker on the component API says once what it has, when nobody listens yet: a stock KV
    router learns it all the same, and so does ours."""
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    env = {"DYN_EVENT_PLANE": "zmq"}
    component = backend.rsplit("/", 1)[0]
    caches = [[], CACHED]
    started = []
    for tokens in caches:
        command = [corelane_peer(), "kv", component, str(BLOCK_TOKENS), json.dumps(tokens)]
        started.append(lab.ready(lab.start("kv-worker", command, lab.env(**env))))
    _, holder = started
    cards(lab, backend, [worker.instance for worker in started])
    found = chosen(stock(lab, "router", backend, PROMPT, **env))
    assert (found["worker"], found["overlap"]) == (holder.instance, len(CACHED) // BLOCK_TOKENS)
    router, _ = informed(lab, listen, backend, 1, env)
    for _ in range(4):
        status, call = lab.call(listen, "--body", json.dumps({"token_ids": PROMPT}))
        assert status == 0 and holder.hex in call.out(), call.log()
    recovered(lab, router, 2)
