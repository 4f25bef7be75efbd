"""The laboratory of a test: an etcd, stock and corelane processes, and a folder of their logs."""

import itertools
import json
import os
import re
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

from process import Process, free_port, wait_for
from store import Etcd

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOREIGN = ("DYN_", "NATS_", "ETCD_", "OTEL_", "RUST_", "CORELANE_")
# What scripts/test says to the tests and to the processes under test.
IO = os.environ.get("CORELANE_IO")
LOG = os.environ.get("CORELANE_TEST_LOG", "info")
# The values of `response` that this version serves.
RESPONSES = ["direct", "relay"]

_numbers = itertools.count(1)


def corelane_program():
    """The binary under test."""
    built = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug" / "corelane"
    return Path(os.environ.get("CORELANE_BIN", built))


def corelane_peer():
    """Both ends of the matrix on the component API: `peer.rs`, built beside the binary."""
    return corelane_program().parent / "examples" / "interop-peer"


def data_cpus():
    """The CPUs that a router under test runs its shards on: two if the machine has them."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    return ",".join(map(str, cpus))


def to_toml(value):
    """One TOML value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, str) else str(value)


class Summary(dict):
    """What a client found; `str()` of it explains a failed assertion."""

    def lost(self):
        """Requests that did not get their whole, right answer."""
        return self["failed"] + self["hung"] + self["wrong"]


class Lab:
    """Starts things, names them, and ends all of them in `close`."""

    def __init__(self, folder, etcd):
        self.folder = Path(folder)
        self.etcd = etcd
        self.namespace = f"lab{os.getpid()}x{next(_numbers)}"
        self.processes = []

    def endpoint(self, component, name="generate"):
        """`NS/COMP/EP` in this test's own namespace."""
        return f"{self.namespace}/{component}/{name}"

    def env(self, **extra):
        """The environment of a process on loopback; nothing of ours or Dynamo's leaks in."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        env.update(
            ETCD_ENDPOINTS=self.etcd.url,
            DYN_TCP_RPC_HOST="127.0.0.1",
            DYN_TCP_RESPONSE_STREAM_HOST="127.0.0.1",
            DYN_LOG="error",
            # Nobody is to lose his lease because the machine is busy.
            ETCD_LEASE_TTL="120",
            CORELANE_LOG=LOG,
            PYTHONUNBUFFERED="1",
            PYTHONDONTWRITEBYTECODE="1",
        )
        if IO:
            env["CORELANE_IO"] = IO
        env.update({key: str(value) for key, value in extra.items()})
        return env

    def start(self, name, command, env=None):
        """Start any process of this test."""
        name = f"{name}-{next(_numbers)}"
        process = Process(name, command, env or self.env(), self.folder)
        self.processes.append(process)
        return process

    # --- stock peers -----------------------------------------------------------------

    def stock_worker(self, endpoint, *options, codec="msgpack", wait=True, **env):
        """A stock worker of `endpoint`; ready when this returns."""
        command = [sys.executable, HERE / "stock_worker.py", "--endpoint", endpoint, *options]
        worker = self.start("worker", command, self.env(DYN_REQUEST_PLANE_CODEC=codec, **env))
        if wait:
            self.ready(worker)
        return worker

    @staticmethod
    def ready(worker):
        """Wait for a worker started with `wait=False`."""
        worker.instance = worker.wait_event("ready")["instance"]
        worker.hex = f"{worker.instance:x}"
        return worker

    def stock_workers(self, count, endpoint, *options, **more):
        """Several of them, started at the same time."""
        workers = [
            self.stock_worker(endpoint, *options, wait=False, **more) for _ in range(count)
        ]
        return [self.ready(worker) for worker in workers]

    def stock_client(self, endpoint, *options, **env):
        """A stock client, running; see `finish`."""
        command = [sys.executable, HERE / "stock_client.py", "--endpoint", endpoint, *options]
        return self.start("client", command, self.env(**env))

    def finish(self, client, timeout_s=300.0):
        """Wait for a client's summary; one that sends until it is told is told."""
        if "--until-told" in client.command:
            client.wait_event("ready")
            client.signal(signal.SIGUSR1)
        return Summary(client.wait_event("summary", timeout_s))

    def run_client(self, endpoint, *options, timeout_s=300.0, **env):
        """Run a stock client to its end; its summary."""
        return self.finish(self.stock_client(endpoint, *options, **env), timeout_s)

    def fake_worker(self, endpoint, mode, *options):
        """A worker that misbehaves on purpose, beside the good ones in discovery."""
        command = [sys.executable, HERE / "fake_worker.py", "--mode", mode, *options]
        worker = self.start(f"fake-{mode}", command)
        worker.port = worker.wait_event("ready")["port"]
        worker.instance = self.etcd.register(endpoint, worker.port)
        return worker

    # --- corelane --------------------------------------------------------------------

    def router(self, listen, target, wrap=(), settings=(), wait=True, env=(), **options):
        """`corelane serve` between two endpoints; `options` are keys of `[[route]]`.

        `settings` are more lines of the file, such as `{"core": {"buffers": 64}}`, `env` more
        variables, and `wrap` is a command to start it with.
        """
        env = self.env(**dict(env))
        config = {
            "server": {"host": "127.0.0.1", "port": 0, "status_port": free_port()},
            "discovery": {"backend": "etcd"},
            "core": {"cpus": data_cpus()},
            "drain": {"grace_s": 1, "timeout_s": 300},
        }
        for section, values in dict(settings).items():
            config.setdefault(section, {}).update(values)
        name = f"router{next(_numbers)}"
        path = self.folder / f"{name}.toml"
        path.write_text(_config_text(config, {"listen": listen, "target": target, **options}))
        command = [*wrap, corelane_program(), "serve", "--config", path]
        router = self.start(name, command, env)
        router.config_path = path
        router.status_port = config["server"]["status_port"]
        if wait:
            wait_for(f"{listen} in etcd", lambda: self._listed(router, listen), 30)
        return router

    def _listed(self, router, listen):
        assert router.alive(), router.tail()
        found = self.etcd.instances(listen)
        if not found:
            return False
        router.instance, record = next(iter(found.items()))
        router.address, router.path = split_address(record)
        return self.http(router, "/live")[0] == 200

    def echo_worker(self, endpoint, *options, **env):
        """`corelane worker echo`, listed in etcd when this returns."""
        before = set(self.etcd.instances(endpoint))
        command = [corelane_program(), "worker", "echo", "--endpoint", endpoint]
        command += ["--discovery", "etcd", *options]
        worker = self.start("echo", command, self.env(**env))

        def listed():
            assert worker.alive(), worker.tail()
            return set(self.etcd.instances(endpoint)) - before

        worker.instance = wait_for(f"{worker} in etcd", listed, 30).pop()
        return worker

    def call(self, endpoint, *options, timeout_s=300.0, **env):
        """Run `corelane call`; its exit status and the process."""
        process = self.start_call(endpoint, *options, **env)
        return process.wait(timeout_s), process

    def start_call(self, endpoint, *options, **env):
        """`corelane call`, running."""
        command = [corelane_program(), "call", "--endpoint", endpoint, "--discovery", "etcd"]
        return self.start("call", [*command, *options], self.env(**env))

    def http(self, router, path, timeout_s=60.0):
        """(status, text) of the status server; (0, why) when it cannot be reached."""
        url = f"http://127.0.0.1:{router.status_port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except OSError as error:
            return 0, str(error)

    def metrics(self, router):
        """The samples of /metrics: the full series text -> value."""
        status, text = self.http(router, "/metrics")
        assert status == 200, f"/metrics answered {status}: {text[:200]}"
        samples = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                samples[series] = float(value)
        return samples

    def close(self):
        """End everything at once. How processes end gently is for tests to ask, not for this."""
        for process in self.processes:
            process.popen.kill()
        for process in self.processes:
            process.popen.wait(10)

    def logs(self):
        """The ends of all logs, for a failed test's report."""
        return "\n".join(process.tail(3000) for process in self.processes)


