"""The broker of events between libzmq's sockets and Dynamo's own publishers and subscribers."""

import struct
import sys
from pathlib import Path

import pytest
import zmq

from lab import corelane_program, free_port, metric_sum, to_toml, wait_for

HERE = Path(__file__).resolve().parent
SUBJECT = b"namespace.lab.component.backend.endpoint.generate.kv_metrics"
PATIENCE_MS = 60_000
PATIENCE_S = PATIENCE_MS / 1000

pytestmark = pytest.mark.timeout(300)


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


@pytest.fixture
def context():
    """libzmq; its sockets do not outlive a test."""
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def subscriber(context, broker, prefix=b"", kind=zmq.SUB):
    """A subscriber at the broker."""
    socket = context.socket(kind)
    socket.rcvhwm = 0
    socket.rcvtimeo = PATIENCE_MS
    socket.connect(f"tcp://127.0.0.1:{broker.ports[1]}")
    if kind == zmq.SUB:
        socket.subscribe(prefix)
    else:
        socket.send(b"\x01" + prefix)
    return socket


def publisher(context, broker, kind=zmq.XPUB):
    """A publisher that knows of the subscriptions (an XPUB: it sees them)."""
    socket = context.socket(kind)
    socket.sndhwm = 0
    socket.rcvtimeo = PATIENCE_MS
    socket.connect(f"tcp://127.0.0.1:{broker.ports[0]}")
    return socket


@pytest.mark.short
def test_libzmq_passes_events_through_the_broker(lab, context):
    broker = Broker(lab)
    ((key, (record, lease)),) = broker.records().items()
    assert key.endswith(f"/{record['instance_id']:x}") and lease, (key, lease)
    assert record["scope"] == {
        "kind": "component", "namespace": lab.namespace, "component": "zmq_broker",
    }  # fmt: skip
    assert record["transport"] == {
        "kind": "ZmqBroker",
        "config": {
            "xsub_endpoints": [f"tcp://127.0.0.1:{broker.ports[0]}"],
            "xpub_endpoints": [f"tcp://127.0.0.1:{broker.ports[1]}"],
        },
    }
    mine = subscriber(context, broker, SUBJECT)
    every = subscriber(context, broker, kind=zmq.XSUB)
    broker.until("subscriptions", 2)
    source = publisher(context, broker)
    assert {source.recv(), source.recv()} == {b"\x01", b"\x01" + SUBJECT}
    for sequence in range(500):
        # The largest are cut through by several receive buffers.
        size = 300_000 if sequence % 100 == 50 else sequence
        source.send_multipart(message(sequence, size=size))
        source.send_multipart(message(sequence, publisher=8, subject=b"other.kv-events"))
    for sequence in range(500):
        size = 300_000 if sequence % 100 == 50 else sequence
        assert mine.recv_multipart() == message(sequence, size=size)
        assert every.recv_multipart() == message(sequence, size=size)
        other = message(sequence, publisher=8, subject=b"other.kv-events")
        assert every.recv_multipart() == other
    # One who goes is taken back at the source.
    mine.close()
    assert source.recv() == b"\x00" + SUBJECT
    # What is no event is counted, and hurts nobody.
    source.send_multipart([b"two", b"parts"])
    source.send_multipart(message(500)[:3] + [b"\x01\x00\x00\x00\xff" + b"short"])
    source.send_multipart(message(502))
    assert sequence_of(every.recv_multipart()) == 502
    assert broker.count("bad_total") == 2 and broker.count("lost_total") == 2
    assert broker.count(r'topic_received_total{topic="kv_metrics"}'.replace("{", r"\{")) == 501
    assert "not four parts" in broker.process.log()
    broker.stop()
    assert not broker.lab.etcd.records(f"v1/event_channels/namespace/{lab.namespace}/")


