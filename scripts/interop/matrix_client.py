#!/usr/bin/env python3
"""The client of the interoperability matrix on the stock Dynamo wheel: all cases against each
endpoint. Says the same as `peer.rs`, in the same words."""

import asyncio
import gc
import json
import sys

import uvloop
from dynamo.runtime import Context, DistributedRuntime

PATIENCE_S = 60


def say(**line):
    """One JSON line, at once."""
    print(json.dumps(line), flush=True)


async def read(stream, case, context):
    """What a stream gave."""
    items, error = [], None
    try:
        async for item in stream:
            items.append(item)
            if case == "stop" and len(items) == 3:
                context.stop_generating()
            if case in ("kill", "drop") and len(items) == 3:
                return {"items": items, "error": None, "complete": False}
    except Exception as failed:
        error = str(failed)
    return {"items": items, "error": error, "complete": error is None}


async def one(client, case, request):
    """One case."""
    context = Context()
    try:
        stream = await client.generate(request, annotated=False, context=context)
    except Exception as failed:
        return {"items": [], "error": str(failed), "complete": False}
    return await read(stream, case, context)


async def main():
    """All cases, one after the other."""
    runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", "tcp")
    cases = json.loads(sys.argv[1])
    for target in sys.argv[2:]:
        client = await runtime.endpoint(f"{target}/generate".replace("/", ".")).client()
        await asyncio.wait_for(client.wait_for_instances(), PATIENCE_S)
        for case, request in cases.items():
            request = {**request, "key": f"stock {target} {case}"}
            try:
                found = await asyncio.wait_for(one(client, case, request), PATIENCE_S)
            except asyncio.TimeoutError:
                found = {"hung": True}
            # What was dropped is gone only now.
            gc.collect()
            say(event="case", target=target, case=case, found=found)
    say(event="done")
    runtime.shutdown()


if __name__ == "__main__":
    uvloop.run(main())
