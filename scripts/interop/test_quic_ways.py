"""The QUIC response plane in every direction: stock and our own callers on stock and our own
workers, directly and through the router. The stock caller on our worker is in test_quic.py."""

import json
import signal

import pytest

from lab import metric_sum, wait_for

QUIC = {"DYN_RESPONSE_PLANE": "quic"}
CODECS = ["json", "msgpack"]
# How requests come to a worker; the last two name the router's `response`.
WAYS = ["straight", "direct", "relay"]


def endpoint_for(lab, way, start, router_env=(), settings=(), name="generate"):
    """Start workers with `start(endpoint)`, and what the way needs; (endpoint to call, router)."""
    backend = lab.endpoint("backend", name)
    start(backend)
    if way == "straight":
        return backend, None
    listen = lab.endpoint("router", name)
    env = {**QUIC, **dict(router_env)}
    router = lab.router(listen, backend, response=way, env=env, settings=settings)
    return listen, router


def nothing_left(lab, router):
    """Wait until the router has no response of anybody's left."""

    def empty():
        samples = lab.metrics(router)
        gauges = (r"relays\{", r"relay_heads\{", r"in_flight\{", r"quic_responses\{")
        return all(metric_sum(samples, rf"^corelane_{gauge}") == 0 for gauge in gauges)

    wait_for("nothing is left in the router", empty, 60)


def answers(process):
    """What `corelane call --json` has said at the end of each call."""
    lines = [json.loads(line) for line in process.out().splitlines()]
    return [line for line in lines if line["type"] == "end"]


@pytest.mark.short
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("way", WAYS)
def test_our_caller_on_stock_workers(lab, way, codec):
    options = ("--items", 128)
    listen, router = endpoint_for(
        lab, way, lambda at: lab.stock_worker(at, *options, codec=codec, **QUIC)
    )
    body = json.dumps({"text": "grüße"})
    found = ("--body", body, "--count", 100, "--concurrency", 16, "--json")
    status, call = lab.call(listen, *found, **QUIC)
    assert status == 0, call.tail()
    assert [(end["outcome"], end["items"]) for end in answers(call)] == [("ok", 128)] * 100
    if router:
        nothing_left(lab, router)
        begun = metric_sum(lab.metrics(router), r"quic_responses_begun_total\{side=\"caller\"")
        assert begun == (100 if way == "relay" else 0)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("way", ["direct", "relay"])
def test_stock_caller_on_stock_workers(lab, way, codec):
    listen, router = endpoint_for(
        lab, way, lambda at: lab.stock_worker(at, codec=codec, **QUIC)
    )
    for items, count in [(1, 500), (128, 50)]:
        options = ("--count", count, "--concurrency", 16, "--items", items, "--ask")
        found = lab.run_client(listen, *options, **QUIC)
        assert found["ok"] == count and found.lost() == 0, (found, router.tail())
    nothing_left(lab, router)


@pytest.mark.parametrize("way", ["straight", "relay"])
@pytest.mark.parametrize("items", [0, 128])
def test_our_caller_on_our_workers(lab, way, items):
    listen, router = endpoint_for(
        lab, way, lambda at: lab.echo_worker(at, "--items", items, **QUIC)
    )
    options = ("--body", '{"a":1}', "--count", 200, "--concurrency", 16, "--json")
    status, call = lab.call(listen, *options, **QUIC)
    assert status == 0, call.tail()
    assert {(end["outcome"], end["items"]) for end in answers(call)} == {("ok", items)}
    if router:
        nothing_left(lab, router)


def test_stock_caller_through_the_relay_on_our_workers(lab):
    listen, router = endpoint_for(
        lab, "relay", lambda at: lab.echo_worker(at, "--items", 2, **QUIC)
    )
    options = ("--concurrency", 8, "--items", 2, "--plain-echo")
    for body_bytes, count in [(32, 500), (200_000, 8)]:
        more = ("--count", count, "--body-bytes", body_bytes)
        found = lab.run_client(listen, *options, *more, **QUIC)
        assert found["ok"] == count and found.lost() == 0, (found, router.tail())
    nothing_left(lab, router)


@pytest.mark.parametrize("way", ["straight", "relay"])
def test_errors_arrive(lab, way):
    """Before the stream: the worker is configured for the other plane. In it: the engine fails."""
    listen, _ = endpoint_for(lab, way, lambda at: lab.stock_worker(at, "--items", 3), name="tcp")
    status, call = lab.call(listen, "--body", "{}", "--json", **QUIC)
    assert status == 1 and "response plane mismatch" in call.out(), call.tail()
    listen, _ = endpoint_for(lab, way, lambda at: lab.stock_worker(at, "--items", 3, **QUIC))
    status, call = lab.call(listen, "--body", '{"fail_after":2}', "--json", **QUIC)
    assert status == 1 and "the engine failed as it was asked to" in call.out(), call.tail()
    if way == "relay":
        options = ("--count", 1, "--items", 3, "--fail-after", 2)
        found = lab.run_client(listen, *options, **QUIC)
        assert found["failed"] == 1 and found["hung"] == 0, found


