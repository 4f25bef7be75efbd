"""TLS (DYN_TCP_TLS_*) between stock peers and ours, in every role."""

import shutil
import subprocess

import pytest

from lab import wait_for

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")

EXTENSIONS = "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n"
KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
SERVED = ("--count", 1_000, "--concurrency", 16, "--items", 3)


class Pki:
    """An authority and one certificate of it that is good for both sides of a connection."""

    def __init__(self, folder, name):
        self.folder = folder / name
        self.folder.mkdir()
        (self.folder / "extensions").write_text(EXTENSIONS)
        self._run(f"req -x509 {KEY} -keyout ca.key -out ca.pem -days 2 -subj /CN={name}")
        self._run(f"req {KEY} -keyout key.pem -out cert.csr -subj /CN=peer")
        self._run(
            "x509 -req -in cert.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 "
            "-extfile extensions -out cert.pem"
        )

    def _run(self, line):
        command = ["openssl", *line.split()]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)

    def env(self, mutual=False):
        """Both sides of every connection; `mutual`: with client certificates."""
        path = {name: self.folder / f"{name}.pem" for name in ("ca", "cert", "key")}
        env = {
            "DYN_TCP_TLS_CERT_PATH": path["cert"],
            "DYN_TCP_TLS_KEY_PATH": path["key"],
            "DYN_TCP_TLS_CA_CERT_PATH": path["ca"],
        }
        if mutual:
            env["DYN_TCP_TLS_CLIENT_CA_CERT_PATH"] = path["ca"]
            env["DYN_TCP_TLS_CLIENT_CERT_PATH"] = path["cert"]
            env["DYN_TCP_TLS_CLIENT_KEY_PATH"] = path["key"]
        return env


@pytest.fixture
def pki(tmp_path):
    """The authority of a test."""
    return Pki(tmp_path, "good")


def whole(found):
    """All requests of SERVED had their whole answer."""
    return found["ok"] == 1_000 and found.lost() == 0


@pytest.mark.short
@pytest.mark.parametrize("mutual", [False, True], ids=["server", "mutual"])
def test_stock_peers_through_the_router(lab, pki, mutual):
    env = pki.env(mutual)
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_workers(2, backend, "--items", 3, **env)
    router = lab.router(listen, backend, env=env)
    found = lab.run_client(listen, *SERVED, **env)
    assert whole(found), found
    samples = lab.metrics(router)
    for side in ("accepted", "dialled"):
        assert samples[f'corelane_tls_handshakes_total{{side="{side}"}}'] >= 1, samples
    failures = sum(v for s, v in samples.items() if s.startswith("corelane_tls_failures_total"))
    assert failures == 0, samples


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "ours"])
def test_responses_pass_through_the_router(lab, pki, ours):
    """Relay: the router is dialled by callers and workers, and dials both, all of it in TLS."""
    env = pki.env(mutual=True)
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    if ours:
        lab.echo_worker(backend, "--items", 3, **env)
    else:
        lab.stock_workers(2, backend, "--items", 3, **env)
    router = lab.router(listen, backend, response="relay", env=env)
    found = lab.run_client(listen, *SERVED, *(["--plain-echo"] if ours else []), **env)
    assert whole(found), found
    status, call = lab.call(listen, "--body", "{}", "--count", 100, "--concurrency", 8, **env)
    assert status == 0, call.tail()
    large = ("--count", 16, "--concurrency", 4, "--items", 3, "--body-bytes", 300_000)
    found = lab.run_client(listen, *large, *(["--plain-echo"] if ours else []), **env)
    assert found["ok"] == 16 and found.lost() == 0, found
    if not ours:
        found = lab.run_client(listen, "--count", 8, "--items", 3, "--kill-after", 1, **env)
        assert found["cancelled"] == 8, found

    def empty():
        samples = lab.metrics(router)
        left = [v for s, v in samples.items() if s.startswith("corelane_relays{")]
        return sum(left) == 0

    wait_for("nothing is left in the router", empty, 60)
    failures = sum(
        v for s, v in lab.metrics(router).items() if s.startswith("corelane_tls_failures_total")
    )
    assert failures == 0, lab.metrics(router)


