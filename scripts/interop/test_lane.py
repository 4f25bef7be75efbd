"""Python workers behind shared-memory lanes, and a stock Dynamo client."""

import signal
import sys

import pytest

from lab import HERE, metric_sum, progress, so_far, wait_for

WORKER = HERE.parent.parent / "examples" / "lane_worker.py"


def pair(lab, count, *options, **route):
    """(listen, router, workers)."""
    listen, socket = lab.endpoint("router"), lab.folder / "lane.sock"
    route = {"lane": str(socket), "policy": "round_robin", **route}
    router = lab.router(listen, lab.endpoint("lane"), **route)
    command = [sys.executable, WORKER, socket, *options]
    workers = [lab.start("lane-worker", command) for _ in range(count)]
    for worker in workers:
        worker.hex = f"{worker.wait_event('ready')['id']:x}"
    attached(lab, router, count)
    return listen, router, workers


def attached(lab, router, count):
    """Wait until every core has so many lanes."""

    def look():
        lanes = metric_sum(lab.metrics(router), r"^corelane_lanes(\{|$)")
        return lanes is not None and lanes >= count and (count > 0 or lanes == 0)

    wait_for(f"{count} workers have lanes", look, 30)


@pytest.mark.short
def test_requests_and_streams(lab):
    listen, router, workers = pair(lab, 2)
    found = lab.run_client(listen, "--count", 1_000, "--concurrency", 16)
    assert found["ok"] == 1_000 and found.lost() == 0, found
    assert set(found["by_worker"]) == {worker.hex for worker in workers}, found
    options = ("--items", 100, "--ask")
    found = lab.run_client(listen, "--count", 50, "--concurrency", 8, *options)
    assert found["ok"] == 50 and found["items"] == 5_000 and found.lost() == 0, found
    assert metric_sum(lab.metrics(router), r"corelane_lane_faults_total") == 0


@pytest.mark.short
def test_large_bodies_both_ways(lab):
    listen, router, _ = pair(lab, 1)
    options = ("--count", 20, "--concurrency", 4, "--body-bytes", 1 << 20)
    found = lab.run_client(listen, *options)
    assert found["ok"] == 20 and found.lost() == 0, found
    samples = lab.metrics(router)
    landed = metric_sum(samples, r"corelane_lane_landed_bytes_total")
    copied = metric_sum(samples, r"corelane_lane_copied_bytes_total")
    assert landed >= 19 << 20 and copied * 40 <= landed, (landed, copied)


@pytest.mark.short
@pytest.mark.parametrize("how", ["--stop-after", "--kill-after"])
def test_cancelled_streams(lab, how):
    listen, _, workers = pair(lab, 1, "--delay-us", 2_000)
    options = ("--items", 100_000, "--ask", how, 3)
    found = lab.run_client(listen, "--count", 3, *options)
    assert found["cancelled"] == 3 and found.lost() == 0, found
    # The worker has heard of it: it is free for the next one.
    found = lab.run_client(listen, "--count", 10)
    assert found["ok"] == 10, found
    assert workers[0].alive()


@pytest.mark.short
def test_a_worker_is_killed_and_another_one_serves_on(lab):
    listen, router, workers = pair(lab, 2)
    client = lab.stock_client(listen, "--until-told", "--concurrency", 8)
    progress(client, 1)
    workers[0].kill()
    attached(lab, router, 1)
    progress(client, so_far(client) + 100)
    found = lab.finish(client)
    # What the dead one had taken is lost; nothing hangs and nothing is mixed up.
    assert found["ok"] > 100 and found["hung"] == 0 and found["wrong"] == 0, found
    found = lab.run_client(listen, "--count", 100, "--concurrency", 8)
    assert found["ok"] == 100 and set(found["by_worker"]) == {workers[1].hex}, found


def test_a_worker_that_does_not_take_its_requests_loses_its_lanes(lab):
    listen, router, workers = pair(lab, 2, ack_timeout_ms=4_000)
    workers[0].signal(signal.SIGSTOP)
    found = lab.run_client(listen, "--count", 200, "--concurrency", 4)
    assert found["hung"] == 0 and found["wrong"] == 0 and found["ok"] > 150, found
    assert metric_sum(lab.metrics(router), r"corelane_lane_faults_total") >= 1
    workers[0].signal(signal.SIGCONT)
