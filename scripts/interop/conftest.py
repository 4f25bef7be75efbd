"""Fixtures: one etcd for the run, one laboratory for each test."""

import os

import pytest
import zmq

from lab import Lab, corelane_program
from store import Etcd


def pytest_collection_modifyitems(items):
    """Tests that need the binary are skipped only when the caller says that there is none."""
    if os.environ.get("HAVE_CORELANE", "1") != "0":
        return
    skip = pytest.mark.skip(reason="HAVE_CORELANE=0: only the stock peers are tested")
    for item in items:
        if item.get_closest_marker("stock") is None:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Put the ends of all logs into the report of a failed test."""
    report = yield
    setattr(item, f"report_{report.when}", report)
    laboratory = getattr(item, "funcargs", {}).get("lab")
    if report.when == "call" and report.failed and laboratory is not None:
        report.sections.append(("logs of the processes", laboratory.logs()))
    return report


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory):
    """The etcd of all tests that do it no harm."""
    etcd = Etcd(tmp_path_factory.mktemp("etcd"))
    yield etcd
    etcd.stop()


@pytest.fixture
def own_etcd(tmp_path):
    """An etcd that a test may stop and kill. Ask for it before `lab`."""
    etcd = Etcd(tmp_path)
    yield etcd
    etcd.stop()


@pytest.fixture
def lab(request, tmp_path):
    """A laboratory; all of its processes are gone afterwards."""
    if "own_etcd" in request.fixturenames:
        etcd = request.getfixturevalue("own_etcd")
    else:
        etcd = request.getfixturevalue("shared_etcd")
    if request.node.get_closest_marker("stock") is None:
        program = corelane_program()
        assert program.is_file(), f"{program} does not exist: run `scripts/test build`"
    laboratory = Lab(tmp_path, etcd)
    yield laboratory
    laboratory.close()


@pytest.fixture
def context():
    """libzmq; its sockets do not outlive a test."""
    context = zmq.Context()
    yield context
    context.destroy(linger=0)
