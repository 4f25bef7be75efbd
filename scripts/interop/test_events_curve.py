"""Events with CURVE between libzmq's sockets and ours: through the broker, and straight."""

import json
import stat
import struct
import subprocess

import pytest
import zmq

from events_lab import (
    PATIENCE_MS, PATIENCE_S, SUBJECT, Broker, channel, message, ours, publisher, sequence_of,
    shown, subscriber,
)  # fmt: skip
from lab import corelane_program, free_port, wait_for

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(not zmq.has("curve"), reason="this libzmq is built without CURVE"),
]

TOPIC = "forward-pass-metrics"
BODY = json.dumps({"version": 1, "worker_id": "7", "dp_rank": 0, "counter_id": 3})


class Pair:
    """A key pair of ours, written by our command."""

    def __init__(self, lab, name):
        self.file = lab.folder / f"{name}.key"
        command = [corelane_program(), "events", "keys", "--out", self.file]
        made = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert made.returncode == 0, made.stderr
        self.public = made.stdout.strip()
        self.secret = self.file.read_text().strip()
        assert stat.S_IMODE(self.file.stat().st_mode) == 0o600
        # libzmq has the same idea of what belongs together.
        assert zmq.curve_public(self.secret.encode()).decode() == self.public

    def serve(self, socket):
        """Make a socket of libzmq the server."""
        socket.curve_server = True
        socket.curve_secretkey = self.secret.encode()

    def client_of(self, server):
        """What makes a socket of libzmq a client of that server."""

        def protect(socket):
            socket.curve_secretkey = self.secret.encode()
            socket.curve_publickey = self.public.encode()
            socket.curve_serverkey = server.public.encode()

        return protect


@pytest.mark.short
def test_libzmq_with_curve_passes_events_through_the_broker(lab, context):
    us, they = Pair(lab, "broker"), Pair(lab, "peer")
    broker = Broker(lab, curve_secret_key_file=str(us.file))
    protect = they.client_of(us)
    mine = subscriber(context, broker, SUBJECT, protect=protect)
    every = subscriber(context, broker, kind=zmq.XSUB, protect=protect)
    broker.until("subscriptions", 2)
    source = publisher(context, broker, protect=protect)
    assert {source.recv(), source.recv()} == {b"\x01", b"\x01" + SUBJECT}
    broker.until("curve_peers", 3)
    for sequence in range(300):
        # The largest are cut through by several receive buffers.
        size = 300_000 if sequence % 100 == 50 else sequence
        source.send_multipart(message(sequence, size=size))
        source.send_multipart(message(sequence, publisher=8, subject=b"other.kv-events"))
    for sequence in range(300):
        size = 300_000 if sequence % 100 == 50 else sequence
        assert mine.recv_multipart() == message(sequence, size=size)
        assert every.recv_multipart() == message(sequence, size=size)
        other = message(sequence, publisher=8, subject=b"other.kv-events")
        assert every.recv_multipart() == other
    mine.close()
    assert source.recv() == b"\x00" + SUBJECT
    assert broker.count("sessions_refused_total") == 0
    broker.stop()


def test_who_does_not_fit_is_refused_and_hurts_nobody(lab, context):
    us, friend, stranger = (Pair(lab, name) for name in ("broker", "friend", "stranger"))
    allowed = lab.folder / "allowed"
    allowed.write_text(f"{friend.public} a friend\n")
    broker = Broker(
        lab, curve_secret_key_file=str(us.file), curve_allowed_keys=str(allowed)
    )
    sink = subscriber(context, broker, protect=friend.client_of(us))
    source = publisher(context, broker, protect=friend.client_of(us))
    assert source.recv() == b"\x01"

    def refused(reason, *texts):
        name = f"sessions_refused_{reason}_total"
        wait_for(name, lambda: broker.count(name) > 0, PATIENCE_S)
        wait_for(texts, lambda: all(text in broker.process.log() for text in texts), PATIENCE_S)

    others = [
        subscriber(context, broker),
        subscriber(context, broker, protect=friend.client_of(stranger)),
        subscriber(context, broker, protect=stranger.client_of(us)),
    ]
    refused("curve", "CURVE: HELLO cannot be opened")
    refused("stranger", stranger.public, "is not among those that are allowed")
    for sequence in range(20):
        source.send_multipart(message(sequence))
        assert sequence_of(sink.recv_multipart()) == sequence
    assert broker.count("subscriptions") == 1
    for other in others:
        assert not other.poll(0)


