"""What the tests of events share: our broker, sockets of libzmq, stock peers, our commands."""

import json
import struct
import sys
from pathlib import Path

import zmq

from lab import corelane_program, free_port, metric_sum, to_toml, wait_for

HERE = Path(__file__).resolve().parent
SUBJECT = b"namespace.lab.component.backend.endpoint.generate.kv_metrics"
TOPIC = "forward-pass-metrics"
METRICS = json.dumps({"version": 1, "worker_id": "7", "dp_rank": 0, "counter_id": 3})
PATIENCE_MS = 60_000
PATIENCE_S = PATIENCE_MS / 1000


def message(sequence, publisher=7, subject=SUBJECT, size=200):
    """The four parts of an event; the envelope is of no interest to a broker."""
    body = bytes([sequence % 251]) * size
    numbers = [struct.pack(">Q", number) for number in (publisher, sequence)]
    return [subject, *numbers, struct.pack(">BI", 1, len(body)) + body]


def sequence_of(parts):
    """Its number."""
    assert len(parts) == 4, parts
    return struct.unpack(">Q", parts[2])[0]


class Broker:
    """`corelane serve` with nothing but a broker."""

    def __init__(self, lab, env=None, **events):
        self.lab, self.env = lab, env
        self.status_port, self.ports = free_port(), [free_port(), free_port()]
        self.events = {"broker": True, "namespace": lab.namespace, **events}
        self.process = None
        self.start()

    def start(self):
        """Start it, again at the same ports."""
        bind = {
            key: f"tcp://127.0.0.1:{port}" for key, port in zip(("xsub", "xpub"), self.ports)
        }
        config = {
            "server": {"host": "127.0.0.1", "status_port": self.status_port},
            "discovery": {"backend": "etcd"},
            "drain": {"grace_s": 0, "timeout_s": 5},
            "events": {**self.events, **bind},
        }
        lines = []
        for section, values in config.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {to_toml(value)}" for key, value in values.items()]
        path = self.lab.folder / "events.toml"
        path.write_text("\n".join(lines) + "\n")
        command = [corelane_program(), "serve", "--config", path]
        self.process = self.lab.start("broker", command, self.env)
        wait_for("the broker in etcd", self.records, PATIENCE_S)

    def records(self):
        """Its record, as Dynamo looks for it."""
        assert self.process.alive(), self.process.tail()
        key = f"v1/event_channels/namespace/{self.lab.namespace}/component/zmq_broker"
        return self.lab.etcd.records(f"{key}/topic/broker/")

    def stop(self):
        """SIGTERM, and its end."""
        self.process.terminate()
        assert self.process.wait(PATIENCE_S) == 0, self.process.tail()

    def count(self, name):
        """One of its counters or gauges."""
        return metric_sum(self.lab.metrics(self), rf"^corelane_events_{name}$")

    def until(self, name, value):
        """Wait for it."""
        wait_for(f"{name} is {value}", lambda: self.count(name) == value, PATIENCE_S)


def subscriber(context, broker, prefix=b"", kind=zmq.SUB, protect=None, port=None):
    """A subscriber at the broker, or at another port of it."""
    socket = context.socket(kind)
    socket.rcvhwm = 0
    socket.rcvtimeo = PATIENCE_MS
    if protect:
        protect(socket)
    socket.connect(f"tcp://127.0.0.1:{port or broker.ports[1]}")
    if kind == zmq.SUB:
        socket.subscribe(prefix)
    else:
        socket.send(b"\x01" + prefix)
    return socket


def publisher(context, broker, kind=zmq.XPUB, protect=None, port=None):
    """A publisher that knows of the subscriptions (an XPUB: it sees them)."""
    socket = context.socket(kind)
    socket.sndhwm = 0
    socket.rcvtimeo = PATIENCE_MS
    if protect:
        protect(socket)
    socket.connect(f"tcp://127.0.0.1:{port or broker.ports[0]}")
    return socket


def pass_through(context, broker, count, protect=None):
    """Events through the broker, to one who wants some of them and then goes, and to one who wants
    all; the latter, and their publisher."""
    mine = subscriber(context, broker, SUBJECT, protect=protect)
    every = subscriber(context, broker, kind=zmq.XSUB, protect=protect)
    broker.until("subscriptions", 2)
    source = publisher(context, broker, protect=protect)
    assert {source.recv(), source.recv()} == {b"\x01", b"\x01" + SUBJECT}
    if protect:
        broker.until("curve_peers", 3)
    for sequence in range(count):
        # The largest are cut through by several receive buffers.
        size = 300_000 if sequence % 100 == 50 else sequence
        source.send_multipart(message(sequence, size=size))
        source.send_multipart(message(sequence, publisher=8, subject=b"other.kv-events"))
    for sequence in range(count):
        size = 300_000 if sequence % 100 == 50 else sequence
        assert mine.recv_multipart() == message(sequence, size=size)
        assert every.recv_multipart() == message(sequence, size=size)
        other = message(sequence, publisher=8, subject=b"other.kv-events")
        assert every.recv_multipart() == other
    # One who goes is taken back at the source.
    mine.close()
    assert source.recv() == b"\x00" + SUBJECT
    return every, source


