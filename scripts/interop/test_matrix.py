"""The interoperability matrix: stock and corelane, as client and as worker, straight and through
the router in both response modes, on both response planes, in both codecs, in every kind of call.

For each plane four workers, one router with a route for each way to each of them, and two clients
that go through all cases against all targets. Each test looks at one cell.
"""

import json
import sys

import pytest

from lab import HERE, Lab, corelane_peer, corelane_program, data_cpus, free_port, to_toml, wait_for

CODECS = ["json", "msgpack"]
PEERS = ["stock", "corelane"]
WAYS = ["straight", "direct", "relay"]
PLANES = ["tcp", "quic"]
# What each item must bring back, in both codecs.
TEXT = {"é": [1, -2, 2.5, True, None, 'grüße\n"\\'], "": {}, "big": 1 << 53}
FAILURE = "the engine failed as it was asked to"
ENDLESS = {"items": 100_000, "delay_s": 0.002}
CASES = {
    "unary": {"text": TEXT},
    "stream": {"items": 128, "text": "x"},
    "error prologue": {"refuse": True},
    "error item": {"items": 5, "fail_after": 2},
    "stop": ENDLESS,
    "kill": ENDLESS,
    "drop": ENDLESS,
}
CELLS = [
    pytest.param(client, worker, way, codec, id=f"{client}-{worker}-{way}-{codec}")
    for client in PEERS
    for worker in PEERS
    for way in WAYS
    for codec in CODECS
]


class Matrix:
    """All processes, and what the clients found."""

    def __init__(self, lab, plane):
        self.lab = lab
        self.plane = {"DYN_RESPONSE_PLANE": plane}
        self.workers = {
            (kind, codec): self._worker(kind, codec) for kind in PEERS for codec in CODECS
        }
        for worker in self.workers.values():
            worker.wait_event("ready", 60)
        self._router()
        self.clients = {kind: self._client(kind) for kind in PEERS}
        for client in self.clients.values():
            client.wait_event("done", 100)

    def target(self, kind, way, codec):
        """`NS/COMP` of one way to one worker."""
        return f"{self.lab.namespace}/{kind}-{way}-{codec}"

    def _worker(self, kind, codec):
        command = {
            "stock": [sys.executable, HERE / "matrix_worker.py"],
            "corelane": [corelane_peer(), "worker"],
        }[kind]
        command.append(self.target(kind, "straight", codec))
        env = self.lab.env(DYN_REQUEST_PLANE_CODEC=codec, DYN_SYSTEM_PORT="-1", **self.plane)
        return self.lab.start(f"{kind}-{codec}", command, env)

    def _router(self):
        """One router with all ways that need one."""
        lines = [
            f'[server]\nhost = "127.0.0.1"\nport = 0\nstatus_port = {free_port()}',
            f'[discovery]\nbackend = "etcd"\n[core]\ncpus = "{data_cpus()}"',
        ]
        listens = []
        for kind, codec in self.workers:
            for way in WAYS[1:]:
                for endpoint in ("generate", "chat"):
                    listen = f"{self.target(kind, way, codec)}/{endpoint}"
                    straight = f"{self.target(kind, 'straight', codec)}/{endpoint}"
                    route = {"listen": listen, "target": straight, "response": way}
                    lines += ["[[route]]", *(f"{k} = {to_toml(v)}" for k, v in route.items())]
                    listens.append(listen)
        path = self.lab.folder / "matrix.toml"
        path.write_text("\n".join(lines) + "\n")
        command = [corelane_program(), "serve", "--config", path]
        router = self.lab.start("router", command, self.lab.env(**self.plane))

        def listed():
            assert router.alive(), router.tail()
            return all(self.lab.etcd.instances(listen) for listen in listens)

        wait_for("all routes in etcd", listed, 60)

    def _client(self, kind):
        targets = [self.target(worker, way, codec) for worker in PEERS for way in WAYS
                   for codec in CODECS]  # fmt: skip
        command = {
            "stock": [sys.executable, HERE / "matrix_client.py", json.dumps(CASES)],
            "corelane": [corelane_peer(), "client", json.dumps(CASES)],
        }[kind]
        # An error in the prologue makes a client leave its only instance out, for 5 s.
        env = self.lab.env(DYN_RUNTIME_INHIBITED_DURATION_SECS="0", **self.plane)
        return self.lab.start(f"{kind}-client", command + targets, env)

    def found(self, client, target, case):
        """What a client found of one case."""
        for event in self.clients[client].events("case"):
            if (event["target"], event["case"]) == (target, case):
                return event["found"]
        raise AssertionError(f"{client} did not come to {case} of {target}")

    def ended(self, worker, client, target, case):
        """How a worker says that it ended."""
        key = f"{client} {target} {case}"

        def look():
            for event in worker.events():
                if event.get("key") == key:
                    return event["event"]
            return None

        return wait_for(f"{worker} has ended '{key}'", look, 30)


@pytest.fixture(scope="module", params=PLANES)
def matrix(request, tmp_path_factory, shared_etcd):
    """All cases of all cells of a plane, run once."""
    for program in (corelane_program(), corelane_peer()):
        assert program.is_file(), f"{program} does not exist: run `scripts/test build`"
    lab = Lab(tmp_path_factory.mktemp("matrix"), shared_etcd)
    try:
        yield Matrix(lab, request.param)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{lab.logs()}") from None
    finally:
        lab.close()


@pytest.mark.short
@pytest.mark.parametrize("client, worker, way, codec", CELLS)
def test_cell(matrix, client, worker, way, codec):
    target = matrix.target(worker, way, codec)
    process = matrix.workers[worker, codec]
    found = {case: matrix.found(client, target, case) for case in CASES}
    hung = [case for case, seen in found.items() if "hung" in seen]
    assert not hung, hung

    def items(count, echo):
        return [{"i": index, "echo": echo} for index in range(count)]

    assert found["unary"] == {"items": items(1, TEXT), "error": None, "complete": True}
    assert found["stream"] == {"items": items(128, "x"), "error": None, "complete": True}
    assert found["error prologue"]["items"] == [], found["error prologue"]
    assert FAILURE in found["error prologue"]["error"], found["error prologue"]
    assert found["error item"]["items"] == items(2, None), found["error item"]
    assert FAILURE in found["error item"]["error"], found["error item"]
    for case in ("stop", "kill", "drop"):
        seen = found[case]
        assert 3 <= len(seen["items"]) < 100_000 and seen["error"] is None, (case, seen)
        assert matrix.ended(process, client, target, case) == "cancelled", case
    for case in ("unary", "stream", "error item"):
        assert matrix.ended(process, client, target, case) == "finished", case


@pytest.mark.short
@pytest.mark.parametrize("client, worker, way, codec", CELLS)
def test_bidirectional_cell(matrix, client, worker, way, codec):
    if client == "stock":
        pytest.skip("the stock wheel serves bidirectional endpoints, but has no call for them")
    found = matrix.found(client, matrix.target(worker, way, codec), "bidirectional")
    sums = [n * (n + 1) // 2 for n in range(1, 101)]
    assert found == {"items": [*sums, "over"], "error": None, "complete": True}
