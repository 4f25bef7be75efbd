#!/usr/bin/env python3
"""Events over plain TCP, with sockets only: what `[events] tcp` of corelane speaks.

    events_tcp.py HOST:PORT tail [PREFIX ...]
    events_tcp.py HOST:PORT publish SCOPE TOPIC < lines

`tail` prints the topic, the publisher, the number and the size of each event whose subject begins
with one of the prefixes (all without any). `publish` makes each line of standard input an event of
the topic in a scope such as `namespace.demo.component.backend.endpoint.generate`. The bytes are
described in codec/src/event/hello.rs (hello and answer) and codec/src/event/frame.rs (frames).
"""

import random
import socket
import struct
import sys
import time

MAGIC, VERSION, PUBLISHER, SUBSCRIBER = b"\xc1EVT", 1, 1, 2
FIXED = struct.Struct(">4sBBHII")
FRAME = struct.Struct(">BI")
NAMES = ("publisher_id", "sequence", "published_at", "topic", "payload")


class Refused(Exception):
    """The other side does not serve us; the text says why."""


def read_exactly(stream, count):
    """That many bytes, or EOFError."""
    data = stream.read(count)
    if len(data) < count:
        raise EOFError("the connection has ended")
    return data


def connect(address, role, prefixes):
    """A connected socket after hello and answer, and its reader."""
    host, port = address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream = connection.makefile("rb")
    prefixes = [prefix.encode() for prefix in prefixes]
    listed = b"".join(struct.pack(">H", len(prefix)) + prefix for prefix in prefixes)
    head = FIXED.pack(MAGIC, VERSION, role, len(prefixes), 0, len(listed))
    connection.sendall(head + listed)
    magic, version, verdict, text_bytes, _, _ = FIXED.unpack(read_exactly(stream, FIXED.size))
    if (magic, version) != (MAGIC, VERSION):
        raise Refused("no answer of plain events")
    if verdict:
        raise Refused(read_exactly(stream, text_bytes).decode())
    return connection, stream


def write_uint(value):
    """A MessagePack integer of a form that all readers know."""
    return bytes([value]) if value < 128 else b"\xcf" + struct.pack(">Q", value)


def write_bytes(head, data):
    """MessagePack text (d9..) or binary (c4..), by its length."""
    if len(data) < 1 << 8:
        return bytes([head, len(data)]) + data
    if len(data) < 1 << 16:
        return struct.pack(">BH", head + 1, len(data)) + data
    return struct.pack(">BI", head + 2, len(data)) + data


def envelope(publisher_id, sequence, topic, payload):
    """An event as Dynamo writes it: a map in this order."""
    topic = topic.encode()
    text = bytes([0xA0 | len(topic)]) + topic if len(topic) < 32 else write_bytes(0xD9, topic)
    values = [
        write_uint(publisher_id), write_uint(sequence), write_uint(int(time.time() * 1000)), text,
        write_bytes(0xC4, payload),
    ]  # fmt: skip
    named = zip(NAMES, values)
    return b"\x85" + b"".join(
        bytes([0xA0 | len(name)]) + name.encode() + value for name, value in named
    )


def read_value(data, at):
    """The MessagePack value at `at`, of those that envelopes have, and where it ends."""
    head = data[at]
    if head < 0x80:
        return head, at + 1
    if 0xA0 <= head < 0xC0:
        end = at + 1 + (head & 31)
        return data[at + 1 : end].decode(), end
    if 0xCC <= head <= 0xCF:
        end = at + 1 + (1 << head - 0xCC)
        return int.from_bytes(data[at + 1 : end], "big"), end
    if 0xC4 <= head <= 0xC6 or 0xD9 <= head <= 0xDB:
        width = 1 << (head - (0xC4 if head < 0xD0 else 0xD9))
        begin = at + 1 + width
        end = begin + int.from_bytes(data[at + 1 : begin], "big")
        value = data[begin:end]
        return (value if head < 0xD0 else value.decode()), end
    raise ValueError(f"no value of an envelope: {head:#x}")


def read_envelope(data):
    """An envelope as a dictionary; a map in any order, or an array."""
    found, at = {}, 1
    for index in range(data[0] & 15):
        name = NAMES[index]
        if data[0] < 0x90:
            name, at = read_value(data, at)
        found[name], at = read_value(data, at)
    return found


def subscribe(address, prefixes=("",)):
    """The envelopes of all events that are wanted, as they come."""
    _, stream = connect(address, SUBSCRIBER, prefixes or ("",))
    while True:
        version, count = FRAME.unpack(read_exactly(stream, FRAME.size))
        assert version == 1, version
        yield read_envelope(read_exactly(stream, count))


class Publisher:
    """Events of one scope."""

    def __init__(self, address, scope):
        self.connection, _ = connect(address, PUBLISHER, [scope])
        self.publisher_id = random.getrandbits(53)
        self.sequence = 0

    def publish(self, topic, payload):
        """One event; its number goes up by one each time."""
        event = envelope(self.publisher_id, self.sequence, topic, payload)
        self.sequence += 1
        self.connection.sendall(FRAME.pack(1, len(event)) + event)


def main():
    """What the command line says."""
    match sys.argv[1:]:
        case [address, "tail", *prefixes]:
            for event in subscribe(address, prefixes):
                size = len(event["payload"])
                print(event["topic"], event["publisher_id"], event["sequence"], size, flush=True)
        case [address, "publish", scope, topic]:
            publisher = Publisher(address, scope)
            for line in sys.stdin.buffer:
                publisher.publish(topic, line.rstrip(b"\n"))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main()
    except (EOFError, Refused) as error:
        sys.exit(f"events_tcp.py: {error}")
    except (BrokenPipeError, KeyboardInterrupt):
        pass
