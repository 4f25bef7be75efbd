"""Events over ZMQ between our publishers and subscribers, Dynamo's, and libzmq's: straight from
one to the other, through our broker, and through a proxy of libzmq."""

import json
import struct
import threading

import pytest
import zmq

from events_lab import PATIENCE_MS, Broker, channel, ours, shown, stock
from lab import wait_for

pytestmark = pytest.mark.timeout(400)

TOPIC = "forward-pass-metrics"


class Proxy:
    """libzmq's own XSUB/XPUB proxy."""

    def __init__(self, context):
        self.sockets = [context.socket(zmq.XSUB), context.socket(zmq.XPUB)]
        ports = []
        for end in self.sockets:
            end.linger = 0
            ports.append(end.bind_to_random_port("tcp://127.0.0.1"))
        self.url = f"xsub=tcp://127.0.0.1:{ports[0]},xpub=tcp://127.0.0.1:{ports[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        """Until the context ends."""
        try:
            zmq.proxy(*self.sockets)
        except zmq.ZMQError:
            for end in self.sockets:
                end.close()


@pytest.fixture(params=["direct", "broker", "proxy"])
def way(request, lab, context):
    """The environment of publishers and subscribers, for each way that events can take."""
    if request.param == "direct":
        return {}
    if request.param == "broker":
        Broker(lab)
        return {"DYN_ZMQ_BROKER_ENABLED": "1"}
    return {"DYN_ZMQ_BROKER_URL": Proxy(context).url}


METRICS = json.dumps({"version": 1, "worker_id": "7", "dp_rank": 0, "counter_id": 3})


def test_our_publisher_to_dynamos_subscriber(lab, way):
    sink = stock(lab, "subscriber", **way)
    sink.wait_event("ready")
    source = ours(lab, "publish", "--body", METRICS, "--count", 20, "--wait-s", 100, **way)
    (said,) = shown(source)
    assert said["published"] == 20
    sink.wait_event("event", count=20)
    # What it had registered is gone again, and behind a broker there was nothing.
    wait_for("no channel record", lambda: not channel(lab))


def test_dynamos_publisher_to_our_subscriber(lab, way):
    sink = ours(lab, "tail", "--count", 5, **way)
    source = stock(lab, "publisher", **way)
    source.wait_event("ready")
    events = shown(sink)
    assert len(events) == 5
    numbers = [event["sequence"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + 5)), numbers
    for event in events:
        assert event["topic"] == TOPIC and event["scope"] == lab.endpoint("backend")
        assert event["payload"]["worker_id"] == "7"
        assert event["payload"]["queued_requests"]["num_decode_requests"] == 8


@pytest.mark.short
def test_our_publisher_to_our_subscriber(lab, way):
    sink = ours(lab, "tail", "--count", 50, **way)
    source = ours(lab, "publish", "--body", METRICS, "--count", 50, "--wait-s", 100, **way)
    events = shown(sink)
    shown(source)
    assert [event["sequence"] for event in events] == list(range(50))
    assert all(event["payload"] == json.loads(METRICS) for event in events)


@pytest.mark.short
def test_our_publisher_to_libzmq(lab, context):
    source = ours(lab, "publish", "--body", METRICS, "--count", 20, "--wait-s", 100)
    ((key, (record, lease)),) = wait_for("its channel record", lambda: channel(lab)).items()
    publisher = record["instance_id"]
    assert key.endswith(f"/{publisher:x}") and lease and publisher < 1 << 53
    assert list(record) == ["type", "scope", "topic", "instance_id", "transport"]
    assert record["transport"]["kind"] == "Zmq"
    sink = context.socket(zmq.SUB)
    sink.rcvtimeo = PATIENCE_MS
    sink.connect(record["transport"]["config"]["endpoint"])
    sink.subscribe(TOPIC.encode())
    for sequence in range(20):
        topic, who, number, frame = sink.recv_multipart()
        assert topic == TOPIC.encode()
        assert struct.unpack(">QQ", who + number) == (publisher, sequence)
        assert struct.unpack(">BI", frame[:5]) == (1, len(frame) - 5)
    shown(source)


@pytest.mark.short
def test_libzmq_to_our_subscriber(lab, context):
    source = context.socket(zmq.XPUB)
    source.rcvtimeo = PATIENCE_MS
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
    key = f"v1/event_channels/{scope}/topic/{TOPIC}/b0b"
    sink = ours(lab, "tail", "--count", 3)
    lab.etcd.put(key, json.dumps(record))
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