def _config_text(config, route):
    """The TOML of a router's file."""
    lines = []
    for section, values in config.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {to_toml(value)}" for key, value in values.items()]
    lines.append("[[route]]")
    lines += [f"{key} = {to_toml(value)}" for key, value in route.items()]
    return "\n".join(lines) + "\n"


def split_address(record):
    """((host, port), path bytes) of an endpoint record."""
    where, _, path = record["transport"]["tcp"].removeprefix("tcp://").partition("/")
    host, _, port = where.rpartition(":")
    return (host, int(port)), path.encode()


def lab_address(router):
    """((host, port), path) that a raw caller of this router dials and names."""
    return router.address, router.path


def progress(client, at_least, field="ok", worker=None):
    """Wait until a running client counts `at_least` of something, or of the answers of a worker."""

    def look():
        assert client.alive(), client.tail()
        seen = client.events("progress")
        if not seen:
            return False
        count = seen[-1]["by_worker"].get(worker.hex, 0) if worker else seen[-1][field]
        return count >= at_least

    wait_for(f"{client} has {at_least} {field}", look, poll_s=0.1)


def so_far(client, field="ok"):
    """What a running client counts now."""
    seen = client.events("progress")
    return seen[-1][field] if seen else 0


def metric_sum(samples, pattern):
    """The sum of all series whose text matches; None when there is none."""
    found = [value for series, value in samples.items() if re.search(pattern, series)]
    return sum(found) if found else None


__all__ = [
    "Etcd", "HERE", "Lab", "RESPONSES", "Summary", "corelane_peer", "corelane_program", "data_cpus",
    "free_port", "lab_address", "metric_sum", "progress", "so_far", "split_address", "to_toml",
    "wait_for",
]  # fmt: skip
