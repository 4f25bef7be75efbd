"""Processes of a test: started with captured output, watched with deadlines, never left over."""

import ctypes
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
POLL_S = 0.02
# A busy machine keeps a process from its CPU for seconds: what must come true may take this long.
PATIENCE_S = 120.0
# Below those that the kernel gives to connections and to who asks for any port: until one is
# bound nobody gets it by chance.
PORTS = range(15_000, 32_000)
_given = set()


def wait_for(what, condition, timeout_s=PATIENCE_S, poll_s=POLL_S):
    """The first true value of `condition()`; AssertionError naming `what` at the deadline."""
    timeout_s = max(timeout_s, PATIENCE_S)
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(poll_s)


def free_port():
    """A loopback TCP port that is free, and that no one else of this run gets."""
    for port in random.sample(PORTS, len(PORTS)):
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise AssertionError(f"no port of {PORTS} is free")


def raise_descriptor_limit(wanted):
    """Lift the soft limit of open files to `wanted`; the number that is now allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    goal = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= goal:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
    return goal


def _die_with_parent():
    # Without this a killed test run would leave its processes behind.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    """One child process. Its standard output and error go to two files that tests read."""

    def __init__(self, name, command, env, folder):
        self.name = name
        self.command = [str(part) for part in command]
        self.out_path = Path(folder) / f"{name}.out"
        self.err_path = Path(folder) / f"{name}.err"
        with open(self.out_path, "wb") as out, open(self.err_path, "wb") as err:
            self.popen = subprocess.Popen(
                self.command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                preexec_fn=_die_with_parent,
            )

    @property
    def pid(self):
        """The process id."""
        return self.popen.pid

    def out(self):
        """Everything written to standard output so far."""
        return self.out_path.read_text(errors="replace")

    def err(self):
        """Everything written to standard error so far."""
        return self.err_path.read_text(errors="replace")

    def log(self):
        """Standard error without colours, then standard output: where a reason may stand."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.err()) + self.out()

    def events(self, kind=None):
        """The JSON objects printed so far, one a line; of one `event` kind if given."""
        found = []
        for line in self.out().split("\n")[:-1]:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and (kind is None or value.get("event") == kind):
                found.append(value)
        return found

    def wait_event(self, kind, timeout_s=PATIENCE_S, count=1):
        """The `count`-th event of that kind, as soon as it is printed."""

        def look():
            found = self.events(kind)
            if len(found) >= count:
                return found[count - 1]
            if not self.alive():
                raise AssertionError(f"{self} ended before '{kind}':\n{self.tail()}")
            return None

        return wait_for(f"event '{kind}' of {self}", look, timeout_s)

    def alive(self):
        """Whether it still runs."""
        return self.popen.poll() is None

    def signal(self, number):
        """Send one signal."""
        self.popen.send_signal(number)

    def kill(self):
        """SIGKILL, and wait until it is gone."""
        if self.alive():
            self.popen.kill()
        return self.popen.wait(10)

    def terminate(self):
        """SIGTERM; does not wait."""
        if self.alive():
            self.popen.terminate()

    def wait(self, timeout_s):
        """Its exit status (negative: the signal); AssertionError when it still runs."""
        timeout_s = max(timeout_s, PATIENCE_S)
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            what = f"{self} still runs after {timeout_s:g} s:\n{self.tail()}"
            raise AssertionError(what) from None

    def stop(self):
        """End it gently, then by force. Also when it is stopped by SIGSTOP."""
        if self.alive():
            self.popen.send_signal(signal.SIGCONT)
            self.popen.terminate()
            try:
                self.popen.wait(3)
            except subprocess.TimeoutExpired:
                self.kill()

    def rss_kib(self):
        """Resident memory now, in KiB."""
        return self._status_kib("VmRSS")

    def peak_kib(self):
        """The most resident memory so far, in KiB."""
        return self._status_kib("VmHWM")

    def _status_kib(self, field):
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M).group(1))

    def open_files(self):
        """How many descriptors it holds."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def tail(self, characters=4000):
        """The end of both outputs, for a failure's text."""
        err, out = self.err()[-characters:], self.out()[-1000:]
        return f"--- {self.name} stderr\n{err}\n--- stdout\n{out}"

    def __repr__(self):
        state = "running" if self.popen.poll() is None else f"exit {self.popen.returncode}"
        return f"<{self.name} pid {self.pid} {state}>"
