#!/usr/bin/env python3
"""The worker of the interoperability matrix on the stock Dynamo wheel: `generate`, and `chat`,
which is bidirectional. Says the same as `peer.rs`, in the same words."""

import asyncio
import json
import signal
import sys

import uvloop
from dynamo.runtime import DistributedRuntime

FAILURE = "the engine failed as it was asked to"


def say(**line):
    """One JSON line, at once."""
    print(json.dumps(line), flush=True)


def generate(request, context):
    """Answer as the request asks for."""
    if request.get("refuse"):
        raise ValueError(FAILURE)
    return answer(request, context)


async def answer(request, context):
    """The items, and how it ended."""
    ended = "cancelled"
    try:
        for index in range(request.get("items", 1)):
            if request.get("fail_after") == index:
                ended = "finished"
                raise ValueError(FAILURE)
            await asyncio.sleep(request.get("delay_s", 0))
            if context.is_stopped() or context.is_killed():
                return
            yield {"i": index, "echo": request.get("text")}
        ended = "finished"
    finally:
        say(event=ended, key=request["key"])


async def chat(requests, context):
    """Answer each value with the sum so far."""
    total = 0
    async for value in requests:
        total += value
        yield total
    yield "over"


async def main():
    """Serve both until SIGTERM."""
    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, "etcd", "tcp")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runtime.shutdown)
    name = sys.argv[1].replace("/", ".")
    one, many = (runtime.endpoint(f"{name}.{endpoint}") for endpoint in ("generate", "chat"))
    serving = asyncio.gather(
        one.serve_endpoint(generate), many.serve_bidirectional_endpoint(chat)
    )
    for endpoint in (one, many):
        client = await endpoint.client()
        await client.wait_for_instances()
    say(event="ready", instance=one.connection_id())
    await serving


if __name__ == "__main__":
    uvloop.run(main())
