#!/usr/bin/env python3
"""A publisher or subscriber of forward-pass metrics on the stock Dynamo wheel.

Prints JSON lines: `ready`, and for a subscriber `event` with the size of each payload.
"""

import argparse
import asyncio
import json
import threading
import time

import uvloop
from dynamo._core import FpmDirectPublisher, FpmEventSubscriber
from dynamo.runtime import DistributedRuntime

PAUSE_S = 0.1


def say(event, **fields):
    """One JSON line, at once."""
    print(json.dumps({"event": event, **fields}), flush=True)


def publish(endpoint):
    """The same figures again and again, until the process is ended."""
    publisher = FpmDirectPublisher(endpoint, worker_id="7")
    say("ready")
    while True:
        publisher.publish(
            dp_rank=0,
            scheduled_num_prefill_requests=1,
            scheduled_sum_prefill_tokens=2,
            scheduled_sum_prefill_kv_tokens=3,
            scheduled_num_decode_requests=4,
            scheduled_sum_decode_kv_tokens=5,
            queued_num_prefill_requests=6,
            queued_sum_prefill_tokens=7,
            queued_num_decode_requests=8,
            queued_sum_decode_kv_tokens=9,
            wall_time_secs=0.5,
        )
        time.sleep(PAUSE_S)


def subscribe(endpoint):
    """Every payload that comes."""
    subscriber = FpmEventSubscriber(endpoint)
    say("ready")
    while (payload := subscriber.recv()) is not None:
        say("event", bytes=len(payload))


async def main():
    """Run one of the two on a thread of its own: both block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", required=True, choices=["publisher", "subscriber"])
    parser.add_argument("--endpoint", required=True, help="NS/COMP/EP")
    options = parser.parse_args()
    runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", "tcp")
    endpoint = runtime.endpoint(options.endpoint.replace("/", "."))
    work = publish if options.role == "publisher" else subscribe
    threading.Thread(target=work, args=(endpoint,), daemon=True).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