def test_requests_in_tls_and_responses_on_quic(lab, pki):
    """QUIC has certificates of its own; TLS is for the rest."""
    env = {**pki.env(mutual=True), "DYN_RESPONSE_PLANE": "quic"}
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_workers(2, backend, "--items", 3, **env)
    lab.router(listen, backend, response="relay", env=env)
    found = lab.run_client(listen, *SERVED, **env)
    assert whole(found), found
    status, call = lab.call(listen, "--body", "{}", "--count", 100, "--concurrency", 8, **env)
    assert status == 0, call.tail()


@pytest.mark.parametrize("mutual", [False, True], ids=["server", "mutual"])
def test_stock_client_on_our_worker(lab, pki, mutual):
    env = pki.env(mutual)
    backend = lab.endpoint("backend")
    worker = lab.echo_worker(backend, "--items", 3, **env)
    found = lab.run_client(backend, *SERVED, "--plain-echo", **env)
    assert whole(found), (found, worker.tail())


@pytest.mark.parametrize("mutual", [False, True], ids=["server", "mutual"])
def test_our_caller_on_a_stock_worker(lab, pki, mutual):
    env = pki.env(mutual)
    backend = lab.endpoint("backend")
    worker = lab.stock_worker(backend, "--items", 3, "--record", **env)
    options = ("--body", '{"a":1}', "--count", 500, "--concurrency", 8)
    status, call = lab.call(backend, *options, **env)
    assert status == 0, call.tail()
    worker.wait_event("finished", count=500)


def test_our_caller_cancels_over_tls(lab, pki):
    env = pki.env()
    backend = lab.endpoint("backend")
    options = ("--items", 100_000, "--delay-us", 5_000, "--record")
    worker = lab.stock_worker(backend, *options, **env)
    for how in ("--stop-after", "--kill-after"):
        lab.call(backend, "--body", '{"a":1}', how, 3, **env)
    assert worker.wait_event("cancelled", 15, count=2)["sent"] < 50_000, worker.tail()


def test_a_stock_client_cancels_on_our_worker(lab, pki):
    env = pki.env()
    backend = lab.endpoint("backend")
    worker = lab.echo_worker(backend, "--items", 100_000, "--delay-us", 5_000, **env)
    for how in ("--stop-after", "--kill-after"):
        found = lab.run_client(
            backend, "--count", 4, "--concurrency", 4, "--items", 100_000, "--plain-echo", how, 3,
            **env,
        )  # fmt: skip
        assert found["cancelled"] == 4, (found, worker.tail())


def test_strangers_are_refused(lab, pki, tmp_path):
    env = pki.env(mutual=True)
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_worker(backend, **env)
    router = lab.router(listen, backend, env=env)
    one = ("--count", 1, "--deadline-s", 20)

    def counted(reason):
        series = f'corelane_tls_failures_total{{side="accepted",reason="{reason}"}}'
        return lab.metrics(router)[series] >= 1

    # An authority that nobody here knows, no certificate, and no TLS at all.
    cases = [
        ("unknown_authority", Pki(tmp_path, "bad").env(True) | {
            "DYN_TCP_TLS_CA_CERT_PATH": env["DYN_TCP_TLS_CA_CERT_PATH"]}),
        ("no_certificate", pki.env()),
        ("not_tls", {}),
    ]  # fmt: skip
    for reason, theirs in cases:
        found = lab.run_client(listen, *one, **theirs)
        assert found["ok"] == 0, found
        wait_for(f"{reason} is counted", lambda reason=reason: counted(reason))
    assert "speak TLS" in router.log(), router.tail()


def test_certificates_are_changed_under_way(lab, pki):
    env = pki.env()
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_worker(backend, "--items", 3, **env)
    router = lab.router(listen, backend, env=env)
    pki._run(
        "x509 -req -in cert.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 3 "
        "-extfile extensions -out cert.pem"
    )
    wait_for("the router has them", lambda: lab.metrics(router)["corelane_tls_reloads_total"] > 0)
    found = lab.run_client(listen, *SERVED, **env)
    assert whole(found), found
