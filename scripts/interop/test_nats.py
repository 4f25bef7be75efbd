"""Requests over NATS, between stock peers and ours, and a router between the two transports."""

import json

import pytest

from store import Nats


@pytest.fixture(scope="module")
def nats(tmp_path_factory):
    """A NATS server for these tests."""
    server = Nats(tmp_path_factory.mktemp("nats"))
    yield server
    server.stop()


def on_nats(server):
    """What puts a process's requests on NATS."""
    return {"DYN_REQUEST_PLANE": "nats", "NATS_SERVER": server.url}


COUNT = 1_000
OPTIONS = ("--count", COUNT, "--concurrency", 16, "--items", 3)


def check(found):
    """All of them were answered."""
    assert found["ok"] == COUNT and found.lost() == 0, found


@pytest.mark.short
def test_stock_client_on_our_worker(lab, nats):
    backend = lab.endpoint("backend")
    lab.echo_worker(backend, "--items", 3, **on_nats(nats))
    (record,) = lab.etcd.wait_instances(backend, 1).values()
    assert set(record["transport"]) == {"nats_tcp"}, record
    check(lab.run_client(backend, *OPTIONS, "--plain-echo", **on_nats(nats)))


def test_our_caller_on_a_stock_worker(lab, nats):
    backend = lab.endpoint("backend")
    lab.stock_worker(backend, "--items", 3, **on_nats(nats))
    options = ("--body", json.dumps({"text": "grüße"}), "--count", 100, "--concurrency", 8)
    status, call = lab.call(backend, *options, NATS_SERVER=nats.url)
    assert status == 0, call.tail()


@pytest.mark.parametrize("response", ["direct", "relay"])
def test_callers_on_tcp_workers_on_nats(lab, nats, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_worker(backend, "--items", 3, **on_nats(nats))
    lab.router(listen, backend, response=response, env={"NATS_SERVER": nats.url})
    check(lab.run_client(listen, *OPTIONS))


def test_callers_on_nats_workers_on_tcp(lab, nats):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_worker(backend, "--items", 3)
    lab.router(listen, backend, wait=False, env=on_nats(nats))
    (record,) = lab.etcd.wait_instances(listen, 1).values()
    assert set(record["transport"]) == {"nats_tcp"}, record
    check(lab.run_client(listen, *OPTIONS, **on_nats(nats)))
