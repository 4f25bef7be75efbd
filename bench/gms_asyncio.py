"""The yardstick of `corelane-bench gms`: the same protocol on one asyncio event loop.

    gms_asyncio.py [--log] SOCKET...

Serves the first generation's messages (spec/gpu-memory.md, section 4) with msgspec on asyncio
streams, one pool for each socket, and lends memory of the host. It is written as such a server is
written in Python: a coroutine for each client, a condition for each pool, everybody woken when the
lock may have become free. Prints `ready` when it listens. Only what the bench needs is in it.
"""

import argparse
import asyncio
import fcntl
import hashlib
import logging
import os
import socket
import struct
import sys
import uuid
from pathlib import Path
from typing import Dict, List, Union

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu-mem" / "tests" / "peer"))
from messages import (  # noqa: E402
    AllocateRequest,
    AllocateResponse,
    CommitRequest,
    CommitResponse,
    ErrorResponse,
    ExportAllocationRequest,
    ExportAllocationResponse,
    FreeAllocationRequest,
    FreeAllocationResponse,
    HandshakeRequest,
    HandshakeResponse,
    RuntimeStateRequest,
    RuntimeStateResponse,
)

GRANULARITY_BYTES = 2 << 20
F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_GROW = 1033, 2, 4
LOG = logging.getLogger("gms")

Request = Union[
    HandshakeRequest,
    CommitRequest,
    AllocateRequest,
    ExportAllocationRequest,
    FreeAllocationRequest,
    RuntimeStateRequest,
]
DECODER = msgspec.msgpack.Decoder(Request)
ENCODER = msgspec.msgpack.Encoder()


class Allocation:
    """A block of host memory whose size nobody can change."""

    def __init__(self, size, tag, slot):
        self.id = str(uuid.uuid4())
        self.size, self.tag, self.slot = size, tag, slot
        self.aligned = -(-size // GRANULARITY_BYTES) * GRANULARITY_BYTES
        self.fd = os.memfd_create("gms", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.aligned)
        fcntl.fcntl(self.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)

    def export(self, grant):
        """A descriptor for one client."""
        if grant == "rw":
            return os.dup(self.fd)
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)


class Pool:
    """One lock and what it guards."""

    def __init__(self):
        self.changed = asyncio.Condition()
        self.writer, self.readers, self.waiting_writers = None, 0, 0
        self.committed, self.hash, self.slot = False, "", 0
        self.allocations: Dict[str, Allocation] = {}

    def state(self):
        """The derived state."""
        if self.writer:
            return "RW"
        if self.readers:
            return "RO"
        return "COMMITTED" if self.committed else "EMPTY"

    def grantable(self, lock_type):
        """What a client would get now."""
        free = self.writer is None and self.readers == 0
        readable = self.committed and self.writer is None and self.waiting_writers == 0
        if lock_type == "rw":
            return "rw" if free else None
        if lock_type == "ro":
            return "ro" if readable else None
        if readable:
            return "ro"
        return "rw" if free and not self.committed else None

    async def acquire(self, client, lock_type, timeout_ms):
        """Waits for the lock."""
        timeout = None if timeout_ms is None else timeout_ms / 1000
        async with self.changed:
            grant = self.grantable(lock_type)
            if grant is None:
                self.waiting_writers += lock_type == "rw"
                waiting = lock_type == "rw"

                def ready():
                    # A writer that waits is not kept out by itself.
                    return self.grantable(lock_type) is not None

                try:
                    await asyncio.wait_for(self.changed.wait_for(ready), timeout)
                except asyncio.TimeoutError:
                    return None
                finally:
                    self.waiting_writers -= waiting
                grant = self.grantable(lock_type)
            before = self.state()
            if grant == "rw":
                self.clear()
                self.writer = client
            else:
                self.readers += 1
            LOG.info("%s -> %s (%s connects)", before, self.state(), grant)
            return grant

    async def release(self, client, grant):
        """A session is over."""
        async with self.changed:
            before = self.state()
            if grant == "ro":
                self.readers -= 1
            elif self.writer is client:
                self.clear()
                self.writer = None
            LOG.info("%s -> %s (%s leaves)", before, self.state(), grant)
            self.changed.notify_all()

    async def commit(self):
        """Publishes what the writer has made."""
        async with self.changed:
            digest = hashlib.sha256()
            for rank, one in enumerate(sorted(self.allocations.values(), key=lambda a: a.slot)):
                digest.update(f"{rank}:{one.size}:{one.aligned}:{one.tag}".encode())
            self.hash, self.committed, self.writer = digest.hexdigest(), True, None
            LOG.info("RW -> %s (commit)", self.state())
            self.changed.notify_all()

    def clear(self):
        """Gives everything up."""
        for one in self.allocations.values():
            os.close(one.fd)
        self.allocations.clear()
        self.committed, self.hash, self.slot = False, "", 0

    def allocate(self, request):
        """Makes memory."""
        one = Allocation(request.size, request.tag, self.slot)
        self.slot += 1
        self.allocations[one.id] = one
        return AllocateResponse(
            allocation_id=one.id, size=one.size, aligned_size=one.aligned, layout_slot=one.slot
        )

    def runtime_state(self):
        """How it stands."""
        return RuntimeStateResponse(
            state=self.state(),
            has_rw_session=self.writer is not None,
            ro_session_count=self.readers,
            waiting_writers=self.waiting_writers,
            committed=self.committed,
            is_ready=self.committed and self.writer is None,
            allocation_count=len(self.allocations),
            memory_layout_hash=self.hash,
        )


