"""Clients that are slow, greedy, mute or mad. A stock client beside them must not notice."""

import asyncio
import contextlib
import random
import struct

import pytest

from lab import RESPONSES, lab_address, metric_sum, wait_for
from process import raise_descriptor_limit
from wire import Caller, Home, frame, fresh

MIB = 1 << 20
KIB_OF_MIB = 1 << 10
LIMIT = 33_554_432
OPTIONS = ("--concurrency", 4)


def run(test, limit_s=400):
    """Run a coroutine to its end."""
    return asyncio.run(asyncio.wait_for(test, limit_s))


@pytest.fixture(params=RESPONSES)
def routed(request, lab):
    """(listen endpoint, router) before two stock workers."""
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_workers(2, backend)
    router = lab.router(listen, backend, response=request.param)
    assert lab.run_client(listen, "--count", 500, *OPTIONS)["ok"] == 500
    router.before_kib = router.rss_kib()
    return listen, router


def unharmed(lab, listen, router, grown_mib=64):
    """A stock client loses nothing, and the router's memory has a bound; the client's summary."""
    found = lab.run_client(listen, "--count", 1_000, *OPTIONS)
    assert found["ok"] == 1_000 and found.lost() == 0, found
    assert router.alive() and "panicked" not in router.log(), router.tail()
    grown = router.peak_kib() - router.before_kib
    assert grown < grown_mib * KIB_OF_MIB, f"{grown} KiB more than before"
    return found


@pytest.mark.short
def test_a_frame_of_33_mib_from_a_raw_client(lab, routed):
    listen, router = routed
    address, path = lab_address(router)

    async def test():
        for _ in range(8):
            caller = await Caller.connect(address)
            head = frame(path)[:-4] + struct.pack(">I", 33 * MIB)
            total = len(head) + 33 * MIB
            await caller.send(head)
            for _ in range(33):
                await caller.send(b"z" * MIB)
            told = f"Server unavailable: message too large: {total} bytes (max: {LIMIT} bytes)"
            assert await caller.reply() == told.encode()
            await caller.close()

    run(test())
    unharmed(lab, listen, router)


def test_a_frame_of_33_mib_from_a_stock_client(lab, routed):
    listen, router = routed
    greedy = lab.stock_client(
        listen, "--count", 3, "--body-bytes", 33 * MIB, "--deadline-s", 6,
        DYN_TCP_MAX_MESSAGE_SIZE=str(256 * MIB),
    )  # fmt: skip
    greedy.wait_event("ready")
    unharmed(lab, listen, router)
    # Dynamo's client takes the refusal for an acceptance and waits: that is its own deadline.
    found = lab.finish(greedy)
    assert found["ok"] == 0 and found["wrong"] == 0, found
    told = [line for line in router.log().splitlines() if str(LIMIT) in line]
    assert told or any("large" in series for series in lab.metrics(router)), router.tail()


def accepted(lab, router):
    """Connections that the router has accepted since its start."""
    return metric_sum(lab.metrics(router), r"^corelane_connections_accepted_total") or 0


@pytest.mark.short
def test_ten_thousand_idle_connections(lab, routed):
    listen, router = routed
    address, _ = lab_address(router)
    # As many as the machine lets one process have, if that is fewer.
    wanted = min(10_000, raise_descriptor_limit(10_500) - 500) // 200 * 200
    assert wanted >= 1_000, "this machine allows too few open files"
    before = accepted(lab, router)
    files = router.open_files()

    async def test():
        writers = []
        try:
            loop = asyncio.get_running_loop()
            for _ in range(wanted // 200):
                dials = (asyncio.open_connection(*address) for _ in range(200))
                writers += [writer for _, writer in await asyncio.gather(*dials)]
                # The kernel forgets who finds the queue of a listener full that stands still.
                await loop.run_in_executor(None, all_open, len(writers))
            await loop.run_in_executor(None, lambda: unharmed(lab, listen, router, 128))
            # Each of them still works.
            for writer in random.sample(writers, 20):
                assert not writer.is_closing()
                writer.write(frame(b"none"))
        finally:
            for writer in writers:
                writer.close()

    def all_open(count):
        wait_for("all are accepted", lambda: accepted(lab, router) >= before + count)

    run(test())
    wait_for("all are closed", lambda: router.open_files() < files + 100, 60)
    unharmed(lab, listen, router, grown_mib=128)


def test_one_byte_a_second(lab, routed):
    listen, router = routed
    address, path = lab_address(router)

    async def dribble():
        caller = await Caller.connect(address)
        with contextlib.suppress(ConnectionError):
            for byte in frame(path, b"x" * 10_000):
                await caller.send(bytes([byte]))
                await asyncio.sleep(1)

    async def whole():
        """A frame of eight bytes takes as many seconds and is answered, or the peer is cut off."""
        caller = await Caller.connect(address)
        try:
            for byte in frame(b"", b"", b""):
                await caller.send(bytes([byte]))
                await asyncio.sleep(1)
            return await caller.reply()
        except (ConnectionError, asyncio.IncompleteReadError):
            return None

    async def test():
        tasks = [asyncio.ensure_future(dribble()) for _ in range(50)]
        short = asyncio.ensure_future(whole())
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, lambda: unharmed(lab, listen, router))
        assert await short in (None, b"Server unavailable: unknown endpoint ")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(test())
    unharmed(lab, listen, router)


