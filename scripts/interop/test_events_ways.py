"""Events over ZMQ between our publishers and subscribers, Dynamo's, and libzmq's: straight from
one to the other, through our broker, and through a proxy of libzmq."""

import json
import struct
import sys
import threading

import pytest
import zmq

from events_lab import HERE, PATIENCE_MS, Broker, channel, ours, shown, stock
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


# Two blocks of four tokens, and what Dynamo's router makes of them.
TOKENS = "1,2,3,4,5,6,7,8"
HASHES = [14643705804678351452, 16777012769546811212]


def overlap(router, worker):
    """Blocks that the router knows that worker to hold, by its last answer."""
    known = router.events("overlap")[-1]["known"]["workers"]
    return [row for row in known if row["worker_id"] == worker]


def test_dynamos_kv_router_uses_our_events(lab):
    """spec/events-discovery.md §3.9, row 1: with a channel and a source record, directly."""
    backend = lab.endpoint("backend")
    # Its id is the worker's; that nobody answers there is of no interest to the router.
    worker = lab.etcd.register(backend, 9)
    router = lab.start(
        "kv-router",
        [sys.executable, HERE / "stock_kv_router.py", "--endpoint", backend, "--tokens", TOKENS],
        lab.env(DYN_EVENT_PLANE="zmq"),
    )
    router.wait_event("overlap")
    assert not overlap(router, worker)
    blocks = [
        {"block_hash": 1001 + at, "tokens_hash": tokens, "mm_extra_info": None}
        for at, tokens in enumerate(HASHES)
    ]
    stored = {"parent_hash": None, "start_position": None, "blocks": blocks}
    event = {
        "worker_id": worker, "storage_tier": "device", "residency_domain": "worker",
        "event": {"event_id": 1, "data": {"stored": stored}, "dp_rank": 0},
    }  # fmt: skip
    # A publisher that goes takes what it has said with it.
    options = ("--body", json.dumps([event]), "--count", 10_000, "--interval-ms", 100)
    source = ours(lab, "publish", *options, "--wait-s", 100, topic="kv-events")
    found = wait_for("its channel record", lambda: channel(lab, "kv-events"))
    ((key, (record, lease)),) = found.items()
    endpoint = dict(zip(("namespace", "component", "name"), backend.split("/")))
    record = {
        "type": "EventSource", "scope": record["scope"], "topic": "kv-events",
        "publisher_id": record["instance_id"],
        "metadata": {
            "kv_state_endpoint": endpoint,
            "worker": {"worker_id": worker, "dp_rank": 0},
            "publisher_id": record["instance_id"],
        },
    }  # fmt: skip
    lab.etcd.put(key.replace("v1/event_channels/", "v1/event_sources/"), record, lease)
    wait_for("the router knows of both blocks", lambda: overlap(router, worker))
    (row,) = overlap(router, worker)
    assert 2 in row.values(), row
    source.terminate()
    assert shown(source)
    wait_for("the router has forgotten it", lambda: not overlap(router, worker))