class Session:
    """One client."""

    def __init__(self, pool, reader, writer):
        self.pool, self.reader, self.writer = pool, reader, writer
        self.grant, self.twin = None, None

    async def receive(self):
        """The next request."""
        (length,) = struct.unpack("!I", await self.reader.readexactly(4))
        return DECODER.decode(await self.reader.readexactly(length))

    async def send(self, message, fd=None):
        """A reply; with a descriptor in one sendmsg on a twin of the socket."""
        payload = ENCODER.encode(message)
        frame = struct.pack("!I", len(payload)) + payload
        if fd is None:
            self.writer.write(frame)
            await self.writer.drain()
            return
        if self.twin is None:
            self.twin = self.writer.get_extra_info("socket").dup()
        try:
            socket.send_fds(self.twin, [frame], [fd])
        finally:
            os.close(fd)

    async def run(self):
        """From the first message to the end."""
        try:
            first = await self.receive()
            if isinstance(first, RuntimeStateRequest):
                await self.send(self.pool.runtime_state())
            elif isinstance(first, HandshakeRequest):
                await self.hold(first)
            else:
                await self.send(ErrorResponse(error="Expected HandshakeRequest"))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            pass
        finally:
            if self.grant is not None:
                await self.pool.release(self, self.grant)
            if self.twin is not None:
                self.twin.close()
            self.writer.close()

    async def hold(self, request):
        """Waits for the lock and serves its holder."""
        grant = await self.pool.acquire(self, request.lock_type, request.timeout_ms)
        self.grant = grant
        committed = self.pool.committed
        await self.send(
            HandshakeResponse(
                success=grant is not None, committed=committed, granted_lock_type=grant
            )
        )
        while grant is not None:
            request = await self.receive()
            if isinstance(request, CommitRequest) and grant == "rw":
                await self.pool.commit()
                self.grant = None
                await self.send(CommitResponse(success=True))
                return
            await self.answer(request)

    async def answer(self, request):
        """What a holder asks."""
        pool = self.pool
        if isinstance(request, AllocateRequest) and self.grant == "rw":
            await self.send(pool.allocate(request))
        elif isinstance(request, FreeAllocationRequest) and self.grant == "rw":
            one = pool.allocations.pop(request.allocation_id, None)
            if one is not None:
                os.close(one.fd)
            await self.send(FreeAllocationResponse(success=one is not None))
        elif isinstance(request, ExportAllocationRequest):
            one = pool.allocations.get(request.allocation_id)
            if one is None:
                await self.send(ErrorResponse(error="Unknown allocation"))
                return
            reply = ExportAllocationResponse(
                allocation_id=one.id,
                size=one.size,
                aligned_size=one.aligned,
                tag=one.tag,
                layout_slot=one.slot,
            )
            await self.send(reply, one.export(self.grant))
        else:
            await self.send(ErrorResponse(error="not allowed"))


async def serve(paths: List[str]):
    """Listens on all sockets for ever."""
    servers = []
    for path in paths:
        pool = Pool()

        def connected(reader, writer, pool=pool):
            return Session(pool, reader, writer).run()

        servers.append(await asyncio.start_unix_server(connected, path, backlog=1024))
    print("ready", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main():
    """Reads the command line and serves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", action="store_true", help="one line for each transition")
    parser.add_argument("sockets", nargs="+")
    args = parser.parse_args()
    level = logging.INFO if args.log else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(message)s")
    asyncio.run(serve(args.sockets))


if __name__ == "__main__":
    main()
