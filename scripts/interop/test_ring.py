"""Which ring the router runs on, what it says about it, and what it does without io_uring."""

import ctypes
import errno
import re
import subprocess
import sys

import pytest

from lab import HERE, IO, RESPONSES, corelane_program, free_port, to_toml

FORBID = [sys.executable, HERE / "forbid_uring.py"]
IO_URING_SETUP = 425
CAUSE = re.compile(r"EPERM|not permitted|permission|seccomp|refused|forbidden|denied", re.I)


def epoll_series(samples):
    """The series of /metrics that say `epoll` and are not zero."""
    return [series for series, value in samples.items() if "epoll" in series and value]


@pytest.mark.stock
@pytest.mark.forbidden
def test_the_filter_refuses_io_uring_and_nothing_else():
    probe = (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True);"
        f"print(libc.syscall({IO_URING_SETUP}, 1, 0), ctypes.get_errno(), libc.getpid() > 0)"
    )
    command = [*FORBID, sys.executable, "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["-1", str(errno.EPERM), "True"], done


@pytest.mark.forbidden
def test_forbidden_io_uring_is_named_and_served_without(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    lab.stock_workers(2, backend, "--items", 3)
    router = lab.router(listen, backend, wrap=FORBID, env={"CORELANE_IO": "auto"})
    found = lab.run_client(listen, "--count", 1000, "--concurrency", 16, "--items", 3)
    assert found["ok"] == 1000 and len(found["by_worker"]) == 2, found
    told = [line for line in router.log().splitlines() if "io_uring" in line]
    assert any(CAUSE.search(line) for line in told), f"no cause in the log: {told}"
    series = epoll_series(lab.metrics(router))
    assert any(CAUSE.search(name) for name in series), f"no cause in the metrics: {series}"


@pytest.mark.forbidden
def test_forbidden_io_uring_stops_who_demands_it(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    router = lab.router(listen, backend, wrap=FORBID, env={"CORELANE_IO": "uring"}, wait=False)
    assert router.wait(20) == 78, router.tail()
    assert "io_uring" in router.log() and CAUSE.search(router.log()), router.tail()
    assert "panicked" not in router.log()


@pytest.mark.short
def test_the_ring_is_named(lab):
    backend, listen = lab.endpoint("backend"), lab.endpoint("router")
    router = lab.router(listen, backend)
    samples = lab.metrics(router)
    expected = IO or ("uring" if host_has_io_uring() else "epoll")
    series = [name for name, value in samples.items() if expected in name and value]
    assert series, f"no series names {expected}: {sorted(samples)[:40]}"
    assert expected in router.log(), router.tail()


def host_has_io_uring():
    """Whether this process may make a ring: EFAULT means that only the argument was bad."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(IO_URING_SETUP, 1, None)
    return ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS)


def test_check_names_a_wrong_key(lab):
    path = lab.folder / "wrong.toml"
    path.write_text(f"[server]\nhost = {to_toml('127.0.0.1')}\nprot = {free_port()}\n")
    check = lab.start("check", [corelane_program(), "check", "--config", path])
    assert check.wait(20) == 2, check.tail()
    assert "wrong.toml:3:" in check.log() and "port" in check.log(), check.tail()


def test_check_refuses_what_is_not_served(lab):
    """`relay` is a word of the configuration, and this version says that it does not serve it."""
    path = lab.folder / "relay.toml"
    route = {"listen": "a/b/c", "target": "a/b/d", "response": "relay"}
    lines = [f"{key} = {to_toml(value)}" for key, value in route.items()]
    path.write_text("\n".join(["[[route]]", *lines]) + "\n")
    check = lab.start("check", [corelane_program(), "check", "--config", path])
    status = check.wait(20)
    assert status == (0 if "relay" in RESPONSES else 2), check.tail()
    assert status == 0 or "relay.toml:4:" in check.log(), check.tail()
