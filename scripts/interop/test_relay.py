"""What only a router that relays responses can do, between unmodified stock peers.

The other tests run in both response modes where that makes sense; see `RESPONSES` in lab.py.
"""

import asyncio
import signal

import pytest

from lab import metric_sum, wait_for
from wire import Caller, Home, fresh

# A stock client inhibits an instance for 5 s after an error; the router is its only one.
CLIENT = {"DYN_RUNTIME_INHIBITED_DURATION_SECS": "0"}
# Class and reason of what a lost worker is.
UNAVAILABLE = ("Unavailable", "transport.disconnected")


def pair(lab, *worker_options, workers=2, codec="msgpack", **route):
    """(listen, workers, router) with `response = "relay"`."""
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    found = lab.stock_workers(workers, backend, "--record", *worker_options, codec=codec)
    router = lab.router(listen, backend, policy="round_robin", response="relay", **route)
    return listen, found, router


def started(worker):
    """Requests that a worker has begun."""
    return len(worker.events("started"))


def nothing_left(lab, router):
    """Wait until the router has no response, request or worker's call left."""

    def empty():
        samples = lab.metrics(router)
        gauges = ("relays", "relay_strangers", "relay_heads", "in_flight")
        return all(metric_sum(samples, rf"^corelane_{gauge}\{{") == 0 for gauge in gauges)

    wait_for("nothing is left in the router", empty, 20)


@pytest.mark.short
@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_killed_before_its_first_item_another_worker_answers_whole(lab, codec):
    listen, (dead, alive), router = pair(lab, codec=codec)
    options = ("--count", 8, "--concurrency", 8, "--items", 3, "--ask", "--delay-s", 5)
    client = lab.stock_client(listen, *options, **CLIENT)
    wait_for("both have requests", lambda: started(dead) >= 3 and started(alive) >= 3, 30)
    dead.kill()
    found = lab.finish(client)
    assert found["ok"] == 8 and found.lost() == 0, found
    assert found["by_worker"] == {alive.hex: 8}, found
    assert metric_sum(lab.metrics(router), "relays_retried_total") >= 3
    nothing_left(lab, router)


@pytest.mark.short
@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_killed_after_its_first_item_the_caller_knows_at_once(lab, codec):
    listen, (worker,), router = pair(lab, workers=1, codec=codec)
    options = ("--count", 4, "--concurrency", 4, "--items", 1_000, "--ask", "--delay-s", 0.02)
    client = lab.stock_client(listen, *options, **CLIENT)

    def flowing():
        seen = client.events("progress")
        return seen and seen[-1]["items"] >= 40

    wait_for("items flow", flowing, 30)
    worker.kill()
    found = lab.finish(client)
    assert found["failed"] == 4 and found["hung"] == 0 and found["wrong"] == 0, found
    assert all(": Unavailable: " in error for error in found["errors"]), found
    assert metric_sum(lab.metrics(router), "relays_cut_total") == 4
    nothing_left(lab, router)


@pytest.mark.short
def test_the_error_after_the_first_item_has_class_unavailable(lab):
    """What the error is on the wire: the last item, with its class, and a clean end."""
    listen, (worker,), router = pair(lab, workers=1, codec="json")
    request = fresh(text="x", items=1_000, delay_s=0.02)

    async def cut():
        async with Home() as home:
            caller = await Caller.connect(router.address)
            stream, data = home.request(router.path, request)
            await caller.send(data)
            assert await caller.reply() == b""
            while len(stream.items) < 3:
                assert not stream.ended.is_set(), stream.prologue
                await asyncio.sleep(0.01)
            worker.kill()
            *items, last = await stream.values()
            await caller.close()
            return items, last

    items, last = asyncio.run(cut())
    assert [item["data"]["i"] for item in items] == list(range(len(items)))
    assert last["event"] == "error" and "data" not in last, last
    assert (last["error"]["class"], last["error"]["reason"]) == UNAVAILABLE, last
    nothing_left(lab, router)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_stands_still_meets_the_deadline(lab, workers):
    listen, found, router = pair(lab, workers=workers, first_item_timeout_ms=8_000)
    options = ("--count", 1, "--items", 1, "--ask", "--delay-s", 3.0)
    client = lab.stock_client(listen, *options, **CLIENT)
    wait_for("one has the request", lambda: any(map(started, found)), 30)
    stopped = next(worker for worker in found if started(worker))
    stopped.signal(signal.SIGSTOP)
    summary = lab.finish(client)
    if workers == 1:
        assert summary["failed"] == 1, summary
        assert "first item" in str(summary["errors"]), summary
    else:
        assert summary["ok"] == 1 and stopped.hex not in summary["by_worker"], summary
    assert metric_sum(lab.metrics(router), "relay_timeouts_total") == 1
    stopped.signal(signal.SIGCONT)
    nothing_left(lab, router)


@pytest.mark.short
@pytest.mark.parametrize("codec", ["json", "msgpack"])
@pytest.mark.parametrize("after", [0, 2])
def test_errors_of_a_worker_are_the_same_as_without_the_router(lab, after, codec):
    listen, (worker,), router = pair(lab, workers=1, codec=codec)
    backend = lab.endpoint("backend")
    options = ("--count", 3, "--items", 5, "--ask", "--fail-after", after)
    direct = lab.run_client(backend, *options, **CLIENT)
    relayed = lab.run_client(listen, *options, **CLIENT)
    assert direct["failed"] == 3 and direct["items"] == 3 * after, direct
    assert relayed["errors"] == direct["errors"] and relayed["items"] == direct["items"], relayed
    nothing_left(lab, router)


@pytest.mark.short
def test_streams_of_all_kinds_leave_nothing_behind(lab):
    listen, workers, router = pair(lab, "--delay-us", 5_000)
    before = router.open_files()
    # Those that are ended early are longer than anybody takes to end them.
    ways = [
        ("--items", 20),
        ("--items", 20_000, "--stop-after", 2),
        ("--items", 20_000, "--kill-after", 2),
        ("--items", 20_000, "--deadline-s", 0.05),
    ]
    options = ("--count", 150, "--concurrency", 8, "--ask")
    clients = [lab.stock_client(listen, *options, *way, **CLIENT) for way in ways]
    first, *others = [lab.finish(client) for client in clients]
    assert first["ok"] == 150 and first.lost() == 0, first
    assert all(found["wrong"] == 0 for found in others), others
    nothing_left(lab, router)
    wait_for("no socket is left", lambda: router.open_files() <= before + 8, 20)
    samples = lab.metrics(router)
    assert metric_sum(samples, r"^corelane_first_item_seconds_count") >= 150
    assert metric_sum(samples, r"^corelane_inter_item_seconds_count") >= 150 * 19


def test_running_streams_end_before_the_router_does(lab):
    listen, workers, router = pair(lab)
    options = ("--count", 6, "--concurrency", 6, "--items", 20, "--ask", "--delay-s", 0.2)
    client = lab.stock_client(listen, *options, **CLIENT)
    wait_for("all run", lambda: sum(map(started, workers)) == 6, 30)
    router.terminate()
    found = lab.finish(client)
    assert found["ok"] == 6 and found.lost() == 0, found
    assert router.wait(30) == 0
