#!/usr/bin/env python3
"""Writes curve.json: handshakes of a real libzmq with CURVE, and its first frames behind them.

The other end is `codec/tests/golden/curve.rs`, which needs keys and cannot be done by hand here.
Run it again with another libzmq: `python capture_curve.py`, pyzmq and cargo installed.
"""

import os
import socket
import struct
import subprocess
import threading
from pathlib import Path

import zmq
from zmq.utils import z85

CLIENT, SERVER = (z85.encode(bytes([which]) * 32) for which in (1, 2))
CODEC = Path(__file__).resolve().parents[2]


def free_address():
    """An address on loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def publish(pub):
    """Once somebody wants them: a short event and a long one."""
    assert pub.recv() == b"\x01kv"
    for size in (40, 300):
        body = struct.pack(">BI", 1, size) + bytes(range(256)) * 2
        pub.send_multipart(
            [b"kv-events", struct.pack(">Q", 7), struct.pack(">Q", size), body[: 5 + size]]
        )


def main():
    """Both sockets, and the test that talks with them."""
    context = zmq.Context()
    pub = context.socket(zmq.XPUB)
    pub.curve_server, pub.curve_secretkey = True, SERVER
    port = pub.bind_to_random_port("tcp://127.0.0.1")
    sub = context.socket(zmq.SUB)
    sub.curve_secretkey, sub.curve_publickey = CLIENT, zmq.curve_public(CLIENT)
    sub.curve_serverkey = zmq.curve_public(SERVER)
    sub.subscribe(b"kv")
    address = free_address()
    sub.connect(f"tcp://{address}")
    threading.Thread(target=publish, args=(pub,), daemon=True).start()
    env = {
        **os.environ,
        "CAPTURE_PUBLISHER": f"127.0.0.1:{port}",
        "CAPTURE_SUBSCRIBER": address,
        "CAPTURE_LIBZMQ": zmq.zmq_version(),
    }
    test = ["--test", "golden", "--", "--ignored", "--exact", "curve::capture"]
    subprocess.run(["cargo", "test", "--features", "curve", *test], cwd=CODEC, env=env, check=True)


if __name__ == "__main__":
    main()
