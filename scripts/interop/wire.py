"""The request plane's bytes, written by hand: a raw caller, and the caller's call-home listener.

No Dynamo code is in here, so that a test can also send what a Dynamo client never would.
"""

import asyncio
import contextlib
import itertools
import json
import struct
import uuid

TIMEOUT_S = 60.0
FINAL = {"complete_final": True}
_keys = itertools.count()


def frame(path, payload=b"", headers=b"{}"):
    """One request frame: u16 path, u16 headers, u32 payload, each after its big-endian length."""
    parts = struct.pack(">H", len(path)), path, struct.pack(">H", len(headers)), headers
    return b"".join((*parts, struct.pack(">I", len(payload)), payload))


def two_part(header=b"", body=b""):
    """One two-part message with the checksum left at zero, which means none."""
    return struct.pack(">QQQ", len(header), len(body), 0) + header + body


def compact(value):
    """JSON without spaces, as bytes."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def envelope(request_id, home_address, subject, body, codec="json"):
    """The payload of a unary request whose answer is to be brought to `home_address`."""
    info = {
        "address": "%s:%d" % home_address,
        "subject": subject,
        "context": request_id,
        "stream_type": "response",
    }
    control = {
        "id": request_id,
        "request_type": "single_in",
        "response_type": "many_out",
        "payload_codec": codec,
        "connection_info": {"transport": "tcp_server", "info": compact(info).decode()},
    }
    return two_part(compact(control), body)


async def read_two_part(reader):
    """(header, body) of the next two-part message."""
    header_bytes, body_bytes, _ = struct.unpack(">QQQ", await reader.readexactly(24))
    data = await reader.readexactly(header_bytes + body_bytes)
    return data[:header_bytes], data[header_bytes:]


async def read_frame(reader):
    """(path, headers, payload) of the next request frame."""
    (length,) = struct.unpack(">H", await reader.readexactly(2))
    path = await reader.readexactly(length)
    (length,) = struct.unpack(">H", await reader.readexactly(2))
    headers = await reader.readexactly(length)
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    return path, headers, await reader.readexactly(length)


class Caller:
    """One raw request connection."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, address, **more):
        """Dial a request plane."""
        return cls(*await asyncio.wait_for(asyncio.open_connection(*address, **more), TIMEOUT_S))

    async def send(self, data):
        """Write bytes and wait until the kernel has taken them."""
        self.writer.write(data)
        await asyncio.wait_for(self.writer.drain(), TIMEOUT_S)

    async def reply(self, timeout_s=TIMEOUT_S):
        """The data of the next reply frame; empty means accepted."""
        (length,) = struct.unpack(">I", await self.exactly(4, timeout_s))
        return await self.exactly(length, timeout_s)

    async def exactly(self, count, timeout_s=TIMEOUT_S):
        """The next `count` bytes."""
        return await asyncio.wait_for(self.reader.readexactly(count), timeout_s)

    async def closed(self, timeout_s=TIMEOUT_S):
        """Wait for the other side's end; what came before it. A reset counts as an end."""
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(), timeout_s)
        return b""

    async def close(self):
        """Close our side."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class Stream:
    """One answer, as it came home."""

    def __init__(self):
        self.prologue = None
        self.items = []
        self.final = False
        self.ended = asyncio.Event()

    async def values(self, timeout_s=TIMEOUT_S):
        """The data of all items of a clean stream, each still in its Annotated wrapper."""
        await asyncio.wait_for(self.ended.wait(), timeout_s)
        assert self.prologue == {"error": None}, self.prologue
        assert self.final, f"the stream ended without its final marker after {self.items}"
        return self.items


class Home:
    """A call-home listener: `async with Home() as home`."""

    def __init__(self):
        self.streams = {}
        self.strangers = 0
        self.calls = set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.called, "127.0.0.1", 0, backlog=4096)
        self.address = self.server.sockets[0].getsockname()[:2]
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for call in list(self.calls):
            call.cancel()
        await asyncio.gather(*self.calls, return_exceptions=True)

    def request(self, path, value, headers=b"{}"):
        """A new stream and the request frame that asks for it, with a JSON body."""
        request_id, subject = str(uuid.uuid4()), str(uuid.uuid4())
        stream = self.streams[subject] = Stream()
        payload = envelope(request_id, self.address, subject, compact(value))
        return stream, frame(path, payload, headers)

    async def called(self, reader, writer):
        """One connection of a worker."""
        task = asyncio.current_task()
        self.calls.add(task)
        task.add_done_callback(self.calls.discard)
        stream = None
        try:
            header, _ = await asyncio.wait_for(read_two_part(reader), 10)
            stream = self.streams.pop(json.loads(header)["subject"], None)
            if stream is None:
                self.strangers += 1
                return
            header, _ = await read_two_part(reader)
            stream.prologue = json.loads(header)
            await self.collect(reader, stream)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.TimeoutError):
            pass
        finally:
            if stream is not None:
                stream.ended.set()
            writer.close()

    @staticmethod
    async def collect(reader, stream):
        """Items until the sentinel."""
        while True:
            header, body = await read_two_part(reader)
            if header:
                return
            value = json.loads(body)
            if "data" in value:
                stream.items.append(value["data"])
            stream.final = stream.final or value["complete_final"]


def fresh(**more):
    """A request value unlike every other."""
    return {"key": next(_keys), **more}


async def ask(address, path, value, home):
    """One raw request on a connection of its own; the items of its answer."""
    caller = await Caller.connect(address)
    try:
        stream, data = home.request(path, value)
        await caller.send(data)
        reply = await caller.reply()
        assert reply == b"", reply
        return await stream.values()
    finally:
        await caller.close()
