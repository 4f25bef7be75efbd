#!/usr/bin/env python3
"""A client on the stock Dynamo wheel that checks every stream and sums up.

It sends --count requests (or sends --until-told) with --concurrency callers. Each request is
unlike every other, so a mixed-up answer is noticed. Nothing may take longer than --deadline-s:
what does is counted as hung. Prints JSON lines: `ready` when the endpoint was found, `progress`
five times a second, and at the end one `summary`.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import time
from collections import Counter

import uvloop
from dynamo.runtime import Context, DistributedRuntime

VOLATILE = re.compile(
    r"[0-9a-f]{8}-[0-9a-f-]{27}|\b\d{1,3}(?:\.\d{1,3}){3}:\d+|\b[0-9a-f]{12,20}\b|\b\d{9,}\b"
)


def say(event, **fields):
    """One JSON line, at once."""
    print(json.dumps({"event": event, **fields}), flush=True)


def parse_options():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", required=True, help="NS/COMP/EP")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--until-told", action="store_true", help="send until SIGUSR1")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--items", type=int, default=1, help="items expected in each answer")
    parser.add_argument("--ask", action="store_true", help="name the items in each request too")
    parser.add_argument("--delay-s", type=float, help="ask the worker for this pause per item")
    parser.add_argument("--body-bytes", type=int, default=32, help="filler in each request")
    parser.add_argument("--no-echo", action="store_true", help="ask for items without the request")
    parser.add_argument("--pause-s", type=float, default=0.0, help="rest between a caller's calls")
    parser.add_argument("--deadline-s", type=float, default=120.0)
    parser.add_argument("--stop-after", type=int, help="stop a stream after this many items")
    parser.add_argument("--kill-after", type=int, help="drop a stream after this many items")
    parser.add_argument("--fail-after", type=int, help="ask the worker to fail after so many")
    parser.add_argument(
        "--plain-echo", action="store_true", help="each item is the request itself, unnumbered"
    )
    parser.add_argument("--find-s", type=float, default=120.0, help="wait this long for instances")
    return parser.parse_args()


class Wrong(Exception):
    """An answer that is not the one to this request."""


class Client:
    """The callers and what they found."""

    def __init__(self, options, client):
        self.options = options
        self.client = client
        self.sent = self.ok = self.cancelled = self.hung = self.items = 0
        self.errors, self.workers = Counter(), Counter()
        self.wrong, self.latencies_s = [], []
        self.last_error_s = self.first_ok_after_error_s = None
        self.told = False
        self.started_s = time.monotonic()

    def body(self, number):
        """Request `number`: different from all others."""
        options = self.options
        text = f"é{number:x}".ljust(options.body_bytes, "·x"[number % 2])
        request = {"key": number, "text": text}
        if options.ask:
            request["items"] = options.items
        if options.delay_s is not None:
            request["delay_s"] = options.delay_s
        if options.no_echo:
            request["no_echo"] = True
        if options.fail_after is not None:
            request["fail_after"] = options.fail_after
        return request

    async def one(self, number):
        """One request and the whole of its answer; whether it was cancelled by us."""
        options, request, context = self.options, self.body(number), Context()
        stream = await self.client.generate(request, annotated=False, context=context)
        seen, worker = 0, None
        async for item in stream:
            worker = self.check(request, item, seen, worker)
            seen += 1
            self.items += 1
            if seen == options.stop_after:
                context.stop_generating()
            if seen == options.kill_after:
                return True
        if options.stop_after is not None:
            if seen >= options.items:
                raise Wrong(f"request {number} was stopped and yet gave all its {seen} items")
            return True
        if seen != options.items:
            raise Wrong(f"request {number} gave {seen} items instead of {options.items}")
        self.workers[worker] += 1
        return False

    def check(self, request, item, seen, worker):
        """Raise unless `item` is what comes next; the name of the worker that sent it."""
        if self.options.plain_echo:
            if item != request:
                raise Wrong(f"request {request['key']}: item {seen} is {str(item)[:200]}")
            return "echo"
        expected = None if self.options.no_echo else request
        if not isinstance(item, dict) or item.get("i") != seen or item.get("echo") != expected:
            raise Wrong(f"request {request['key']}: item {seen} is {str(item)[:200]}")
        if worker not in (None, item["worker"]):
            raise Wrong(f"request {request['key']}: items of two workers")
        return item["worker"]

    async def call(self, number):
        """One request within its deadline, and the books."""
        begin = time.monotonic()
        self.sent += 1
        try:
            if await asyncio.wait_for(self.one(number), self.options.deadline_s):
                self.cancelled += 1
            else:
                self.ok += 1
            self.latencies_s.append(time.monotonic() - begin)
            if self.last_error_s is not None and self.first_ok_after_error_s is None:
                self.first_ok_after_error_s = time.monotonic() - self.started_s
        except asyncio.TimeoutError:
            self.hung += 1
        except Wrong as error:
            self.wrong.append(str(error))
        except Exception as error:  # whatever a peer did is a failed request
            text = VOLATILE.sub("*", str(error))[:300]
            self.errors[f"{type(error).__name__}: {text}"] += 1
            self.last_error_s = time.monotonic() - self.started_s
            await asyncio.sleep(0.005)

    async def caller(self, numbers):
        """One call after another."""
        for number in numbers:
            await self.call(number)
            if self.options.pause_s:
                await asyncio.sleep(self.options.pause_s)

    def numbers(self):
        """The numbers of all requests, shared by the callers."""
        options, number = self.options, 0
        while True:
            if self.told if options.until_told else number >= options.count:
                return
            yield number
            number += 1

    def counts(self):
        """The totals so far."""
        return {
            "sent": self.sent, "ok": self.ok, "cancelled": self.cancelled, "hung": self.hung,
            "failed": sum(self.errors.values()), "wrong": len(self.wrong), "items": self.items,
        }  # fmt: skip

    def summary(self):
        """Everything, once."""
        taken = sorted(self.latencies_s)
        last = len(taken) - 1
        at = {q: round(taken[q * last // 100] * 1e3, 2) for q in (50, 99, 100) if taken}
        return {
            **self.counts(),
            "errors": dict(self.errors),
            "wrong_examples": self.wrong[:5],
            "by_worker": dict(self.workers),
            "latency_ms": {f"p{q}": value for q, value in at.items()},
            "last_error_s": self.last_error_s,
            "elapsed_s": round(time.monotonic() - self.started_s, 3),
        }

    async def report(self):
        """Progress, five times a second."""
        while True:
            await asyncio.sleep(0.2)
            say("progress", **self.counts(), by_worker=dict(self.workers))

    def tell(self):
        """That was enough."""
        self.told = True


async def main():
    """Find the endpoint, send, sum up."""
    options = parse_options()
    plane = os.environ.get("DYN_REQUEST_PLANE", "tcp")
    runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", plane)
    endpoint = runtime.endpoint(options.endpoint.replace("/", "."))
    stock = await endpoint.client()
    await asyncio.wait_for(stock.wait_for_instances(), options.find_s)
    client = Client(options, stock)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, client.tell)
    say("ready", instances=list(stock.instance_ids()))
    reporter = asyncio.ensure_future(client.report())
    numbers = client.numbers()
    await asyncio.gather(*(client.caller(numbers) for _ in range(options.concurrency)))
    reporter.cancel()
    say("summary", **client.summary())
    runtime.shutdown()


if __name__ == "__main__":
    uvloop.run(main())