@pytest.mark.short
def test_peers_with_and_without_curve_have_doors_of_their_own(lab, context):
    us, they = Pair(lab, "broker"), Pair(lab, "peer")
    ports = [free_port(), free_port()]
    broker = Broker(
        lab,
        curve_secret_key_file=str(us.file),
        curve_xsub=f"tcp://127.0.0.1:{ports[0]}",
        curve_xpub=f"tcp://127.0.0.1:{ports[1]}",
    )
    # Stock peers find the doors that they can use.
    ((_, (record, _)),) = broker.records().items()
    config = record["transport"]["config"]
    assert config["xpub_endpoints"] == [f"tcp://127.0.0.1:{broker.ports[1]}"]
    protect = they.client_of(us)
    sinks = [
        subscriber(context, broker, protect=protect, port=ports[1]),
        subscriber(context, broker),
    ]
    broker.until("subscriptions", 2)
    sources = [
        publisher(context, broker, protect=protect, port=ports[0]),
        publisher(context, broker),
    ]
    for source in sources:
        assert source.recv() == b"\x01"
    broker.until("curve_peers", 2)
    for sequence in range(50):
        for number, source in enumerate(sources):
            source.send_multipart(message(sequence, publisher=number))
    for sink in sinks:
        due = {0: 0, 1: 0}
        for _ in range(100):
            parts = sink.recv_multipart()
            (number,) = struct.unpack(">Q", parts[1])
            assert parts == message(due[number], publisher=number)
            due[number] += 1
        assert due == {0: 50, 1: 50}


@pytest.mark.short
def test_our_commands_through_our_broker(lab):
    us, they = Pair(lab, "broker"), Pair(lab, "publisher")
    broker = Broker(lab, curve_secret_key_file=str(us.file))
    env = {"DYN_ZMQ_BROKER_ENABLED": "1"}
    # Nobody has to know the subscriber; the publisher says who it is.
    sink = ours(lab, "tail", "--count", 50, "--curve-server-key", us.public, **env)
    broker.until("subscriptions", 1)
    own = ("--curve-secret-key-file", they.file, "--curve-server-key", us.public)
    source = ours(lab, "publish", "--body", BODY, "--count", 50, *own, **env)
    assert [event["sequence"] for event in shown(sink)] == list(range(50))
    shown(source)


@pytest.mark.short
def test_our_publisher_to_libzmq(lab, context):
    us, they = Pair(lab, "publisher"), Pair(lab, "peer")
    own = ("--curve-secret-key-file", us.file, "--curve-allowed-keys", they.public)
    source = ours(lab, "publish", "--body", BODY, "--count", 20, "--wait-s", 100, *own)
    ((_, (record, _)),) = wait_for("its channel record", lambda: channel(lab)).items()
    sink = context.socket(zmq.SUB)
    sink.rcvtimeo = PATIENCE_MS
    they.client_of(us)(sink)
    sink.connect(record["transport"]["config"]["endpoint"])
    sink.subscribe(TOPIC.encode())
    for sequence in range(20):
        topic, _, number, frame = sink.recv_multipart()
        assert (topic, struct.unpack(">Q", number)) == (TOPIC.encode(), (sequence,))
        assert struct.unpack(">BI", frame[:5]) == (1, len(frame) - 5)
    shown(source)


@pytest.mark.short
def test_libzmq_to_our_subscriber(lab, context):
    they = Pair(lab, "publisher")
    source = context.socket(zmq.XPUB)
    source.rcvtimeo = PATIENCE_MS
    they.serve(source)
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
    sink = ours(lab, "tail", "--count", 3, "--curve-server-key", they.public)
    lab.etcd.put(f"v1/event_channels/{scope}/topic/{TOPIC}/b0b", json.dumps(record))
    assert source.recv() == b"\x01" + TOPIC.encode()
    for sequence in range(3):
        envelope = b"\x95\xcd\x0b\x0b" + bytes([sequence, 1, 0xB4])
        envelope += TOPIC.encode() + b"\xc4\x01\x07"
        numbers = [struct.pack(">Q", 0xB0B), struct.pack(">Q", sequence)]
        frame = struct.pack(">BI", 1, len(envelope)) + envelope
        source.send_multipart([TOPIC.encode(), *numbers, frame])
    events = shown(sink)
    assert [(event["sequence"], event["payload"]) for event in events] == [
        (sequence, 7) for sequence in range(3)
    ]
