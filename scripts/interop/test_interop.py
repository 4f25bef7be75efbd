"""Stock Dynamo workers and a stock Dynamo client with the router between them."""

import pytest

from lab import RESPONSES, progress, so_far, wait_for
from store import card

CODECS = ["json", "msgpack"]
POLICIES = ["random", "power_of_two_choices", "least_loaded", "hash"]


def pair(lab, *worker_options, codec="msgpack", **route):
    """(listen, two workers, router)."""
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    workers = lab.stock_workers(2, backend, *worker_options, codec=codec)
    return listen, workers, lab.router(listen, backend, **route)


def both(found, workers, least_share):
    """Whether each worker had at least that share of the answers."""
    answers = found["by_worker"]
    return set(answers) == {w.hex for w in workers} and min(answers.values()) >= (
        least_share * found["ok"]
    )


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("codec", CODECS)
def test_ten_thousand_requests(lab, codec, response):
    listen, workers, router = pair(lab, codec=codec, policy="round_robin", response=response)
    before = lab.metrics(router)
    found = lab.run_client(listen, "--count", 10_000, "--concurrency", 32)
    assert found["ok"] == 10_000 and found.lost() == 0, found
    assert both(found, workers, 0.45), found
    after = lab.metrics(router)
    counted = [s for s, v in after.items() if "_total" in s and v - before.get(s, 0) >= 2_000]
    assert counted, f"no counter saw the requests: {sorted(after)}"


@pytest.mark.short
@pytest.mark.parametrize("policy", POLICIES)
def test_policy(lab, policy):
    # Stock clients send a fresh `request-id` with each request: it spreads them.
    more = {"header": "request-id"} if policy == "hash" else {}
    listen, workers, _ = pair(lab, policy=policy, **more)
    found = lab.run_client(listen, "--count", 1_000, "--concurrency", 16)
    assert found["ok"] == 1_000 and found.lost() == 0, found
    assert both(found, workers, 0.2), found


@pytest.mark.parametrize("response", RESPONSES)
def test_large_bodies(lab, response):
    listen, _, _ = pair(lab, codec="json", response=response)
    found = lab.run_client(
        listen, "--count", 24, "--concurrency", 4, "--body-bytes", 3_000_000
    )
    assert found["ok"] == 24 and found.lost() == 0, found


def test_workers_of_two_codecs(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    workers = [lab.stock_worker(backend, codec=codec) for codec in CODECS]
    lab.router(listen, backend, policy="round_robin")
    found = lab.run_client(listen, "--count", 500, "--concurrency", 8)
    assert found["ok"] == 500 and both(found, workers, 0.4), found


@pytest.mark.parametrize("codec", CODECS)
def test_the_listen_endpoint_in_etcd(lab, codec):
    listen, _, router = pair(lab, codec=codec)
    (key, (record, lease)), = lab.etcd.records(f"v1/instances/{listen}/").items()
    namespace, component, endpoint = listen.split("/")
    assert key == f"v1/instances/{listen}/{record['instance_id']:x}"
    assert lease == record["instance_id"] > 0
    assert (record["type"], record["request_plane_codec"]) == ("Endpoint", codec), record
    names = (record["namespace"], record["component"], record["endpoint"])
    assert names == (namespace, component, endpoint), record
    client = lab.stock_client(listen, "--count", 1)
    assert client.wait_event("ready")["instances"] == [router.instance]
    assert lab.finish(client)["ok"] == 1


def test_health_and_metrics_answer(lab):
    _, _, router = pair(lab)
    assert lab.http(router, "/live")[0] == 200
    wait_for("/health is 200", lambda: lab.http(router, "/health")[0] == 200, 10)
    assert lab.metrics(router)
    assert lab.http(router, "/nothing-here")[0] == 404


def test_health_without_workers(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    router = lab.router(listen, backend)
    assert lab.http(router, "/live")[0] == 200
    lab.stock_worker(backend)
    wait_for("/health is 200", lambda: lab.http(router, "/health")[0] == 200, 10)


def test_workers_come_and_go(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    first = lab.stock_worker(backend)
    lab.router(listen, backend)
    client = lab.stock_client(listen, "--until-told", "--concurrency", 8)
    progress(client, 200)
    second = lab.stock_worker(backend)
    progress(client, 100, worker=second)
    first.terminate()
    first.wait(20)
    progress(client, so_far(client) + 100)
    found = lab.finish(client)
    assert found.lost() == 0, found


def test_model_card_appears_under_the_listen_endpoint(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    worker = lab.stock_worker(backend)
    router = lab.router(listen, backend)
    key = f"v1/mdc/{backend}/{worker.hex}"
    record = card(backend, worker.instance)
    lab.etcd.put(key, record)

    ours = f"v1/mdc/{listen}/"
    found = wait_for("the card under the listen endpoint", lambda: lab.etcd.records(ours), 15)
    (name, (value, lease)), = found.items()
    assert name == f"{ours}{router.instance:x}", found
    namespace, component, endpoint = listen.split("/")
    expected = {
        **record, "namespace": namespace, "component": component, "endpoint": endpoint,
        "instance_id": router.instance,
    }  # fmt: skip
    assert value == expected and lease == router.instance, found
    lab.etcd.delete(key)
    wait_for("the card is withdrawn", lambda: not lab.etcd.records(ours), 15)
