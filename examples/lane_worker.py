#!/usr/bin/env python3
"""A worker behind a shared-memory lane: numbered echo items, in plain Python.

    corelane serve --config examples/lane.toml
    examples/lane_worker.py /tmp/corelane-lane.sock

Each request, a JSON object, is answered with as many items as its `items` says, or --items. Where a
model would run, the body would be copied to the device from where it lies: `request.body`.
"""

import argparse
import json
import sys
import time

from lane_client import LaneError, Lanes, Over, RouterGone


def answer(lanes, request, items, delay_s):
    """One request, to its end."""
    name = f"{lanes.id:x}"
    asked = request.json()
    if not isinstance(asked, dict):
        return request.fail("the request is no object", invalid_argument=True)
    items, delay_s = asked.get("items", items), asked.get("delay_s", delay_s)
    echo = None if asked.get("no_echo") else asked
    for index in range(items):
        time.sleep(delay_s)
        lanes.take()
        request.item({"worker": name, "i": index, "of": items, "echo": echo})
    request.finish()


def main():
    """Serve until the router ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket", help="the `lane` of the route")
    parser.add_argument("--items", type=int, default=1, help="items in each answer")
    parser.add_argument("--delay-us", type=int, default=0, help="pause before each item")
    options = parser.parse_args()
    lanes = Lanes(options.socket)
    print(json.dumps({"event": "ready", "id": lanes.id}), flush=True)
    served = 0
    try:
        for request in lanes.requests():
            try:
                answer(lanes, request, options.items, options.delay_us / 1e6)
                served += 1
            except Over:
                request.finish()
            except (ValueError, TypeError, RecursionError) as error:
                request.fail(f"the request cannot be read: {error}", invalid_argument=True)
    except RouterGone:
        print(json.dumps({"event": "bye", "served": served}), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (LaneError, OSError) as error:
        sys.exit(f"lane_worker: {error}")
