#!/usr/bin/env python3
"""Writes libzmq.json: what sockets of a real libzmq put on the wire, captured with pyzmq.

Each capture is one side of a conversation with a plain TCP socket that speaks ZMTP by hand, up to
a quiet moment. Run it again with another libzmq: `python capture.py`, pyzmq installed.
"""

import json
import socket
import struct
import threading
from pathlib import Path

import zmq

PATIENCE_S = 60
QUIET_S = 0.3


def greeting(minor, mechanism=b"NULL"):
    """Ours."""
    return b"\xff" + bytes(8) + b"\x7f\x03" + bytes([minor]) + mechanism.ljust(20, b"\0") + bytes(32)


def ready(kind):
    """Our READY."""
    body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    return b"\x04" + bytes([len(body)]) + body


def frame(flags, body):
    """A frame of ours."""
    return bytes([flags, len(body)]) + body


class Wire:
    """The other end of a connection, with what it has said."""

    def __init__(self, stream):
        self.stream = stream
        self.stream.settimeout(PATIENCE_S)

    def say(self, data):
        """Send."""
        self.stream.sendall(data)

    def read(self, count):
        """Exactly so many bytes."""
        data = b""
        while len(data) < count:
            more = self.stream.recv(count - len(data))
            assert more, f"the end after {data!r}"
            data += more
        return data

    def frame(self):
        """One whole frame, as it came."""
        head = self.read(1)
        size = self.read(8 if head[0] & 2 else 1)
        return head + size + self.read(int.from_bytes(size, "big"))

    def rest(self):
        """What comes until it is quiet, or the end."""
        self.stream.settimeout(QUIET_S)
        data = b""
        try:
            while more := self.stream.recv(65536):
                data += more
        except (TimeoutError, ConnectionResetError):
            pass
        self.stream.settimeout(PATIENCE_S)
        return data

    def shake_hands(self, minor, kind):
        """Both greetings and both READYs; returns theirs."""
        self.say(greeting(minor))
        theirs = self.read(64)
        self.say(ready(kind))
        return theirs, self.frame()


def connected(context, kind, **options):
    """A socket of libzmq that dials, and the other end."""
    listener = socket.create_server(("127.0.0.1", 0))
    ours = context.socket(kind)
    ours.linger = 0
    for name, value in options.items():
        setattr(ours, name, value)
    ours.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
    return ours, Wire(listener.accept()[0])


def subscriber(context, captures, minor):
    """What a SUB says: handshake, one wish, its end, and an answer to PING."""
    sub, wire = connected(context, zmq.SUB)
    version = f"3.{minor}"
    theirs, hello = wire.shake_hands(minor, b"PUB")
    captures[f"greeting of a SUB to {version}"] = theirs
    captures[f"READY of a SUB to {version}"] = hello
    for name, act, prefix in [
        ("subscription", sub.subscribe, b"kv-events"),
        ("subscription to all", sub.subscribe, b""),
        ("long subscription", sub.subscribe, b"namespace." + b"x" * 300),
        ("end of a subscription", sub.unsubscribe, b"kv-events"),
    ]:
        act(prefix)
        captures[f"{name} to {version}"] = wire.frame()
    if minor:
        # It looks at what it was sent when its user does.
        wire.say(frame(4, b"\x04PING\x00\x64ctx"))
        poll = threading.Thread(target=sub.poll, args=(int(1000 * QUIET_S),))
        poll.start()
        captures["PONG"] = wire.frame()
        poll.join()
    sub.close()


def publisher(context, captures, minor):
    """What a PUB says: handshake, a short event and a long one."""
    pub, wire = connected(context, zmq.XPUB)
    _, hello = wire.shake_hands(minor, b"SUB")
    captures[f"READY of an XPUB to 3.{minor}"] = hello
    wish = frame(4, b"\x09SUBSCRIBEkv") if minor else frame(0, b"\x01kv")
    wire.say(wish)
    assert pub.recv() == b"\x01kv"
    for name, size in [("short event", 40), ("long event", 300), ("empty event", 0)]:
        body = struct.pack(">BI", 1, size) + bytes(range(256)) * 2
        pub.send_multipart(
            [b"kv-events", struct.pack(">Q", 7), struct.pack(">Q", size), body[: 5 + size]]
        )
        captures[f"{name} to 3.{minor}"] = b"".join(wire.frame() for _ in range(4))
    pub.close()


def heartbeat(context, captures):
    """PING of a socket that has heartbeats on."""
    pub, wire = connected(context, zmq.PUB, heartbeat_ivl=50, heartbeat_ttl=10_000)
    wire.shake_hands(1, b"SUB")
    captures["PING"] = wire.frame()
    pub.close()


def handshakes(context, captures):
    """READY of the other kinds, and the greetings of other mechanisms."""
    for name, kind, peer in [("PUB", zmq.PUB, b"SUB"), ("XSUB", zmq.XSUB, b"PUB")]:
        ours, wire = connected(context, kind)
        captures[f"READY of a {name}"] = wire.shake_hands(1, peer)[1]
        ours.close()
    public, secret = zmq.curve_keypair()
    plain = {"plain_username": b"a", "plain_password": b"b"}
    curve = {"curve_secretkey": secret, "curve_publickey": public, "curve_serverkey": public}
    for name, options in [("PLAIN", plain), ("CURVE", curve)]:
        ours, wire = connected(context, zmq.SUB, **options)
        wire.say(greeting(1, name.encode()))
        captures[f"greeting of a SUB with {name}"] = wire.read(64)
        ours.close()


def main():
    """Capture all, and write the file."""
    context, captures = zmq.Context(), {}
    for minor in (1, 0):
        subscriber(context, captures, minor)
        publisher(context, captures, minor)
    heartbeat(context, captures)
    handshakes(context, captures)
    context.destroy(linger=0)
    rows = [{"name": name, "hex": data.hex()} for name, data in captures.items()]
    text = json.dumps({"libzmq": zmq.zmq_version(), "captures": rows}, indent=1)
    Path(__file__).with_name("libzmq.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