def stock(lab, role, **env):
    """A stock publisher or subscriber of forward-pass metrics, through a broker or directly."""
    endpoint = lab.endpoint("backend")
    command = [sys.executable, HERE / "stock_events.py", "--role", role, "--endpoint", endpoint]
    return lab.start(role, command, lab.env(**{"DYN_EVENT_PLANE": "zmq", **env}))


def ours(lab, command, *options, topic=TOPIC, **env):
    """`corelane events` on the scope that stock peers use, in etcd."""
    scope = lab.endpoint("backend")
    program = [corelane_program(), "events", command, "--scope", scope, "--topic", topic]
    env = lab.env(DYN_EVENT_PLANE="zmq", DYN_EVENT_PLANE_HOST="127.0.0.1", **env)
    return lab.start(command, [*program, "--discovery", "etcd", *options], env)


def shown(process):
    """What it has printed until its end."""
    assert process.wait(PATIENCE_S) == 0, process.tail()
    return process.events()


def channel(lab, topic=TOPIC):
    """The channel records of that topic: key and value with its lease."""
    scope = f"namespace/{lab.namespace}/component/backend/endpoint/generate"
    return lab.etcd.records(f"v1/event_channels/{scope}/topic/{topic}/")


def publish_to_libzmq(lab, context, *options, protect=None):
    """Events of `corelane events publish`, read by a socket of libzmq; the key of its channel
    record, the record and its lease."""
    source = ours(lab, "publish", "--body", METRICS, "--count", 20, "--wait-s", 100, *options)
    ((key, (record, lease)),) = wait_for("its channel record", lambda: channel(lab)).items()
    sink = context.socket(zmq.SUB)
    sink.rcvtimeo = PATIENCE_MS
    if protect:
        protect(sink)
    sink.connect(record["transport"]["config"]["endpoint"])
    sink.subscribe(TOPIC.encode())
    for sequence in range(20):
        topic, who, number, frame = sink.recv_multipart()
        assert topic == TOPIC.encode()
        assert struct.unpack(">QQ", who + number) == (record["instance_id"], sequence)
        assert struct.unpack(">BI", frame[:5]) == (1, len(frame) - 5)
    shown(source)
    return key, record, lease


def tail_libzmq(lab, context, *options, protect=None):
    """`corelane events tail` on a socket of libzmq that discovery tells of: all is as it should."""
    source = context.socket(zmq.XPUB)
    source.rcvtimeo = PATIENCE_MS
    if protect:
        protect(source)
    port = source.bind_to_random_port("tcp://127.0.0.1")
    record = {
        "type": "EventChannel",
        "scope": {
            "kind": "endpoint",
            "endpoint": {
                "namespace": lab.namespace, "component": "backend", "name": "generate",
            },
        },
        "topic": TOPIC,
        "instance_id": 0xB0B,
        "transport": {"kind": "Zmq", "config": {"endpoint": f"tcp://127.0.0.1:{port}"}},
    }  # fmt: skip
    scope = f"namespace/{lab.namespace}/component/backend/endpoint/generate"
    sink = ours(lab, "tail", "--count", 3, *options)
    lab.etcd.put(f"v1/event_channels/{scope}/topic/{TOPIC}/b0b", json.dumps(record))
    assert source.recv() == b"\x01" + TOPIC.encode()
    for sequence in range(3):
        # An array, which Dynamo reads as well: id, number, time, topic, payload.
        envelope = b"\x95\xcd\x0b\x0b" + bytes([sequence, 1, 0xB4])
        envelope += TOPIC.encode() + b"\xc4\x01\x07"
        numbers = [struct.pack(">Q", 0xB0B), struct.pack(">Q", sequence)]
        frame = struct.pack(">BI", 1, len(envelope)) + envelope
        source.send_multipart([TOPIC.encode(), *numbers, frame])
    events = shown(sink)
    assert [(event["publisher_id"], event["sequence"]) for event in events] == [
        (0xB0B, sequence) for sequence in range(3)
    ]
    assert [event["payload"] for event in events] == [7, 7, 7]
