#!/usr/bin/env python3
"""A worker on the stock Dynamo wheel: numbered echo items, and a record of what happened.

Prints JSON lines: `ready` once it is in discovery, with --record also `started`, `cancelled`
and `finished` for each request, and `bye` with its totals when it ends after SIGTERM. A request
may carry `items` and `delay_s` to ask for another stream than the one the options describe, and
`fail_after` to ask for an exception.
"""

import argparse
import asyncio
import json
import os
import signal

import uvloop
from dynamo.runtime import DistributedRuntime


def say(event, **fields):
    """One JSON line, at once."""
    print(json.dumps({"event": event, **fields}), flush=True)


class Worker:
    """The handler and its totals."""

    def __init__(self, options):
        self.options = options
        self.name = None
        self.totals = {"started": 0, "cancelled": 0, "finished": 0}

    def note(self, event, request, **more):
        """Count an event, and print it if asked to."""
        self.totals[event] += 1
        if self.options.record:
            key = request.get("key") if isinstance(request, dict) else None
            say(event, key=key, **more)

    async def generate(self, request, context):
        """Answer one request with its stream of items."""
        asked = request if isinstance(request, dict) else {}
        items = asked.get("items", self.options.items)
        delay_s = asked.get("delay_s", self.options.delay_us / 1e6)
        echo = None if asked.get("no_echo") else request
        sent, done = 0, False
        self.note("started", request)
        try:
            for index in range(items):
                if index == asked.get("fail_after"):
                    raise ValueError("the engine failed as it was asked to")
                if delay_s:
                    await asyncio.sleep(delay_s)
                if context.is_stopped() or context.is_killed():
                    return
                yield {"worker": self.name, "i": index, "of": items, "echo": echo}
                sent += 1
            done = True
        finally:
            self.note("finished" if done else "cancelled", request, sent=sent)


async def announced(endpoint, serving):
    """Wait until discovery lists this worker, as serve_endpoint does not tell."""
    client = await endpoint.client()
    while endpoint.connection_id() not in client.instance_ids():
        if serving.done():
            serving.result()
            raise RuntimeError("the endpoint stopped before it was announced")
        await asyncio.sleep(0.02)


async def main():
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", required=True, help="NS/COMP/EP")
    parser.add_argument("--items", type=int, default=1, help="items in each answer")
    parser.add_argument("--delay-us", type=int, default=0, help="pause before each item")
    parser.add_argument("--record", action="store_true", help="print each request's events")
    worker = Worker(parser.parse_args())

    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, "etcd", os.environ.get("DYN_REQUEST_PLANE", "tcp"))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runtime.shutdown)
    endpoint = runtime.endpoint(worker.options.endpoint.replace("/", "."))
    worker.name = f"{endpoint.connection_id():x}"
    serving = asyncio.ensure_future(endpoint.serve_endpoint(worker.generate))
    await announced(endpoint, serving)
    say("ready", pid=os.getpid(), instance=endpoint.connection_id())
    try:
        await serving
    finally:
        say("bye", **worker.totals)


if __name__ == "__main__":
    uvloop.run(main())
