"""The QUIC response plane: stock callers on our worker."""

import json

import pytest

from lab import wait_for

QUIC = {"DYN_RESPONSE_PLANE": "quic"}
CODECS = ["json", "msgpack"]


@pytest.mark.short
@pytest.mark.parametrize("codec", CODECS)
def test_stock_client_on_our_worker(lab, codec):
    backend = lab.endpoint("backend")
    worker = lab.echo_worker(backend, "--items", 3, DYN_REQUEST_PLANE_CODEC=codec, **QUIC)
    options = ("--count", 2_000, "--concurrency", 32, "--items", 3, "--plain-echo")
    found = lab.run_client(backend, *options, **QUIC)
    assert found["ok"] == 2_000 and found.lost() == 0, (found, worker.tail())


def test_through_the_router(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    for _ in range(2):
        lab.echo_worker(backend, "--items", 100, **QUIC)
    lab.router(listen, backend)
    options = ("--count", 200, "--concurrency", 16, "--items", 100, "--plain-echo")
    found = lab.run_client(listen, *options, **QUIC)
    assert found["ok"] == 200 and found["items"] == 20_000 and found.lost() == 0, found


def test_large_items_and_none(lab):
    backend = lab.endpoint("backend")
    worker = lab.echo_worker(backend, "--items", 2, **QUIC)
    options = ("--count", 20, "--concurrency", 4, "--items", 2, "--plain-echo")
    found = lab.run_client(backend, *options, "--body-bytes", 2_000_000, **QUIC)
    assert found["ok"] == 20 and found.lost() == 0, (found, worker.tail())
    nothing = lab.endpoint("nothing")
    worker = lab.echo_worker(nothing, "--items", 0, **QUIC)
    found = lab.run_client(nothing, "--count", 20, "--items", 0, **QUIC)
    assert found["ok"] == 20 and found.lost() == 0, (found, worker.tail())


@pytest.mark.parametrize("how", ["--stop-after", "--kill-after"])
def test_a_stock_client_cancels(lab, how):
    backend = lab.endpoint("backend")
    worker = lab.echo_worker(backend, "--items", 1_000, "--delay-us", 5_000, **QUIC)
    options = ("--count", 4, "--concurrency", 4, "--items", 1_000, "--plain-echo")
    found = lab.run_client(backend, *options, how, 3, **QUIC)
    assert found["cancelled"] == 4, (found, worker.tail())
    # Nothing runs on for a caller who has gone: the drain is over long before 1,000 items are.
    worker.terminate()
    assert worker.wait(20) == 0, worker.tail()
    assert "cut off" not in worker.log(), worker.tail()


@pytest.mark.parametrize("worker_on_quic", [False, True])
def test_both_must_speak_of_the_same_plane(lab, worker_on_quic):
    backend = lab.endpoint("backend")
    ours, theirs = (QUIC, {}) if worker_on_quic else ({}, QUIC)
    worker = lab.echo_worker(backend, **ours)
    found = lab.run_client(backend, "--count", 1, "--deadline-s", 20, **theirs)
    assert found["failed"] == 1 and found["hung"] == 0, (found, worker.tail())
    assert "response plane mismatch" in json.dumps(found["errors"]), found
    wait_for("the worker says it", lambda: "response plane mismatch" in worker.log())
