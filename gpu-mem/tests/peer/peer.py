"""An independent peer of the GPU memory service: msgspec messages, plain sockets, no code of ours.

Usage: peer.py DIR, where DIR holds weights.sock, kv_cache.sock and weights-v2.sock of a service
that serves host memory. Runs through the life of a pool and exits with 0 if every answer was right.
"""

import array
import mmap
import os
import signal
import socket
import struct
import sys
import time
from typing import List, Optional, Union

import msgspec
from messages import (
    AllocateRequest,
    AllocateResponse,
    CommitLayoutRequest,
    CommitLayoutResponse,
    CommitRequest,
    CommitResponse,
    ErrorResponse,
    EventHistoryRequest,
    EventHistoryResponse,
    ExportAllocationRequest,
    ExportAllocationResponse,
    ExportRequest,
    GetAllocationResponse,
    HandshakeRequest,
    HandshakeResponse,
    ListAllocationsRequest,
    ListAllocationsResponse,
    MetadataGetRequest,
    MetadataGetResponse,
    MetadataListRequest,
    MetadataListResponse,
    MetadataPutRequest,
    MetadataPutResponse,
    RuntimeStateRequest,
    RuntimeStateResponse,
    message,
)

PATIENCE_S = 20.0
MIB2 = 2 << 20

Reply = Union[
    HandshakeResponse,
    CommitResponse,
    CommitLayoutResponse,
    AllocateResponse,
    ExportAllocationResponse,
    GetAllocationResponse,
    ListAllocationsResponse,
    MetadataPutResponse,
    MetadataGetResponse,
    MetadataListResponse,
    RuntimeStateResponse,
    EventHistoryResponse,
    ErrorResponse,
]


StrictHandshake = message(
    "handshake_request",
    strict=True,
    lock_type=str,
    expected_identity=(Optional[tuple[str, str]], None),
)
StrictGranted = message(
    "handshake_response", strict=True, lock_type=str, server_nonce=str, gpu_uuid=str
)
StrictAllocate = message("allocate_request", strict=True, allocation_id=str, aligned_size=int)
StrictExport = message("export_request", strict=True, allocation_id=str)
StrictExported = message("export_response", strict=True)
StrictSuccess = message("success_response", strict=True)
StrictError = message("error_response", strict=True, message=str, out_of_memory=(bool, False))
StrictReply = Union[StrictGranted, StrictExported, StrictSuccess, StrictError]

# Ours, beside the first generation's. The peers above know none of it, as stock peers do not.

IpcOffer = message(
    "corelane_ipc_offer_request",
    handle=bytes,
    base_bytes=int,
    offset_bytes=int,
    size=int,
    tag=(str, "default"),
    value=(bytes, b""),
)
IpcOffered = message(
    "corelane_ipc_offer_response", allocation_id=str, slot=int, server_nonce=str
)


class IpcEntry(msgspec.Struct):
    """What is lent."""

    allocation_id: str
    base_bytes: int
    offset_bytes: int
    size: int
    tag: str
    slot: int
    exporter_pid: int


IpcList = message("corelane_ipc_list_request", tag=(Optional[str], None))
IpcListed = message("corelane_ipc_list_response", allocations=List[IpcEntry])
IpcOpen = message("corelane_ipc_open_request", allocation_id=str)
IpcOpened = message("corelane_ipc_open_response", entry=IpcEntry, handle=bytes, value=bytes)
IpcState = message("corelane_ipc_state_request", allocation_id=str)
IpcStanding = message("corelane_ipc_state_response", held=bool, holders=int, server_nonce=str)

IpcReply = Union[
    HandshakeResponse,
    CommitResponse,
    ErrorResponse,
    IpcOffered,
    IpcListed,
    IpcOpened,
    IpcStanding,
]

ENCODER = msgspec.msgpack.Encoder()
DECODER = msgspec.msgpack.Decoder(Reply)
STRICT = msgspec.msgpack.Decoder(StrictReply)
IPC = msgspec.msgpack.Decoder(IpcReply)


