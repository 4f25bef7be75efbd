"""The discovery store goes away and comes back; leases are lost; records make no sense."""

import time

import pytest

from lab import progress, so_far, wait_for

OUTAGE_S = 12
# Longer than any outage in here, so that a stock peer does not end itself over it.
PATIENT = {"ETCD_LEASE_TTL": "120"}
CLIENT = {"DYN_RUNTIME_INHIBITED_DURATION_SECS": "0"}


def served(lab, **route):
    """A worker, a router and its endpoint, all with leases that survive an outage."""
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    worker = lab.stock_worker(backend, **PATIENT)
    return backend, listen, worker, lab.router(listen, backend, env=PATIENT, **route)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_etcd_is_away_under_load(own_etcd, lab, how):
    backend, listen, worker, router = served(lab)
    options = ("--concurrency", 8, "--pause-s", 0.01)
    client = lab.stock_client(listen, "--until-told", *options, **PATIENT)
    progress(client, 100)
    own_etcd.pause() if how == "stopped" else own_etcd.kill()
    gone = time.monotonic()
    while time.monotonic() < gone + OUTAGE_S:
        assert client.alive() and router.alive()
        assert lab.http(router, "/live")[0] == 200
        time.sleep(0.5)
    own_etcd.resume() if how == "stopped" else own_etcd.start()

    progress(client, 500, worker=worker)
    second = lab.stock_worker(backend, **PATIENT)
    progress(client, 50, worker=second)
    found = lab.finish(client)
    assert found.lost() == 0, found
    late = lab.run_client(listen, "--count", 400, "--concurrency", 8, **PATIENT)
    assert late["ok"] == 400 and late["by_worker"].get(second.hex, 0) > 50, late
    assert router.instance in lab.etcd.instances(listen)


def test_etcd_comes_after_the_router(own_etcd, lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    own_etcd.kill()
    router = lab.router(listen, backend, wait=False)
    wait_for("/live is 200", lambda: lab.http(router, "/live")[0] == 200, 15)
    time.sleep(2)
    assert router.alive(), router.tail()
    own_etcd.start()
    lab.stock_worker(backend)
    lab.etcd.wait_instances(listen, 1, 45)
    found = lab.run_client(listen, "--count", 50)
    assert found["ok"] == 50, found


def test_a_revoked_lease_is_replaced(lab):
    backend, listen, _, router = served(lab)
    options = ("--concurrency", 4, "--pause-s", 0.01)
    client = lab.stock_client(listen, "--until-told", *options, **CLIENT)
    progress(client, 100)
    lab.etcd.revoke(router.instance)

    def again():
        found = set(lab.etcd.instances(listen)) - {router.instance}
        return found

    fresh = wait_for("a record under a new id", again, 45).pop()
    (_, (record, lease)), = lab.etcd.records(f"v1/instances/{listen}/").items()
    assert lease == fresh == record["instance_id"] != router.instance
    progress(client, so_far(client) + 100)
    found = lab.finish(client)
    assert found["hung"] == 0 and found["wrong"] == 0, found
    assert router.alive()


def test_a_lost_lease_brings_the_model_card_back(lab):
    backend, listen, worker, router = served(lab)
    namespace, component, endpoint = backend.split("/")
    card = {"display_name": "m", "slug": "m", "runtime_config": {}}
    record = {
        "type": "Model", "namespace": namespace, "component": component, "endpoint": endpoint,
        "instance_id": worker.instance, "card_json": card,
    }  # fmt: skip
    lab.etcd.put(f"v1/mdc/{backend}/{worker.hex}", record)
    ours = f"v1/mdc/{listen}/"
    wait_for("the card", lambda: f"{ours}{router.instance:x}" in lab.etcd.records(ours), 15)
    lab.etcd.revoke(router.instance)

    def both():
        found = lab.etcd.instances(listen)
        names = {f"{ours}{instance:x}" for instance in found}
        return found and router.instance not in found and names == set(lab.etcd.records(ours))

    wait_for("record and card under the new id", both, 45)


def test_records_that_make_no_sense(lab):
    backend, listen, worker, router = served(lab)
    prefix = f"v1/instances/{backend}"
    namespace, component, endpoint = backend.split("/")
    like = {
        "type": "Endpoint", "namespace": namespace, "component": component, "endpoint": endpoint,
    }  # fmt: skip
    lab.etcd.put(f"{prefix}/1", "{")
    lab.etcd.put(f"{prefix}/2", {})
    lab.etcd.put(f"{prefix}/zz", {**like, "instance_id": 3, "transport": {"tcp": "x"}})
    for number, tcp in enumerate(["host.name:1/x", "127.0.0.1:99999/x", "127.0.0.1:1", ""], 16):
        record = {**like, "instance_id": number, "transport": {"tcp": tcp}}
        lab.etcd.put(f"{prefix}/{number:x}", record)
    lab.etcd.put(f"{prefix}/20", {**like, "instance_id": 32, "transport": {"http": "y"}})
    lab.etcd.put(f"{prefix}/21", {**like, "instance_id": -1, "transport": {"tcp": "127.0.0.1:1/x"}})
    # The watch has seen all of them once it has seen the worker that comes last.
    second = lab.stock_worker(backend)
    found = {"by_worker": {}}
    for _ in range(20):
        found = lab.run_client(listen, "--count", 100, "--concurrency", 4, **CLIENT)
        assert found["hung"] == 0 and found["wrong"] == 0, found
        if second.hex in found["by_worker"]:
            break
    assert found["ok"] == 100 and set(found["by_worker"]) == {worker.hex, second.hex}, found
    assert router.alive() and "panicked" not in router.log()


def test_a_worker_whose_record_moves(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    one, two = (lab.fake_worker(lab.endpoint(f"hidden{n}"), "answer") for n in (1, 2))
    instance = lab.etcd.register(backend, one.port)
    lab.router(listen, backend)
    found = lab.run_client(listen, "--count", 20, "--plain-echo")
    assert found["ok"] == 20 and len(one.events("request")) == 20, found
    lab.etcd.register(backend, two.port, lease=instance)

    def moved():
        assert lab.run_client(listen, "--count", 5, "--plain-echo")["ok"] == 5
        return two.events("request")

    wait_for("requests go to the new address", moved, 20)


def test_listen_and_target_must_differ(lab):
    same = lab.endpoint("loop")
    router = lab.router(same, same, wait=False)
    assert router.wait(15) == 2, router.tail()
