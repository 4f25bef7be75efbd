"""The order in which a router that is told to stop leaves, and a second telling."""

import asyncio
import signal

import pytest

from lab import RESPONSES, lab_address, progress, so_far, wait_for
from wire import Caller, Home, fresh

CLIENT = {"DYN_RUNTIME_INHIBITED_DURATION_SECS": "0"}


def run(test, limit_s=500):
    """Run a coroutine to its end."""
    return asyncio.run(asyncio.wait_for(test, limit_s))


def held_router(lab):
    """A router with a worker that does not acknowledge before it gets SIGUSR1, so that a request
    stays in flight."""
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    fake = lab.fake_worker(backend, "never-ack")
    env = {"DYN_TCP_REQUEST_TIMEOUT": "600"}
    return listen, fake, lab.router(listen, backend, ack="on_accept", env=env)


@pytest.mark.short
def test_drain_leaves_discovery_then_refuses_then_ends(lab):
    listen, fake, router = held_router(lab)
    address, path = lab_address(router)

    async def test():
        async with Home() as home:
            holder, probe = await Caller.connect(address), await Caller.connect(address)
            await holder.send(home.request(path, fresh())[1])
            held = asyncio.get_running_loop().run_in_executor
            await held(None, lambda: fake.wait_event("request"))
            router.terminate()
            refused_while_listed = await watch_refusals(lab, home, probe, path, listen)
            assert not refused_while_listed, "it refused while it still stood in discovery"
            assert router.alive(), "it ended before its request in flight did"
            assert lab.http(router, "/health")[0] == 503
            assert lab.http(router, "/live")[0] == 200
            fake.signal(signal.SIGUSR1)
            assert await holder.reply() == b"", "the request in flight gets its answer"

    run(test())
    assert router.wait(15) == 0, router.tail()


async def watch_refusals(lab, home, probe, path, listen):
    """Ask until refused; whether the record was in discovery after the first refusal."""
    while True:
        await probe.send(home.request(path, fresh())[1])
        try:
            reply = await probe.reply(0.05)
        except asyncio.TimeoutError:
            # Accepted, and now waiting for the worker: the next one goes over a new connection.
            probe = await Caller.connect(probe.writer.get_extra_info("peername"))
            continue
        if reply.startswith(b"Server unavailable: "):
            return bool(lab.etcd.instances(listen))
        raise AssertionError(f"neither accepted nor refused: {reply}")


@pytest.mark.short
@pytest.mark.parametrize("response", RESPONSES)
def test_streams_in_flight_are_finished(lab, response):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_workers(2, backend, "--items", 30, "--delay-us", 100_000)
    router = lab.router(listen, backend, response=response)
    client = lab.stock_client(listen, "--count", 16, "--concurrency", 16, "--items", 30)
    progress(client, 32, "items")
    router.terminate()
    wait_for("it left etcd", lambda: not lab.etcd.instances(listen), 5)
    found = lab.finish(client)
    assert found["ok"] == 16 and found.lost() == 0, found
    assert router.wait(15) == 0, router.tail()


@pytest.mark.parametrize("response", RESPONSES)
def test_drain_under_load(lab, response):
    """Every request ends: answered, or refused because the router goes."""
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_workers(2, backend, "--items", 3, "--delay-us", 20_000)
    router = lab.router(listen, backend, response=response)
    options = ("--concurrency", 16, "--items", 3)
    client = lab.stock_client(listen, "--until-told", *options, **CLIENT)
    progress(client, 200)
    router.terminate()
    assert router.wait(20) == 0, router.tail()
    progress(client, so_far(client, "failed") + 20, "failed")
    found = lab.finish(client)
    assert found["hung"] == 0 and found["wrong"] == 0, found
    assert not lab.etcd.instances(listen)


def test_two_routers_take_turns_without_loss(lab):
    """A rolling restart: the second router is there before the first one leaves."""
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_workers(2, backend, "--items", 3, "--delay-us", 5_000)
    first = lab.router(listen, backend)
    options = ("--concurrency", 8, "--items", 3)
    client = lab.stock_client(listen, "--until-told", *options, **CLIENT)
    progress(client, 100)
    second = lab.router(listen, backend, wait=False)
    lab.etcd.wait_instances(listen, 2)
    progress(client, so_far(client) + 100)
    first.terminate()
    assert first.wait(20) == 0, first.tail()
    progress(client, so_far(client) + 100)
    found = lab.finish(client)
    # Requests that were on the wire when the record went are refused by name, none hangs.
    assert found["hung"] == 0 and found["wrong"] == 0 and found["failed"] <= 8, found
    assert second.alive()


@pytest.mark.short
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(lab, number):
    listen, fake, router = held_router(lab)
    address, path = lab_address(router)

    async def test():
        async with Home() as home:
            holder = await Caller.connect(address)
            await holder.send(home.request(path, fresh())[1])
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, lambda: fake.wait_event("request"))
            router.signal(number)
            gone = wait_for("it left etcd", lambda: not lab.etcd.instances(listen), 10)
            assert gone and router.alive()
            router.signal(number)
            # The drain would go on for longer than this waits.
            router.wait(5)

    run(test())


def test_an_idle_router_ends_quickly_and_leaves_nothing(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    router = lab.router(listen, backend)
    router.terminate()
    assert router.wait(5) == 0, router.tail()
    assert not lab.etcd.instances(listen)
    assert "panicked" not in router.log()
