"""Our own worker and our own caller, against stock peers and through the router."""

import json

import pytest

from lab import RESPONSES, wait_for

CODECS = ["json", "msgpack"]


@pytest.mark.short
@pytest.mark.parametrize("codec", CODECS)
def test_stock_client_on_our_workers(lab, codec):
    backend = lab.endpoint("backend")
    for _ in range(2):
        lab.echo_worker(backend, "--items", 3, DYN_REQUEST_PLANE_CODEC=codec)
    records = lab.etcd.wait_instances(backend, 2)
    assert {r["request_plane_codec"] for r in records.values()} == {codec}, records
    options = ("--concurrency", 32, "--items", 3, "--plain-echo")
    found = lab.run_client(backend, "--count", 5_000, *options)
    assert found["ok"] == 5_000 and found.lost() == 0, found


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("codec", CODECS)
def test_stock_client_through_the_router_on_our_workers(lab, codec, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    for _ in range(2):
        lab.echo_worker(backend, "--items", 3, DYN_REQUEST_PLANE_CODEC=codec)
    lab.router(listen, backend, response=response)
    options = ("--concurrency", 32, "--items", 3, "--plain-echo")
    found = lab.run_client(listen, "--count", 10_000, *options)
    assert found["ok"] == 10_000 and found.lost() == 0, found


def test_our_worker_drains(lab):
    backend = lab.endpoint("backend")
    worker = lab.echo_worker(backend, "--items", 20, "--delay-us", 100_000)
    client = lab.stock_client(backend, "--count", 8, "--concurrency", 8, "--items", 20,
                              "--plain-echo")  # fmt: skip
    wait_for("items flow", lambda: any(p["items"] > 8 for p in client.events("progress")), 20)
    worker.terminate()
    wait_for("it left etcd", lambda: not lab.etcd.instances(backend), 5)
    found = lab.finish(client)
    assert found["ok"] == 8 and found.lost() == 0, found
    assert worker.wait(10) == 0, worker.tail()


@pytest.mark.short
@pytest.mark.parametrize("codec", CODECS)
def test_our_caller_on_a_stock_worker(lab, codec):
    backend = lab.endpoint("backend")
    worker = lab.stock_worker(backend, "--items", 3, "--record", codec=codec)
    status, call = lab.call(backend, "--body", json.dumps({"text": "grüße"}))
    assert status == 0, call.tail()
    assert worker.hex in call.out() and "grüße" in call.out(), call.tail()
    options = ("--body", '{"a":1}', "--count", 500, "--concurrency", 8)
    status, call = lab.call(backend, *options)
    assert status == 0, call.tail()
    worker.wait_event("finished", count=501)


@pytest.mark.parametrize("response", RESPONSES)
def test_our_caller_through_the_router(lab, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    workers = lab.stock_workers(2, backend, "--items", 3, "--record")
    lab.router(listen, backend, policy="round_robin", response=response)
    status, call = lab.call(listen, "--body", '{"a":1}', "--count", 10_000, "--concurrency", 32)
    assert status == 0, call.tail()
    for worker in workers:
        worker.wait_event("finished", count=4_000)


@pytest.mark.parametrize("how", ["--stop-after", "--kill-after"])
def test_our_caller_cancels(lab, how):
    backend = lab.endpoint("backend")
    options = ("--items", 100_000, "--delay-us", 5_000, "--record")
    worker = lab.stock_worker(backend, *options)
    _, call = lab.call(backend, "--body", '{"a":1}', "--count", 2, how, 3)
    assert worker.wait_event("cancelled", 15, count=2)["sent"] < 50_000, call.tail()


def test_our_caller_says_why_it_fails(lab):
    backend = lab.endpoint("nobody")
    status, call = lab.call(backend, "--body", "{}")
    assert status == 1 and backend in call.log(), call.tail()
    assert "panicked" not in call.log()
