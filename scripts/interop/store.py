"""An etcd of a test's own, and its records, spoken to through etcd's JSON gateway."""

import base64
import json
import os
import shutil
import signal
import socket
import urllib.error
import urllib.request

from process import Process, free_port, wait_for

INSTANCES = "v1/instances"
MODEL_CARDS = "v1/mdc"


def card(endpoint, instance, **more):
    """A model card's record, as a worker writes it; `more` are members of the card."""
    namespace, component, name = endpoint.split("/")
    return {
        "type": "Model",
        "namespace": namespace,
        "component": component,
        "endpoint": name,
        "instance_id": instance,
        "card_json": {
            "display_name": "small-model",
            "slug": "small-model",
            "kv_cache_block_size": 16,
            "migration_limit": 0,
            "model_type": "Chat",
            "model_input": "Tokens",
            "runtime_config": {"max_num_seqs": 8},
            **more,
        },
    }


def _b64(text):
    return base64.b64encode(text.encode()).decode()


def _text(data):
    return base64.b64decode(data).decode()


def _prefix_end(prefix):
    """The first key after all keys with this prefix (ASCII prefixes only)."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


class Etcd:
    """One etcd server on free loopback ports, its data in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.port, self.peer_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.starts = 0
        self.process = None
        self.start()

    def start(self):
        """Start it (again, with the data of before) and wait until it answers."""
        program = shutil.which("etcd") or shutil.which("etcd", path="/usr/sbin:/sbin")
        assert program, "etcd is not installed: apt-get install etcd-server"
        peer = f"http://127.0.0.1:{self.peer_port}"
        self.starts += 1
        command = [
            program, "--data-dir", self.folder / "etcd.data", "--log-level", "warn",
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"default={peer}",
        ]  # fmt: skip
        env = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
        self.process = Process(f"etcd-{self.starts}", command, env, self.folder)
        wait_for("etcd answers", self._answers, 30)

    def _answers(self):
        assert self.process.alive(), self.process.tail()
        try:
            return self.call("kv/range", {"key": _b64("health")}) is not None
        except (OSError, urllib.error.URLError):
            return False

    def kill(self):
        """SIGKILL it."""
        self.process.kill()

    def pause(self):
        """SIGSTOP: connections stay open and nobody answers."""
        self.process.signal(signal.SIGSTOP)

    def resume(self):
        """SIGCONT."""
        self.process.signal(signal.SIGCONT)

    def stop(self):
        """End it."""
        self.process.stop()

    def call(self, method, body, timeout_s=30.0):
        """One JSON call of the v3 gateway."""
        request = urllib.request.Request(
            f"{self.url}/v3/{method}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return json.load(reply)

    def grant(self, ttl_s=600, lease=0):
        """A new lease; its id. With `lease`, under that id."""
        return int(self.call("lease/grant", {"TTL": ttl_s, "ID": lease})["ID"])

    def revoke(self, lease):
        """End a lease, and so delete its keys."""
        self.call("lease/revoke", {"ID": lease})

    def put(self, key, value, lease=0):
        """Write a value (an object is written as JSON)."""
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        self.call("kv/put", {"key": _b64(key), "value": _b64(text), "lease": lease})

    def delete(self, key):
        """Remove one key."""
        self.call("kv/deleterange", {"key": _b64(key)})

    def records(self, prefix):
        """All keys under a prefix: key -> (parsed value, lease id)."""
        reply = self.call("kv/range", {"key": _b64(prefix), "range_end": _b64(_prefix_end(prefix))})
        return {
            _text(kv["key"]): (json.loads(_text(kv["value"])), int(kv.get("lease", 0)))
            for kv in reply.get("kvs", [])
        }

    def instances(self, endpoint):
        """The endpoint records of `ns/comp/ep`: instance id -> record."""
        found = self.records(f"{INSTANCES}/{endpoint}/")
        return {value["instance_id"]: value for value, _ in found.values()}

    def wait_instances(self, endpoint, count, timeout_s=30.0):
        """The records of an endpoint once there are exactly `count`."""

        def look():
            found = self.instances(endpoint)
            return (found,) if len(found) == count else None

        return wait_for(f"{count} instances of {endpoint}", look, timeout_s)[0]

    def register(self, endpoint, port, codec="json", lease=None):
        """Announce a worker by hand, as a Dynamo worker would; its instance id."""
        lease = lease or self.grant()
        namespace, component, name = endpoint.split("/")
        path = f"{lease:x}/{endpoint}"
        self.put(
            f"{INSTANCES}/{endpoint}/{lease:x}",
            {
                "type": "Endpoint",
                "component": component,
                "endpoint": name,
                "namespace": namespace,
                "instance_id": lease,
                "transport": {"tcp": f"127.0.0.1:{port}/{path}"},
                "request_plane_codec": codec,
            },
            lease,
        )
        return lease


class Nats:
    """One nats-server on a free loopback port."""

    def __init__(self, folder):
        program = shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin:/sbin")
        assert program, "nats-server is not installed: apt-get install nats-server"
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        command = [program, "-a", "127.0.0.1", "-p", str(self.port)]
        self.process = Process("nats", command, dict(os.environ), folder)
        wait_for("nats-server listens", self._listens, 30)

    def _listens(self):
        assert self.process.alive(), self.process.tail()
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def stop(self):
        """End it."""
        self.process.kill()
