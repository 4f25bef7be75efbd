"""The worker's side of a shared-memory lane, in plain Python: sockets, mmap, struct.

    lanes = Lanes("/run/corelane/lane.sock")
    for request in lanes.requests():
        request.item(answer(request.json()), last=True)

One thread serves the lanes of all cores of the router. A request's body is a memoryview into the
slab, without a copy; it may be used until the request has ended. The slabs do not move: register
them once with a device (`Lanes.slabs`, for cuMemHostRegister or cudaHostRegister) and copy to it
from there. `Lanes(path, numa_node=numa_node_of("0000:65:00.0"))` has them near that device. What
lies where is described, byte by byte, in gpu-mem/src/lane/layout.rs.

Python has no memory barriers. Entries and counters are written in order, which x86 keeps and other
processors need not: there this module refuses to run. It never spins and wakes the router after
whatever it posts, so it needs no barrier to sleep.
"""

import ctypes
import json
import mmap
import os
import platform
import select
import socket
import struct
from collections import deque

MAGIC, VERSION, RECORD_BYTES = b"corelane", 1, 64
ENTRIES_AT, ENTRY_BYTES, BLOCK_UNIT, ITEMS_MAX, LENT_MAX = 4096, 32, 256, 128, 4096
FAIL_BYTES_MAX = 4096
# Counters and wishes, as indices of 32-bit words.
SUBMISSIONS_TAKEN, SUBMISSIONS_WISH, SUBMISSIONS_POSTED = 64 // 4, 68 // 4, 128 // 4
COMPLETIONS_TAKEN, COMPLETIONS_POSTED = 192 // 4, 256 // 4
REQUEST, STOP, KILL, RELEASED = 1, 2, 3, 4
ITEM, FINISH, FAIL, CLOSE = 17, 18, 19, 21
ANNOTATED, LAST, INVALID_ARGUMENT = 1, 2, 1
WISH_NEWS, WISH_ALL = 1, 2
ENTRY = struct.Struct("<HHIIIQQ")
HEAD = struct.Struct("<8sIIQQIIQ16x")
BLOCK = struct.Struct("<IIIIB")
CODECS = {"json": 0, "msgpack": 1}


class LaneError(Exception):
    """The router refuses this worker, or breaks the rules."""


class RouterGone(LaneError):
    """The router has closed the socket, or has lost patience with this worker."""


class Over(LaneError):
    """Nobody reads this request's items any more. It still has to be ended."""


def numa_node_of(pci_bus_id):
    """The NUMA node of a device, for `Lanes`; None where the machine does not say."""
    try:
        with open(f"/sys/bus/pci/devices/{pci_bus_id.lower()}/numa_node", encoding="ascii") as file:
            node = int(file.read())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


class Request:
    """One request. End it with an item that is the last, with finish or with fail."""

    def __init__(self, lane, number, generation, offset):
        self._lane, self._number, self._generation = lane, number, generation
        body_at, size, id_bytes, headers_bytes, codec = BLOCK.unpack_from(lane.slab, offset)
        names = bytes(lane.slab[offset + 64 : offset + 64 + id_bytes + headers_bytes])
        self.id = names[:id_bytes].decode(errors="replace")
        self.headers_bytes = names[id_bytes:]
        self.codec = "msgpack" if codec else "json"
        self.body_offset = offset + body_at
        self.body = lane.slab[self.body_offset : self.body_offset + size]
        self.stopped = self.killed = self.ended = False
        self.unreleased = 0

    def json(self):
        """The body as a Python value; a ValueError where the caller sent no JSON."""
        return json.loads(bytes(self.body))

    @property
    def headers(self):
        """The headers of the frame; a ValueError where the caller sent no JSON."""
        return json.loads(self.headers_bytes or b"{}")

    def item(self, value, annotated=True, last=False):
        """Send one value of the response: bytes in the request's codec, or what JSON can say."""
        data = value if isinstance(value, (bytes, memoryview)) else json.dumps(value).encode()
        if self.stopped or self.killed:
            raise Over(self.id)
        offset = self._lane.reserve(self, len(data))
        self._lane.slab[offset : offset + len(data)] = data
        flags = (ANNOTATED if annotated else 0) | (LAST if last else 0)
        self._say(ITEM, flags, offset, len(data), last)

    def finish(self):
        """The response has ended well, or nobody wants the rest of it."""
        self._say(FINISH, 0, 0, 0, True)

    def fail(self, why, invalid_argument=False):
        """The response has ended badly."""
        if self.stopped or self.killed:
            return self.finish()
        data = why.encode()[:FAIL_BYTES_MAX] or b"failed"
        offset = self._lane.reserve(self, len(data))
        self._lane.slab[offset : offset + len(data)] = data
        self._say(FAIL, INVALID_ARGUMENT if invalid_argument else 0, offset, len(data), True)

    def _say(self, kind, flags, offset, length, end):
        if self.ended:
            raise Over(self.id)
        if length:
            self._lane.lent[offset] = (length, self)
            self.unreleased += 1
        if end:
            self.ended = True
            self.body = None
            del self._lane.open[self._number]
        self._lane.post(kind, flags, self._number, self._generation, length, offset)


