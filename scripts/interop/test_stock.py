"""The stock peers against each other, so that later failures point at what is between them."""

import pytest

from lab import progress, so_far, wait_for

pytestmark = pytest.mark.stock


@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_stock_pair_uses_both_workers(lab, codec):
    backend = lab.endpoint("backend")
    one, two = lab.stock_workers(2, backend, "--items", 5, codec=codec)
    found = lab.run_client(backend, "--count", 400, "--concurrency", 16, "--items", 5)
    assert found["ok"] == 400 and found.lost() == 0, found
    assert set(found["by_worker"]) == {one.hex, two.hex}, found
    records = lab.etcd.instances(backend)
    assert {r["request_plane_codec"] for r in records.values()} == {codec}


@pytest.mark.parametrize("how", ["--stop-after", "--kill-after"])
def test_stock_cancel_reaches_the_worker(lab, how):
    backend = lab.endpoint("backend")
    worker = lab.stock_worker(backend, "--items", 100_000, "--delay-us", 5000, "--record")
    found = lab.run_client(backend, "--count", 4, "--concurrency", 4, "--items", 100_000, how, 3)
    assert found["cancelled"] == 4 and found.lost() == 0, found
    event = worker.wait_event("cancelled", 20, count=4)
    assert event["sent"] < 50_000, event


def test_stock_client_survives_a_killed_worker(lab):
    backend = lab.endpoint("backend")
    one, two = lab.stock_worker(backend, ETCD_LEASE_TTL=3), lab.stock_worker(backend)
    client = lab.stock_client(backend, "--until-told", "--concurrency", 8)
    progress(client, 200)
    one.kill()
    wait_for("etcd forgets the dead", lambda: len(lab.etcd.instances(backend)) == 1, 20)
    progress(client, so_far(client) + 100)
    found = lab.finish(client)
    assert found["hung"] == 0 and found["wrong"] == 0, found
    assert found["by_worker"][two.hex] > 100, found


def test_fake_worker_refuses_the_stock_client(lab):
    backend = lab.endpoint("backend")
    lab.fake_worker(backend, "refuse", "--text", "Server overloaded: by a test")
    found = lab.run_client(backend, "--count", 3, "--deadline-s", 60)
    assert found["failed"] == 3 and "overloaded" in str(found["errors"]).lower(), found


def test_fake_worker_answers_the_stock_client(lab):
    backend = lab.endpoint("backend")
    lab.fake_worker(backend, "answer")
    found = lab.run_client(backend, "--count", 20, "--concurrency", 4, "--plain-echo")
    assert found["ok"] == 20, found
