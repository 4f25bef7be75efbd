#!/usr/bin/env python3
"""A worker that speaks the request plane by hand and misbehaves as --mode says.

answer: one echo item.  refuse: reply --text.  never-ack: read and say nothing, until SIGUSR1.
never-read: accept and not even read.  close: hang up at each request.  silent: accept the request,
never call home.
Prints JSON lines: `ready` with its port, then `request` for each request that it read.
"""

import argparse
import asyncio
import json
import os
import signal
import struct

from wire import FINAL, compact, read_frame, two_part


def say(event, **fields):
    """One JSON line, at once."""
    print(json.dumps({"event": event, **fields}), flush=True)


def split_payload(payload):
    """(control message, body) of an envelope."""
    header_bytes, body_bytes, _ = struct.unpack(">QQQ", payload[:24])
    header = payload[24 : 24 + header_bytes]
    return json.loads(header), payload[24 + header_bytes : 24 + header_bytes + body_bytes]


async def call_home(control, body):
    """Bring one item, the request itself, to the caller."""
    info = json.loads(control["connection_info"]["info"])
    host, _, port = info["address"].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    handshake = {"subject": info["subject"], "stream_type": "response"}
    item = {"data": {"data": json.loads(body)}, "complete_final": False}
    for message in (
        two_part(compact(handshake)),
        two_part(b'{"error":null}'),
        two_part(body=compact(item)),
        two_part(body=compact(FINAL)),
        two_part(b'"sentinel"'),
    ):
        writer.write(message)
    await writer.drain()
    await reader.read()
    writer.close()


class Fake:
    """One listener in one mode."""

    def __init__(self, options):
        self.options = options
        self.requests = 0
        self.answers = set()
        self.held = []

    async def connection(self, reader, writer):
        """Serve one connection until it ends."""
        try:
            while self.options.mode != "never-read":
                path, _, payload = await read_frame(reader)
                self.requests += 1
                say("request", path=path.decode(errors="replace"), bytes=len(payload))
                if self.options.mode == "close":
                    return
                await self.answer(payload, writer)
            await asyncio.Event().wait()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, payload, writer):
        """Reply to one request as the mode says."""
        mode = self.options.mode
        if mode == "never-ack":
            self.held.append(writer)
            return
        text = self.options.text.encode() if mode == "refuse" else b""
        writer.write(struct.pack(">I", len(text)) + text)
        await writer.drain()
        if mode == "answer":
            try:
                control, body = split_payload(payload)
            except (struct.error, ValueError):
                return  # accepted and never answered, as Dynamo does
            task = asyncio.ensure_future(call_home(control, body))
            self.answers.add(task)
            task.add_done_callback(self.answers.discard)


    def release(self):
        """Take what was held back, and from now on everything at once."""
        self.options.mode = "silent"
        for writer in self.held:
            writer.write(struct.pack(">I", 0))
        self.held.clear()


async def main():
    """Listen until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    modes = ["answer", "refuse", "never-ack", "never-read", "close", "silent"]
    parser.add_argument("--mode", choices=modes, required=True)
    parser.add_argument("--text", default="Server unavailable: by a test")
    fake = Fake(parser.parse_args())
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, fake.release)
    server = await asyncio.start_server(fake.connection, "127.0.0.1", 0, limit=64 << 20)
    say("ready", port=server.sockets[0].getsockname()[1], pid=os.getpid())
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