class Lane:
    """The queues and the slab that one core of the router shares with us."""

    def __init__(self, lanes, head, fds):
        _, _, self.entries, slab_bytes, self.requests_bytes, self.core, self.cores, _ = head
        queues, slab, self.wake, self.wake_router = fds
        queue_bytes = ENTRIES_AT + 2 * self.entries * ENTRY_BYTES
        self._queues = memoryview(mmap.mmap(queues, queue_bytes))
        self._words = self._queues.cast("I")
        self.map = mmap.mmap(slab, slab_bytes)
        self.slab = memoryview(self.map)
        os.close(queues)
        os.close(slab)
        self._lanes = lanes
        self._taken = self._posted = 0
        # Free ranges of our part of the slab, by place.
        self._free = [(self.requests_bytes, slab_bytes - self.requests_bytes)]
        self.open, self.lent = {}, {}
        self._words[SUBMISSIONS_WISH] = WISH_NEWS

    def take(self, found):
        """Take what the router has posted; new requests go to `found`."""
        while self._words[SUBMISSIONS_POSTED] != self._taken:
            at = ENTRIES_AT + self._taken % self.entries * ENTRY_BYTES
            entry = ENTRY.unpack_from(self._queues, at)
            self._taken = (self._taken + 1) & 0xFFFFFFFF
            self._words[SUBMISSIONS_TAKEN] = self._taken
            kind, _, number, generation, _, offset, tag = entry
            if kind == REQUEST:
                request = self.open[number] = Request(self, number, generation, offset)
                found.append(request)
            elif kind in (STOP, KILL):
                request = self.open.get(number)
                if request and request._generation == generation:
                    request.stopped, request.killed = True, kind == KILL
            elif kind == RELEASED:
                length, request = self.lent.pop(tag)
                request.unreleased -= 1
                self._give(tag, length)

    def post(self, kind, flags=0, number=0, generation=0, length=0, offset=0):
        """Tell the router something, and wake it."""
        while (self._posted - self._words[COMPLETIONS_TAKEN]) & 0xFFFFFFFF >= self.entries:
            self._lanes.wait(0.001)
        at = ENTRIES_AT + (self.entries + self._posted % self.entries) * ENTRY_BYTES
        entry = ENTRY.pack(kind, flags, number, generation, length, offset, offset)
        self._queues[at : at + ENTRY_BYTES] = entry
        self._posted = (self._posted + 1) & 0xFFFFFFFF
        self._words[COMPLETIONS_POSTED] = self._posted
        os.eventfd_write(self.wake_router, 1)

    def reserve(self, request, length):
        """A block of our part of the slab for an item; waits until there is one."""
        need = max(1, -(-length // BLOCK_UNIT)) * BLOCK_UNIT
        if need > len(self.slab) - self.requests_bytes:
            raise LaneError(f"an item of {length} bytes can never fit into the slab")
        while True:
            if request.unreleased < ITEMS_MAX and len(self.lent) < LENT_MAX:
                for index, (at, size) in enumerate(self._free):
                    if size >= need:
                        rest = [(at + need, size - need)] if size > need else []
                        self._free[index : index + 1] = rest
                        return at
            self._words[SUBMISSIONS_WISH] = WISH_ALL
            self._lanes.wait(1.0)
            self._words[SUBMISSIONS_WISH] = WISH_NEWS
            if request.stopped or request.killed:
                raise Over(request.id)

    def _give(self, at, length):
        size = max(1, -(-length // BLOCK_UNIT)) * BLOCK_UNIT
        merged = []
        for start, more in sorted([*self._free, (at, size)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + more)
            else:
                merged.append((start, more))
        self._free = merged


class Lanes:
    """All lanes of this worker: one for each core of the router."""

    def __init__(self, path, codec="json", worker_id=0, numa_node=None):
        if platform.machine() not in ("x86_64", "AMD64"):
            raise LaneError("this client relies on the memory order of x86-64")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(os.fspath(path))
        node = 0 if numa_node is None else numa_node + 1
        hello = MAGIC + struct.pack("<IB3xQI36x", VERSION, CODECS[codec], worker_id, node)
        self._socket.sendall(hello)
        self._found, self.lanes, self.id = deque(), [], None
        while not self.lanes or len(self.lanes) < self.lanes[0].cores:
            self._attach()
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        for lane in self.lanes:
            self._poll.register(lane.wake, select.POLLIN)

    def _attach(self):
        data, fds = b"", []
        while len(data) < RECORD_BYTES:
            more, new, _, _ = socket.recv_fds(self._socket, RECORD_BYTES - len(data), 4)
            fds += new
            data += more
            if not more:
                raise RouterGone("the router has closed the socket")
        head = HEAD.unpack(data)
        if head[0] == MAGIC and head[1] == 0:
            raise LaneError(data[12:].rstrip(b"\0").decode(errors="replace"))
        if head[0] != MAGIC or head[1] != VERSION or len(fds) != 4:
            raise LaneError("no offer of a lane of this version")
        self.lanes.append(Lane(self, head, fds))
        self.id = head[7]

    def slabs(self):
        """(address, bytes) of each slab, to register it with a device."""
        maps = [lane.map for lane in self.lanes]
        place = [ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in maps]
        return [(at, len(each)) for at, each in zip(place, maps)]

    def wait(self, timeout_s=None):
        """Sleep until the router says something, and take it."""
        ready = self._poll.poll(None if timeout_s is None else max(1, int(timeout_s * 1000)))
        for fd, _ in ready:
            if fd == self._socket.fileno():
                raise RouterGone("the router is gone")
            os.eventfd_read(fd)
        self.take()

    def take(self):
        """Take what is there, without waiting."""
        for lane in self.lanes:
            lane.take(self._found)

    def requests(self):
        """Requests as they come, for ever."""
        while True:
            self.take()
            while not self._found:
                self.wait()
            yield self._found.popleft()

    def close(self):
        """Ask for no new requests; what comes all the same wants an answer."""
        for lane in self.lanes:
            lane.post(CLOSE)
