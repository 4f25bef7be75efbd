"""Events over ZMQ between our publishers and subscribers, Dynamo's, and libzmq's: straight from
one to the other, through our broker, and through a proxy of libzmq."""

import json
import threading

import pytest
import zmq

from events_lab import (
    METRICS, TOPIC, Broker, channel, ours, publish_to_libzmq, shown, stock, tail_libzmq,
)  # fmt: skip
from lab import wait_for

pytestmark = pytest.mark.timeout(400)


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
    key, record, lease = publish_to_libzmq(lab, context)
    publisher = record["instance_id"]
    assert key.endswith(f"/{publisher:x}") and lease and publisher < 1 << 53
    assert list(record) == ["type", "scope", "topic", "instance_id", "transport"]
    assert record["transport"]["kind"] == "Zmq"


@pytest.mark.short
def test_libzmq_to_our_subscriber(lab, context):
    tail_libzmq(lab, context)
