"""The router's request plane byte by byte, from sockets without any Dynamo code."""

import asyncio
import struct

import pytest

from lab import RESPONSES, lab_address, split_address
from wire import Caller, Home, ask, frame, fresh

LIMIT = 33_554_432


def run(test):
    """Run a coroutine to its end; nothing in here may take for ever."""
    return asyncio.run(asyncio.wait_for(test, 400))


@pytest.fixture(params=[pytest.param("stock", marks=pytest.mark.stock), *RESPONSES])
def routed(request, lab):
    """(address, path) of a stock worker, which shows that the tests are right, or of a router."""
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    if request.param == "stock":
        worker = lab.stock_worker(backend, codec="json")
        return split_address(lab.etcd.instances(backend)[worker.instance])
    lab.fake_worker(backend, "answer")
    return lab_address(lab.router(listen, backend, response=request.param))


@pytest.fixture
def bad_path(request):
    """The answer to a path that is no text. Dynamo's client takes Dynamo's own for success and
    waits without end; the router's begins as that client wants a refusal to begin."""
    if request.node.callspec.params["routed"] == "stock":
        return b"Invalid endpoint path"
    return b"Server unavailable: invalid endpoint path"


def echoes(items):
    """The requests in the items that either kind of worker brings."""
    values = [item["data"] for item in items]
    return [v["echo"] if isinstance(v, dict) and "echo" in v else v for v in values]


@pytest.mark.short
def test_one_request(routed):
    async def test():
        async with Home() as home:
            value = fresh(text="grüße")
            assert echoes(await ask(*routed, value, home)) == [value]

    run(test())


@pytest.mark.short
def test_refusals_and_the_connection_stays(routed, bad_path):
    address, path = routed

    async def test():
        caller = await Caller.connect(address)
        await caller.send(frame(b"no/such/endpoint", b"x"))
        refused = b"Server unavailable: unknown endpoint no/such/endpoint"
        assert await caller.reply() == refused
        await caller.send(frame(b""))
        assert await caller.reply() == b"Server unavailable: unknown endpoint "
        await caller.send(frame(b"\xff\xfe/x", b"x"))
        assert await caller.reply() == bad_path
        async with Home() as home:
            value = fresh()
            stream, data = home.request(path, value)
            await caller.send(data)
            assert await caller.reply() == b""
            assert echoes(await stream.values()) == [value]
        await caller.close()

    run(test())


