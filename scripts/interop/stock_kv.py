#!/usr/bin/env python3
"""A worker that tells of its KV cache, or a KV router, on the stock Dynamo wheel.

The worker answers each request with its own name, and publishes that it has stored the blocks of
--tokens: again and again, or --once; with --keeps it can be asked for what it has published. The
router chooses for --tokens again and again. JSON lines: `ready`, `best`, `none`.
"""

import argparse
import asyncio
import json
import signal

import uvloop
from dynamo.llm import KvEventPublisher, KvRouter, KvRouterConfig
from dynamo.runtime import DistributedRuntime

from stock_worker import announced, say


async def work(runtime, endpoint, options):
    """Serve until SIGTERM, with a cache that holds the blocks."""
    name = f"{endpoint.connection_id():x}"

    async def generate(request, context):
        yield {"worker": name}

    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate))
    await announced(endpoint, serving)
    blocks = len(options.tokens) // options.block_tokens
    publisher = KvEventPublisher(
        endpoint, kv_block_size=options.block_tokens, enable_local_indexer=options.keeps
    )
    stored = (
        options.tokens[: blocks * options.block_tokens],
        [options.block_tokens] * blocks,
        [endpoint.connection_id() % 1000 + 1 + number for number in range(blocks)],
    )
    if options.once:
        publisher.publish_stored(*stored)
    say("ready", instance=endpoint.connection_id())
    # Who subscribes late has missed what was published before: it is told again, until the end.
    while blocks and not options.once and not serving.done():
        publisher.publish_stored(*stored)
        await asyncio.sleep(0.2)
    await serving


async def route(runtime, endpoint, options):
    """Say which worker is best, until the end."""
    router = KvRouter(endpoint, options.block_tokens, KvRouterConfig())
    say("ready")
    while True:
        await asyncio.sleep(0.1)
        try:
            worker, _, overlap = await router.best_worker(options.tokens)
        except Exception as error:  # It has not seen the workers yet.
            say("none", why=str(error))
            continue
        say("best", worker=worker, overlap=overlap)


async def main():
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", required=True, choices=["worker", "router"])
    parser.add_argument("--endpoint", required=True, help="NS/COMP/EP")
    parser.add_argument("--tokens", type=json.loads, default=[], help="a JSON list")
    parser.add_argument("--block-tokens", type=int, default=4)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--keeps", action="store_true")
    options = parser.parse_args()
    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, "etcd", "tcp")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runtime.shutdown)
    endpoint = runtime.endpoint(options.endpoint.replace("/", "."))
    await (work if options.role == "worker" else route)(runtime, endpoint, options)


if __name__ == "__main__":
    uvloop.run(main())