@pytest.mark.parametrize("way", ["straight", "relay"])
@pytest.mark.parametrize("how", ["--stop-after", "--kill-after"])
def test_our_caller_cancels(lab, how, way):
    workers = []
    options = ("--items", 10_000, "--delay-us", 5_000, "--record")
    listen, router = endpoint_for(
        lab, way, lambda at: workers.append(lab.stock_worker(at, *options, **QUIC))
    )
    body = ("--body", '{"a":1}', "--count", 2, "--json")
    status, call = lab.call(listen, *body, how, 3, **QUIC)
    assert status == 0, call.tail()
    assert {end["outcome"] for end in answers(call)} == {"stopped"}, call.tail()
    workers[0].wait_event("cancelled", 60, count=2)
    if router:
        nothing_left(lab, router)


@pytest.mark.parametrize("how", ["--stop-after", "--kill-after"])
def test_a_stock_caller_cancels_through_the_relay(lab, how):
    workers = []
    options = ("--record", "--items", 10_000, "--delay-us", 5_000)
    listen, router = endpoint_for(
        lab, "relay", lambda at: workers.append(lab.stock_worker(at, *options, **QUIC))
    )
    more = ("--count", 4, "--concurrency", 4, "--items", 10_000)
    found = lab.run_client(listen, *more, how, 3, **QUIC)
    assert found["cancelled"] == 4, (found, router.tail())
    workers[0].wait_event("cancelled", 60, count=4)
    nothing_left(lab, router)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ours", [False, True])
def test_callers_drop_before_the_prologue(lab, ours, way):
    """The worker stands still until its callers have gone, and calls for them after that."""
    workers = []
    listen, router = endpoint_for(
        lab, way, lambda at: workers.append(lab.stock_worker(at, **QUIC))
    )

    def ask(count, patience_s):
        if ours:
            options = ("--body", '{"a":1}', "--count", count, "--concurrency", count, "--json")
            call = lab.call(listen, *options, "--timeout-ms", patience_s * 1_000, **QUIC)[1]
            return [end["outcome"] for end in answers(call)]
        options = ("--count", count, "--concurrency", count, "--deadline-s", patience_s)
        env = {**QUIC, "DYN_RUNTIME_INHIBITED_DURATION_SECS": "0"}
        found = lab.run_client(listen, *options, **env)
        assert found["wrong"] == 0, found
        return ["ok"] * found["ok"] + ["hung"] * (found["hung"] + found["failed"])

    assert ask(4, 60) == ["ok"] * 4
    workers[0].signal(signal.SIGSTOP)
    assert "ok" not in ask(4, 1)
    workers[0].signal(signal.SIGCONT)
    assert ask(20, 60) == ["ok"] * 20
    if router:
        nothing_left(lab, router)


@pytest.mark.parametrize("workers_on_quic", [False, True])
def test_the_relay_translates(lab, workers_on_quic):
    """Callers on one plane, workers on the other, and the router between them."""
    ours, theirs = (QUIC, {}) if workers_on_quic else ({}, QUIC)
    settings = {"server": {"relay_plane": "quic" if workers_on_quic else "tcp"}}
    listen, router = endpoint_for(
        lab, "relay", lambda at: lab.stock_worker(at, **ours), settings=settings
    )
    options = ("--count", 200, "--concurrency", 16, "--items", 3, "--ask")
    found = lab.run_client(listen, *options, **theirs)
    assert found["ok"] == 200 and found.lost() == 0, (found, router.tail())
    nothing_left(lab, router)


def test_a_caller_on_quic_hears_what_the_router_cannot_do(lab):
    """Told over QUIC: that the router relays TCP only, and that nobody is there."""
    tcp = {"DYN_RESPONSE_PLANE": "tcp"}
    listen, _ = endpoint_for(
        lab, "relay", lambda at: lab.stock_worker(at, **QUIC), router_env=tcp
    )
    found = lab.run_client(listen, "--count", 1, **QUIC)
    assert found["failed"] == 1 and found["hung"] == 0, found
    assert "DYN_RESPONSE_PLANE=quic at the router" in json.dumps(found["errors"]), found


def test_a_dead_worker_is_noticed(lab):
    workers = []
    options = ("--items", 100_000, "--delay-us", 20_000)
    listen, router = endpoint_for(
        lab, "relay", lambda at: workers.append(lab.stock_worker(at, *options, **QUIC))
    )
    client = ("--body", "{}", "--json", "--timeout-ms", 600_000)
    call = lab.start_call(listen, *client, **QUIC)
    wait_for("items flow", lambda: call.out().count('"item"') > 3, 60)
    workers[0].kill()
    assert call.wait(90) == 1, call.tail()
    (end,) = answers(call)
    assert end["outcome"] == "failed" and end["items"] > 3, end
    nothing_left(lab, router)