class Peer:
    """One connection. Descriptors are looked for beside the first bytes of a reply only."""

    def __init__(self, path, decoder=DECODER):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(path)
        self.decoder = decoder

    def say(self, message):
        payload = ENCODER.encode(message)
        self.sock.sendall(struct.pack("!I", len(payload)) + payload)

    def hear(self):
        room = socket.CMSG_LEN(struct.calcsize("i"))
        data, ancillary, _, _ = self.sock.recvmsg(4096, room)
        if not data:
            return None, None
        fds = array.array("i")
        for level, kind, bytes_ in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(bytes_[: len(bytes_) - len(bytes_) % fds.itemsize])
        assert len(fds) <= 1
        while len(data) < 4 or len(data) < 4 + struct.unpack("!I", data[:4])[0]:
            more = self.sock.recv(4096)
            assert more, "the reply ends in its middle"
            data += more
        (length,) = struct.unpack("!I", data[:4])
        assert len(data) == 4 + length, "nothing may follow a reply"
        return self.decoder.decode(data[4:]), (fds[0] if fds else None)

    def ask(self, message, kind):
        self.say(message)
        reply, fd = self.hear()
        assert isinstance(reply, kind), reply
        return (reply, fd) if fd is not None else reply

    def lock(self, lock_type, timeout_ms=10_000):
        request = HandshakeRequest(lock_type=lock_type, timeout_ms=timeout_ms)
        return self.ask(request, HandshakeResponse)

    def close(self):
        self.sock.close()


def probe(path):
    return Peer(path).ask(RuntimeStateRequest(), RuntimeStateResponse)


def until(path, wanted):
    deadline = time.monotonic() + PATIENCE_S
    while not wanted(probe(path)):
        assert time.monotonic() < deadline, probe(path)
        time.sleep(0.002)


