"""The broker of events between libzmq's sockets and Dynamo's own publishers and subscribers."""

import struct

import pytest
import zmq

from events_lab import (
    PATIENCE_MS, PATIENCE_S, SUBJECT, Broker, message, pass_through, publisher, sequence_of, stock,
    subscriber,
)  # fmt: skip
from lab import wait_for

pytestmark = pytest.mark.timeout(300)


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
    every, source = pass_through(context, broker, 500)
    # What is no event is counted, and hurts nobody.
    source.send_multipart([b"two", b"parts"])
    source.send_multipart(message(500)[:3] + [b"\x01\x00\x00\x00\xff" + b"short"])
    source.send_multipart(message(502))
    assert sequence_of(every.recv_multipart()) == 502
    assert broker.count("bad_total") == 2 and broker.count("lost_total") == 2
    assert broker.count(r'topic_received_total{topic="kv_metrics"}'.replace("{", r"\{")) == 501
    text = "not four parts"
    wait_for(text, lambda: text in broker.process.log(), PATIENCE_S)
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

