"""What the tests of events share: our broker, sockets of libzmq, stock peers, our commands."""

import struct
import sys
from pathlib import Path

import zmq

from lab import corelane_program, free_port, metric_sum, to_toml, wait_for

HERE = Path(__file__).resolve().parent
SUBJECT = b"namespace.lab.component.backend.endpoint.generate.kv_metrics"
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


def stock(lab, role, **env):
    """A stock publisher or subscriber of forward-pass metrics, through a broker or directly."""
    endpoint = lab.endpoint("backend")
    command = [sys.executable, HERE / "stock_events.py", "--role", role, "--endpoint", endpoint]
    return lab.start(role, command, lab.env(**{"DYN_EVENT_PLANE": "zmq", **env}))


def ours(lab, command, *options, topic="forward-pass-metrics", **env):
    """`corelane events` on the scope that stock peers use, in etcd."""
    scope = lab.endpoint("backend")
    program = [corelane_program(), "events", command, "--scope", scope, "--topic", topic]
    env = lab.env(DYN_EVENT_PLANE="zmq", DYN_EVENT_PLANE_HOST="127.0.0.1", **env)
    return lab.start(command, [*program, "--discovery", "etcd", *options], env)


def shown(process):
    """What it has printed until its end."""
    assert process.wait(PATIENCE_S) == 0, process.tail()
    return process.events()


def channel(lab, topic="forward-pass-metrics"):
    """The channel records of that topic: key and value with its lease."""
    scope = f"namespace/{lab.namespace}/component/backend/endpoint/generate"
    return lab.etcd.records(f"v1/event_channels/{scope}/topic/{topic}/")