@pytest.mark.short
def test_a_restart_of_the_broker_is_survived_and_its_losses_are_known(lab, context):
    broker = Broker(lab)
    sink = subscriber(context, broker)
    broker.until("subscriptions", 1)
    source = publisher(context, broker)
    assert source.recv() == b"\x01"
    source.send_multipart(message(0))
    assert sequence_of(sink.recv_multipart()) == 0
    broker.stop()
    # Nobody is there: libzmq may keep these until somebody is, and send them on or not.
    for sequence in range(1, 6):
        source.send_multipart(message(sequence))
    broker.start()

    def connected():
        # libzmq subscribes anew only when its user looks at the socket.
        sink.poll(10)
        return broker.count("subscriptions") == broker.count("publishers") == 1

    wait_for("both are back", connected, PATIENCE_S)
    for sequence in (6, 7, 10):
        source.send_multipart(message(sequence))
    came = []
    while 10 not in came:
        came.append(sequence_of(sink.recv_multipart()))
    assert came[-3:] == [6, 7, 10] and came == sorted(came), came
    # It cannot know of what was before its time, and knows all that came after.
    assert broker.count("lost_total") == 2


@pytest.mark.short
def test_subscribers_that_do_not_read_lose_exactly_what_is_counted(lab, context):
    broker = Broker(lab, queue_events_max=200, overflow="drop_oldest")
    lazy = context.socket(zmq.SUB)
    lazy.rcvhwm, lazy.rcvbuf, lazy.rcvtimeo = 1, 4096, PATIENCE_MS
    lazy.connect(f"tcp://127.0.0.1:{broker.ports[1]}")
    lazy.subscribe(b"")
    broker.until("subscriptions", 1)
    source = publisher(context, broker)
    assert source.recv() == b"\x01"
    eager = subscriber(context, broker, SUBJECT)
    broker.until("subscriptions", 2)
    count, size = 6000, 4000
    for first in range(0, count, 20):
        for sequence in range(first, first + 20):
            source.send_multipart(message(sequence, size=size))
        for sequence in range(first, first + 20):
            assert sequence_of(eager.recv_multipart()) == sequence
    dropped = broker.count("dropped_oldest_total") + broker.count("dropped_newest_total")
    assert 0 < dropped < count
    came = [sequence_of(lazy.recv_multipart()) for _ in range(int(count - dropped))]
    assert came == sorted(came) and came[-1] == count - 1, came[-5:]
    broker.until("sent_total", 2 * count - dropped)


def stock(lab, role, **env):
    """A stock publisher or subscriber of forward-pass metrics, through a broker or directly."""
    endpoint = lab.endpoint("backend")
    command = [sys.executable, HERE / "stock_events.py", "--role", role, "--endpoint", endpoint]
    return lab.start(role, command, lab.env(**{"DYN_EVENT_PLANE": "zmq", **env}))


def test_dynamo_publishes_and_subscribes_through_the_broker(lab, context):
    broker = Broker(lab)
    by_broker = {"DYN_ZMQ_BROKER_ENABLED": "1"}
    tap = subscriber(context, broker, b"namespace." + lab.namespace.encode())
    sink = stock(lab, "subscriber", **by_broker)
    sink.wait_event("ready", PATIENCE_S)
    broker.until("subscribers", 2)
    source = stock(lab, "publisher", **by_broker)
    source.wait_event("ready", PATIENCE_S)
    # Stock to stock, and libzmq beside them.
    sink.wait_event("event", PATIENCE_S, count=3)
    parts = tap.recv_multipart()
    subject = f"namespace.{lab.namespace}.component.backend.endpoint.generate.forward-pass-metrics"
    assert parts[0] == subject.encode() and len(parts) == 4, parts
    # An event of ours, in Dynamo's envelope, reaches the stock subscriber.
    envelope = parts[3][5:]
    assert b"forward-pass-metrics" in envelope
    by_hand = publisher(context, broker)
    by_hand.recv()
    number = struct.pack(">Q", 99)
    for sequence in range(3):
        frame = struct.pack(">BI", 1, len(envelope)) + envelope
        by_hand.send_multipart([parts[0], number, struct.pack(">Q", sequence), frame])
    wait_for("4 publishers' events", lambda: broker.count("received_total") >= 6, PATIENCE_S)
    assert broker.count("bad_total") == 0 and broker.count("lost_total") == 0