async def write_until_stuck(caller, piece, at_most, stuck_s=2.0):
    """Write without reading until the other side takes no more; how many pieces went out."""
    sent = 0
    with contextlib.suppress(asyncio.TimeoutError, ConnectionError):
        while sent < at_most:
            caller.writer.write(piece)
            await asyncio.wait_for(caller.writer.drain(), stuck_s)
            sent += 1
    return sent


@pytest.mark.short
def test_a_client_that_never_reads_its_refusals(lab, routed):
    """Each refusal repeats a path of 60 kB, so unread replies would fill any memory."""
    listen, router = routed
    address, _ = lab_address(router)

    async def test():
        callers = [await Caller.connect(address, limit=1) for _ in range(8)]
        for caller in callers:
            caller.writer.transport.pause_reading()
        piece = frame(b"p" * 60_000)
        sent = await asyncio.gather(*(write_until_stuck(c, piece, 4_000) for c in callers))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, lambda: unharmed(lab, listen, router, 96))
        for caller in callers:
            caller.writer.transport.abort()
        return sent

    sent = run(test())
    unharmed(lab, listen, router, grown_mib=96)
    assert all(sent), sent


def test_a_client_that_never_reads_its_acks(lab, routed):
    listen, router = routed
    address, path = lab_address(router)

    async def test():
        async with Home() as home:
            caller = await Caller.connect(address, limit=1)
            caller.writer.transport.pause_reading()
            for _ in range(100):
                requests = [home.request(path, fresh())[1] for _ in range(100)]
                if not await write_until_stuck(caller, b"".join(requests), 1):
                    break
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, lambda: unharmed(lab, listen, router, 96))
            caller.writer.transport.abort()

    run(test())
    unharmed(lab, listen, router, grown_mib=96)


@pytest.mark.short
def test_garbage(lab, routed):
    listen, router = routed
    address, path = lab_address(router)
    dice = random.Random(20_240_229)

    async def test():
        for round_number in range(150):
            caller = await Caller.connect(address)
            data = dice.randbytes(dice.choice([1, 7, 100, 5_000, 70_000]))
            if round_number % 3 == 0:
                # A right beginning makes the rest count as a payload.
                data = frame(path, data)
            with contextlib.suppress(ConnectionError):
                await caller.send(data)
                if round_number % 2:
                    caller.writer.write_eof()
                    await caller.closed()
            caller.writer.transport.abort()

    run(test())
    unharmed(lab, listen, router)


def test_http_on_the_request_port(lab, routed):
    listen, router = routed
    address, _ = lab_address(router)

    async def test():
        caller = await Caller.connect(address)
        await caller.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        caller.writer.write_eof()
        await caller.closed()

    run(test())
    unharmed(lab, listen, router)


def test_connections_that_come_and_go(lab, routed):
    listen, router = routed
    address, _ = lab_address(router)
    before = router.open_files()

    async def test():
        for _ in range(40):
            callers = await asyncio.gather(*(Caller.connect(address) for _ in range(50)))
            for caller in callers:
                caller.writer.transport.abort()

    run(test())
    wait_for("all are closed", lambda: router.open_files() < before + 50, 20)
    unharmed(lab, listen, router)


def test_callers_that_leave_before_the_answer(lab):
    """Their call-home address is gone when the worker dials it."""
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_workers(2, backend)
    router = lab.router(listen, backend)
    router.before_kib = router.rss_kib()
    address, path = lab_address(router)

    async def test():
        async with Home() as home:
            for _ in range(100):
                caller = await Caller.connect(address)
                await caller.send(home.request(path, fresh(delay_s=0.3))[1])
                assert await caller.reply() == b""
                caller.writer.transport.abort()

    run(test())
    unharmed(lab, listen, router)
