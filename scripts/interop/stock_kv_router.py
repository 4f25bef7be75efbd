#!/usr/bin/env python3
"""Dynamo's own KV router on the stock wheel, asked again and again what it knows of some tokens.

Prints JSON lines: `ready`, and `overlap` whenever the answer changes: blocks of the tokens that
each worker is known to hold.
"""

import argparse
import asyncio
import json

import uvloop
from dynamo._core import KvRouter, KvRouterConfig
from dynamo.runtime import DistributedRuntime

PAUSE_S = 0.1


def say(event, **fields):
    """One JSON line, at once."""
    print(json.dumps({"event": event, **fields}), flush=True)


async def main():
    """Ask until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", required=True, help="NS/COMP/EP")
    parser.add_argument("--tokens", required=True, help="ids, with commas between")
    parser.add_argument("--block", type=int, default=4, help="tokens of a block")
    options = parser.parse_args()
    tokens = [int(token) for token in options.tokens.split(",")]
    runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", "tcp")
    endpoint = runtime.endpoint(options.endpoint.replace("/", "."))
    router = await asyncio.to_thread(KvRouter, endpoint, options.block, KvRouterConfig())
    say("ready")
    before = None
    while True:
        known = await router.get_overlap_scores(tokens)
        if known != before:
            say("overlap", known=known)
            before = known
        await asyncio.sleep(PAUSE_S)


if __name__ == "__main__":
    uvloop.run(main())
