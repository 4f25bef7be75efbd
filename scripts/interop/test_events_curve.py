"""Events with CURVE between libzmq's sockets and ours: through the broker, and straight."""

import stat
import struct
import subprocess

import pytest
import zmq

from events_lab import (
    METRICS, PATIENCE_S, Broker, message, ours, pass_through, publish_to_libzmq, publisher,
    sequence_of, shown, subscriber, tail_libzmq,
)  # fmt: skip
from lab import corelane_program, free_port, wait_for

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(not zmq.has("curve"), reason="this libzmq is built without CURVE"),
]


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
    pass_through(context, broker, 300, they.client_of(us))
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
    # It hears of our mechanism and leaves before it has said its own.
    refused("mechanism", "its security mechanism may be another than CURVE")
    refused("curve", "CURVE: HELLO cannot be opened")
    refused("stranger", stranger.public, "is not among those that are allowed")
    for sequence in range(20):
        source.send_multipart(message(sequence))
        assert sequence_of(sink.recv_multipart()) == sequence
    broker.until("subscriptions", 1)
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
    lost = subscriber(context, broker, protect=protect)
    name = "sessions_refused_mechanism_total"
    wait_for(name, lambda: broker.count(name) > 0, PATIENCE_S)
    text = "its security mechanism may be another than NULL"
    wait_for(text, lambda: text in broker.process.log(), PATIENCE_S)
    assert not lost.poll(0)


@pytest.mark.short
def test_our_commands_through_our_broker(lab):
    us, they = Pair(lab, "broker"), Pair(lab, "publisher")
    broker = Broker(lab, curve_secret_key_file=str(us.file))
    env = {"DYN_ZMQ_BROKER_ENABLED": "1"}
    # Nobody has to know the subscriber; the publisher says who it is.
    sink = ours(lab, "tail", "--count", 50, "--curve-server-key", us.public, **env)
    broker.until("subscriptions", 1)
    own = ("--curve-secret-key-file", they.file, "--curve-server-key", us.public, "--wait-s", 100)
    source = ours(lab, "publish", "--body", METRICS, "--count", 50, *own, **env)
    assert [event["sequence"] for event in shown(sink)] == list(range(50))
    shown(source)


@pytest.mark.short
def test_our_publisher_to_libzmq(lab, context):
    us, they = Pair(lab, "publisher"), Pair(lab, "peer")
    own = ("--curve-secret-key-file", us.file, "--curve-allowed-keys", they.public)
    publish_to_libzmq(lab, context, *own, protect=they.client_of(us))


@pytest.mark.short
def test_libzmq_to_our_subscriber(lab, context):
    they = Pair(lab, "publisher")
    tail_libzmq(lab, context, "--curve-server-key", they.public, protect=they.serve)