def test_no_instance(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    address, path = lab_address(lab.router(listen, backend))

    async def test():
        async with Home() as home:
            caller = await Caller.connect(address)
            await caller.send(home.request(path, fresh())[1])
            reply = await caller.reply()
            assert reply.startswith(b"Server unavailable: "), reply

    run(test())


@pytest.mark.short
def test_too_large_is_told_and_the_connection_serves_on(routed, bad_path):
    address, path = routed
    stock = bad_path.startswith(b"Invalid")
    total = LIMIT + 1

    async def test():
        caller = await Caller.connect(address)
        whole = frame(path, b"")
        missing = total - len(whole)
        await caller.send(whole[:-4] + struct.pack(">I", missing))
        if not stock:
            # It is told as soon as the front of the payload shows that nobody can be called home.
            await caller.send(b"z" * 4096)
        first = "Read error" if stock else "Server unavailable"
        told = f"{first}: message too large: {total} bytes (max: {LIMIT} bytes)"
        assert await caller.reply() == told.encode()
        if stock:
            return
        # The rest passes by, and the connection serves on.
        await caller.send(b"z" * (missing - 4096))
        async with Home() as home:
            value = fresh()
            stream, data = home.request(path, value)
            await caller.send(data)
            assert await caller.reply() == b""
            assert echoes(await stream.values()) == [value]

    run(test())


def test_the_largest_frame_passes(routed):
    address, path = routed

    async def test():
        async with Home() as home:
            text = "z" * (LIMIT - len(home.request(path, "")[1]))
            stream, data = home.request(path, text)
            assert len(data) == LIMIT
            caller = await Caller.connect(address)
            await caller.send(data)
            assert await caller.reply() == b""
            assert echoes(await stream.values()) == [text]

    run(test())


@pytest.mark.short
@pytest.mark.parametrize("headers", [b"", b"not json", b"[1]", b'{"a":1}', b'{"x":"\xff"}'])
def test_bad_headers_are_no_headers(routed, headers):
    address, path = routed

    async def test():
        async with Home() as home:
            value = fresh()
            stream, data = home.request(path, value, headers)
            caller = await Caller.connect(address)
            await caller.send(data)
            assert await caller.reply() == b""
            assert echoes(await stream.values()) == [value]

    run(test())


@pytest.mark.short
def test_replies_in_request_order(routed, bad_path):
    address, path = routed

    async def test():
        async with Home() as home:
            caller, expected, streams, sent = await Caller.connect(address), [], [], []
            for number in range(600):
                if number % 3 == 0:
                    sent.append(frame(b"none/%d" % number, b"x" * (number * 7)))
                    expected.append(b"Server unavailable: unknown endpoint none/%d" % number)
                elif number % 31 == 0:
                    sent.append(frame(b"\xff%d" % number))
                    expected.append(bad_path)
                else:
                    value = fresh(text="y" * (number * 11 % 5000))
                    stream, data = home.request(path, value)
                    sent.append(data)
                    streams.append((stream, value))
                    expected.append(b"")
            writing = asyncio.ensure_future(caller.send(b"".join(sent)))
            replies = [await caller.reply() for _ in expected]
            await writing
            assert replies == expected
            for stream, value in streams:
                assert echoes(await stream.values()) == [value]

    run(test())


@pytest.mark.short
def test_frames_split_at_every_byte(request, routed):
    address, path = routed
    # Dynamo leaves Nagle on: each pair of replies takes it 40 ms, so there a sample has to do.
    step = 17 if "stock" in request.node.name else 1

    async def test():
        async with Home() as home:
            caller = await Caller.connect(address)
            _, data = home.request(path, fresh())
            for cut in range(1, len(data) + 40, step):
                value = fresh()
                stream, data = home.request(path, value)
                await caller.send(data[:cut])
                await asyncio.sleep(0.001)
                await caller.send(data[cut:] + frame(b"none"))
                assert await caller.reply() == b""
                assert await caller.reply() == b"Server unavailable: unknown endpoint none"
                assert echoes(await stream.values()) == [value]

    run(test())


def test_one_byte_at_a_time(routed):
    address, path = routed

    async def test():
        async with Home() as home:
            caller, value = await Caller.connect(address), fresh()
            stream, data = home.request(path, value)
            for at in range(len(data)):
                await caller.send(data[at : at + 1])
                await asyncio.sleep(0.001)
            assert await caller.reply() == b""
            assert echoes(await stream.values()) == [value]

    run(test())


@pytest.mark.short
def test_payload_sizes_around_every_bound(routed):
    address, path = routed
    bounds = [0, 4096, 16384, 32768, 65536, 131072, 262144, 1 << 20]

    async def test():
        async with Home() as home:
            caller = await Caller.connect(address)
            overhead = len(home.request(path, "")[1])
            for bound in bounds:
                for size in range(max(bound - 3, 0), bound + 4):
                    value = "s" * max(size - overhead, 0)
                    stream, data = home.request(path, value)
                    await caller.send(data)
                    assert await caller.reply() == b"", size
                    assert echoes(await stream.values()) == [value], size

    run(test())


def test_end_inside_a_frame_closes_without_a_reply(routed):
    address, path = routed

    async def test():
        _, data = nobody_home().request(path, fresh())
        for cut in (1, 3, 20, len(data) - 1):
            caller = await Caller.connect(address)
            await caller.send(data[:cut])
            caller.writer.write_eof()
            assert await caller.closed() == b"", cut

    run(test())


def nobody_home():
    """A call-home address where nobody listens."""
    home = Home()
    home.address = ("127.0.0.1", 9)
    return home


def test_payload_that_is_no_envelope(routed):
    """The worker gets it or it is refused; either way the next request is answered."""
    address, path = routed

    async def test():
        async with Home() as home:
            caller = await Caller.connect(address)
            for payload in (b"", b"x", b"\0" * 24, struct.pack(">QQQ", 1 << 60, 1 << 60, 0)):
                await caller.send(frame(path, payload))
                await caller.reply()
            value = fresh()
            assert echoes(await ask(address, path, value, home)) == [value]

    run(test())


def test_many_connections_at_once(routed):
    address, path = routed

    async def test():
        async with Home() as home:
            values = [fresh() for _ in range(400)]
            answers = await asyncio.gather(*(ask(address, path, v, home) for v in values))
            assert [echoes(items) for items in answers] == [[value] for value in values]

    run(test())
