"""Events between NATS, ZMQ and plain TCP: Dynamo's own peers on either side of the bridge."""

import sys
from pathlib import Path

import pytest

from events_lab import PATIENCE_S, Broker, stock
from lab import free_port, metric_sum, wait_for
from store import Nats

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import events_tcp  # noqa: E402

BY_BROKER = {"DYN_ZMQ_BROKER_ENABLED": "1"}
TOPIC = "forward-pass-metrics"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def nats(tmp_path_factory):
    """A NATS server for these tests."""
    server = Nats(tmp_path_factory.mktemp("nats"))
    yield server
    server.stop()


def bridged(lab, nats):
    """A broker with all doors, joined to NATS, and its plain address."""
    port = free_port()
    tcp = f"127.0.0.1:{port}"
    settings = {"bridge": "nats", "bridge_namespace": lab.namespace, "tcp": f"tcp://{tcp}"}
    broker = Broker(lab, env=lab.env(NATS_SERVER=nats.url), **settings)
    wait_for("NATS", lambda: count(broker, "nats_connected") == 1, PATIENCE_S)
    return broker, tcp


def count(broker, name, labels=""):
    """One of the bridge's counters or gauges."""
    return metric_sum(broker.lab.metrics(broker), rf"^corelane_bridge_{name}{labels}")


def on_nats(nats):
    """What puts a stock process's events on NATS."""
    return {"DYN_EVENT_PLANE": "nats", "NATS_SERVER": nats.url}


def scope_of(lab):
    """Where the stock peers publish."""
    return f"namespace.{lab.namespace}.component.backend.endpoint.generate"


def test_a_stock_publisher_on_nats_reaches_stock_subscribers_on_zmq_and_tcp(lab, nats):
    broker, tcp = bridged(lab, nats)
    tap = events_tcp.subscribe(tcp, [scope_of(lab)])
    sink = stock(lab, "subscriber", **BY_BROKER)
    sink.wait_event("ready", PATIENCE_S)
    broker.until("subscribers", 1)
    source = stock(lab, "publisher", **on_nats(nats))
    source.wait_event("ready", PATIENCE_S)
    sink.wait_event("event", PATIENCE_S, count=3)
    events = [next(tap) for _ in range(3)]
    assert all(event["topic"] == TOPIC for event in events), events
    first = events[0]["sequence"]
    assert [event["sequence"] for event in events] == [first, first + 1, first + 2]
    # Nothing goes back to where it came from.
    assert count(broker, "passed_total", r'\{side="nats"') == 0
    assert count(broker, "lost_total") == 0


def test_stock_publishers_on_zmq_and_ours_on_tcp_reach_a_stock_subscriber_on_nats(lab, nats):
    broker, tcp = bridged(lab, nats)
    tap = events_tcp.subscribe(tcp, [scope_of(lab)])
    sink = stock(lab, "subscriber", **on_nats(nats))
    sink.wait_event("ready", PATIENCE_S)
    source = stock(lab, "publisher", **BY_BROKER)
    source.wait_event("ready", PATIENCE_S)
    sink.wait_event("event", PATIENCE_S, count=3)
    event = next(tap)
    source.terminate()
    source.wait(PATIENCE_S)
    # The same payload once more, by a publisher with nothing but a socket.
    before = len(sink.events("event"))
    publisher = events_tcp.Publisher(tcp, scope_of(lab))
    for _ in range(5):
        publisher.publish(TOPIC, event["payload"])
    sink.wait_event("event", PATIENCE_S, count=before + 5)
    assert count(broker, "came_back_total", r'\{side="nats"') >= 8
    assert broker.count("bad_total") == 0 and count(broker, "dropped_total") == 0
