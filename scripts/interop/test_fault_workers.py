"""Workers that die, refuse, stay silent or are not there, under load from a stock client.

In every test each request ends in a whole, right answer or in an error, within its deadline.
"""

import contextlib
import socket

import pytest

from lab import RESPONSES, progress, so_far, wait_for

# A stock client inhibits an instance for 5 s after an error; the router is its only one.
CLIENT = {"DYN_RUNTIME_INHIBITED_DURATION_SECS": "0"}
IMPATIENT = {"DYN_TCP_REQUEST_TIMEOUT": "1", "DYN_TCP_CONNECT_TIMEOUT": "1"}


@contextlib.contextmanager
def refusing_port():
    """A loopback port that is taken and answers every connection with a reset."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def ends(found):
    """Assert that nothing hung and nothing was wrong."""
    assert found["hung"] == 0 and found["wrong"] == 0, found


@pytest.mark.short
@pytest.mark.parametrize("response", RESPONSES)
def test_a_worker_is_killed(lab, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    dead, alive = lab.stock_workers(2, backend, "--items", 4, "--delay-us", 2_000)
    # Who answers late on a busy machine is not to be taken for dead.
    patient = {"DYN_TCP_REQUEST_TIMEOUT": "60"}
    lab.router(listen, backend, policy="round_robin", response=response, env=patient)
    options = ("--concurrency", 16, "--items", 4)
    client = lab.stock_client(listen, "--until-told", *options, **CLIENT)
    progress(client, 300)
    dead.kill()
    progress(client, so_far(client) + 300)
    found = lab.finish(client)
    ends(found)
    assert found["failed"] <= 2 * 16, found

    # Its record is in etcd for a while yet: who was found dead gets nothing all the same.
    assert dead.instance in lab.etcd.instances(backend)
    found = lab.run_client(listen, "--count", 600, *options, **CLIENT)
    assert found["ok"] == 600 and set(found["by_worker"]) == {alive.hex}, found


@pytest.mark.parametrize("response", RESPONSES)
def test_the_only_worker_is_killed_and_replaced(lab, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    first = lab.stock_worker(backend)
    lab.router(listen, backend, response=response, env=IMPATIENT)
    client = lab.stock_client(listen, "--until-told", "--concurrency", 8, **CLIENT)
    progress(client, 200)
    first.kill()
    progress(client, 8, "failed")
    second = lab.stock_worker(backend)
    progress(client, 200, worker=second)
    ends(lab.finish(client))


@pytest.mark.short
@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("ack", ["on_forward", "on_accept"])
def test_a_worker_that_never_acknowledges(lab, ack, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    good = lab.stock_worker(backend)
    fake = lab.fake_worker(backend, "never-ack")
    lab.router(listen, backend, policy="round_robin", ack=ack, response=response, env=IMPATIENT)
    options = ("--concurrency", 8)
    found = lab.run_client(listen, "--count", 400, *options, **CLIENT)
    ends(found)
    assert fake.events("request"), "the silent worker was never asked"
    assert found["by_worker"] == {good.hex: found["ok"]} and found["ok"] >= 300, found


@pytest.mark.parametrize("response", RESPONSES)
def test_a_worker_that_never_reads(lab, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_worker(backend)
    lab.fake_worker(backend, "never-read")
    router = lab.router(listen, backend, policy="round_robin", response=response, env=IMPATIENT)
    before = router.rss_kib()
    options = ("--concurrency", 8, "--body-bytes", 400_000, "--no-echo")
    found = lab.run_client(listen, "--count", 200, *options, **CLIENT)
    ends(found)
    assert found["ok"] >= 150, found
    assert router.peak_kib() - before < 160 << 10, (before, router.peak_kib())


@pytest.mark.short
@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("ack", ["on_forward", "on_accept"])
@pytest.mark.parametrize("text", ["Server overloaded: full", "Server unavailable: draining"])
def test_a_worker_that_refuses(lab, text, ack, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    good = lab.stock_worker(backend)
    fake = lab.fake_worker(backend, "refuse", "--text", text)
    lab.router(listen, backend, policy="round_robin", ack=ack, response=response)
    options = ("--concurrency", 8)
    found = lab.run_client(listen, "--count", 400, *options, **CLIENT)
    assert found["ok"] == 400 and found.lost() == 0, found
    assert found["by_worker"] == {good.hex: 400}, found
    assert fake.events("request"), "the refusing worker was never asked"


@pytest.mark.parametrize("response", RESPONSES)
def test_all_workers_refuse(lab, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    for text in ("Server overloaded: full", "Server unavailable: draining"):
        lab.fake_worker(backend, "refuse", "--text", text)
    lab.router(listen, backend, response=response)
    options = ("--concurrency", 4)
    found = lab.run_client(listen, "--count", 100, *options, **CLIENT)
    ends(found)
    assert found["failed"] == 100, found


@pytest.mark.short
@pytest.mark.parametrize("response", RESPONSES)
def test_a_worker_address_that_refuses_connections(lab, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    good = lab.stock_worker(backend)
    with refusing_port() as port:
        lab.etcd.register(backend, port)
        lab.router(listen, backend, policy="round_robin", response=response)
        options = ("--concurrency", 8)
        found = lab.run_client(listen, "--count", 400, *options, **CLIENT)
    assert found["ok"] == 400 and found["by_worker"] == {good.hex: 400}, found


@pytest.mark.parametrize("response", RESPONSES)
def test_a_worker_that_hangs_up(lab, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    good = lab.stock_worker(backend)
    lab.fake_worker(backend, "close")
    lab.router(listen, backend, policy="round_robin", response=response, env=IMPATIENT)
    options = ("--concurrency", 8)
    found = lab.run_client(listen, "--count", 400, *options, **CLIENT)
    ends(found)
    assert found["by_worker"] == {good.hex: found["ok"]} and found["ok"] >= 200, found


@pytest.mark.parametrize("response", RESPONSES)
def test_no_worker_at_all(lab, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.router(listen, backend, response=response)
    found = lab.run_client(listen, "--count", 20, "--concurrency", 4, **CLIENT)
    ends(found)
    assert found["failed"] == 20, found
    assert found["elapsed_s"] < 60, found


def test_a_worker_that_drains_loses_nothing(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    leaving, staying = lab.stock_workers(2, backend, "--items", 10, "--delay-us", 20_000)
    lab.router(listen, backend, policy="round_robin")
    options = ("--concurrency", 16, "--items", 10)
    client = lab.stock_client(listen, "--until-told", *options, **CLIENT)
    progress(client, 60)
    leaving.terminate()
    wait_for("it left etcd", lambda: leaving.instance not in lab.etcd.instances(backend), 10)
    assert leaving.wait(10) == 0, leaving.tail()
    progress(client, so_far(client) + 60)
    found = lab.finish(client)
    assert found.lost() == 0, found
    assert found["by_worker"][staying.hex] > found["by_worker"][leaving.hex], found