def first_generation(path):
    assert probe(path).state == "EMPTY"
    writer = Peer(path)
    granted = writer.lock("rw_or_ro")
    assert granted.success and granted.granted_lock_type == "rw" and not granted.committed
    made = writer.ask(AllocateRequest(size=1000, tag="weights"), AllocateResponse)
    assert (made.size, made.aligned_size, made.layout_slot) == (1000, MIB2, 0)
    export = ExportAllocationRequest(allocation_id=made.allocation_id)
    _, fd = writer.ask(export, ExportAllocationResponse)
    with mmap.mmap(fd, MIB2) as memory:
        memory[:5] = b"hello"
    os.close(fd)
    put = MetadataPutRequest(key="w", allocation_id=made.allocation_id, offset_bytes=0, value=b"{}")
    assert writer.ask(put, MetadataPutResponse).success
    assert writer.ask(CommitRequest(), CommitResponse).success
    assert writer.hear() == (None, None), "the server closes after a commit"

    reader = Peer(path)
    granted = reader.lock("rw_or_ro")
    assert granted.granted_lock_type == "ro" and granted.committed
    listed = reader.ask(ListAllocationsRequest(), ListAllocationsResponse).allocations
    assert [a.allocation_id for a in listed] == [made.allocation_id]
    found = reader.ask(MetadataGetRequest(key="w"), MetadataGetResponse)
    assert (found.found, found.value, found.offset_bytes) == (True, b"{}", 0)
    assert reader.ask(MetadataListRequest(), MetadataListResponse).keys == ["w"]
    for request, kind in (
        (export, ExportAllocationResponse),
        (ExportRequest(allocation_id=made.allocation_id), GetAllocationResponse),
    ):
        _, fd = reader.ask(request, kind)
        with mmap.mmap(fd, MIB2, prot=mmap.PROT_READ) as memory:
            assert memory[:5] == b"hello"
        try:
            mmap.mmap(fd, MIB2, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            raise AssertionError("a reader's descriptor maps for writing")
        except PermissionError:
            pass
        os.close(fd)
    refused = reader.ask(AllocateRequest(size=1), ErrorResponse)
    assert "not allowed" in refused.error and refused.code == 0

    waiter = Peer(path)
    waiter.say(HandshakeRequest(lock_type="rw"))
    until(path, lambda state: state.waiting_writers == 1)
    late = Peer(path).lock("ro", timeout_ms=20)
    assert not late.success and late.committed
    waiter.close()
    until(path, lambda state: state.waiting_writers == 0)
    reader.close()
    until(path, lambda state: state.state == "COMMITTED")
    assert probe(path).allocation_count == 1, "a dead waiter costs nothing"


def killed_writer(path):
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        writer = Peer(path)
        writer.lock("rw")
        writer.ask(AllocateRequest(size=1), AllocateResponse)
        os.write(tell, b".")
        signal.pause()
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    until(path, lambda state: (state.state, state.allocation_count) == ("EMPTY", 0))
    events = Peer(path).ask(EventHistoryRequest(), EventHistoryResponse).events
    assert [e.kind for e in events[-2:]] == ["rw_aborted", "allocations_cleared"], events


def durable_layout(path):
    writer = Peer(path)
    assert writer.lock("rw_data_or_rw").granted_lock_type == "rw"
    made = writer.ask(AllocateRequest(size=1, tag="kv"), AllocateResponse)
    sealed = writer.ask(CommitLayoutRequest(), CommitLayoutResponse)
    assert sealed.granted_lock_type == "rw_data" and len(sealed.memory_layout_hash) == 64
    writer.close()
    until(path, lambda state: state.state == "LAYOUT_COMMITTED" and state.layout_committed)
    heir = Peer(path)
    assert heir.lock("rw_data_or_rw").granted_lock_type == "rw_data"
    listed = heir.ask(ListAllocationsRequest(), ListAllocationsResponse).allocations
    assert [a.allocation_id for a in listed] == [made.allocation_id]
    assert probe(path).memory_layout_hash == sealed.memory_layout_hash
    heir.close()


HANDLE = bytes(range(1, 65))


def lend(path, tell):
    """In a child: lends memory by a handle that only a driver could read, until it is killed."""
    writer = Peer(path, IPC)
    assert writer.lock("rw").granted_lock_type == "rw"
    short = IpcOffer(handle=HANDLE[:63], base_bytes=MIB2, offset_bytes=0, size=1)
    writer.ask(short, ErrorResponse)
    offer = IpcOffer(handle=HANDLE, base_bytes=MIB2, offset_bytes=512, size=1000, value=b"{}")
    offered = writer.ask(offer, IpcOffered)
    own = writer.ask(IpcOpen(allocation_id=offered.allocation_id), ErrorResponse)
    assert "not allowed" in own.error
    assert writer.ask(CommitRequest(), CommitResponse).success
    os.write(tell, offered.allocation_id.encode())
    signal.pause()


def lent_memory(path):
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        lend(path, tell)
    name = os.read(ready, 64).decode()
    until(path, lambda state: state.state == "COMMITTED")
    assert probe(path).allocation_count == 0

    stock = Peer(path)
    assert stock.lock("ro").granted_lock_type == "ro"
    assert stock.ask(ListAllocationsRequest(), ListAllocationsResponse).allocations == []

    reader = Peer(path, IPC)
    assert reader.lock("ro").granted_lock_type == "ro"
    (entry,) = reader.ask(IpcList(), IpcListed).allocations
    opened = reader.ask(IpcOpen(allocation_id=name), IpcOpened)
    assert (opened.entry, opened.handle, opened.value) == (entry, HANDLE, b"{}")
    assert (entry.offset_bytes, entry.size, entry.exporter_pid) == (512, 1000, pid)
    state = Peer(path, IPC).ask(IpcState(allocation_id=name), IpcStanding)
    assert (state.held, state.holders) == (True, 2)

    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    lost = reader.ask(IpcOpen(allocation_id=name), ErrorResponse)
    assert "lost" in lost.error
    stock.close()
    reader.close()
    until(path, lambda state: state.state == "EMPTY")
    events = Peer(path).ask(EventHistoryRequest(), EventHistoryResponse).events
    assert [e.kind for e in events[-2:]] == ["contents_lost", "allocations_cleared"], events


def second_generation(path):
    writer = Peer(path, STRICT)
    granted = writer.ask(StrictHandshake(lock_type="rw_or_ro"), StrictGranted)
    assert granted.lock_type == "rw"
    name = "00000000-0000-4000-8000-000000000001"
    wrong = writer.ask(StrictAllocate(allocation_id=name, aligned_size=5), StrictError)
    assert not wrong.out_of_memory
    writer.ask(StrictAllocate(allocation_id=name, aligned_size=MIB2), StrictSuccess)
    _, fd = writer.ask(StrictExport(allocation_id=name), StrictExported)
    os.close(fd)
    writer.ask(CommitRequest(), StrictSuccess)
    reader = Peer(path, STRICT)
    identity = (granted.server_nonce, granted.gpu_uuid)
    again = reader.ask(StrictHandshake(lock_type="ro", expected_identity=identity), StrictGranted)
    assert again.lock_type == "ro"
    stranger = Peer(path, STRICT)
    other = StrictHandshake(lock_type="ro", expected_identity=("other", "GPU-x"))
    stranger.ask(other, StrictError)
    assert stranger.hear() == (None, None)


def main():
    folder = sys.argv[1]
    weights = os.path.join(folder, "weights.sock")
    first_generation(weights)
    killed_writer(weights)
    durable_layout(os.path.join(folder, "kv_cache.sock"))
    lent_memory(weights)
    second_generation(os.path.join(folder, "weights-v2.sock"))
    print("all answers were right")


if __name__ == "__main__":
    main()
