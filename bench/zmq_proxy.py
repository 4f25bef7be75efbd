"""libzmq's own broker: an XSUB/XPUB proxy, as Dynamo runs one. Arguments: two tcp:// addresses.

All work is done in C, by one I/O thread and the thread of the proxy; Python only starts it.
"""

import sys

import zmq

HIGH_WATER_MARK = 100_000  # what Dynamo sets


def main():
    """Bind both sides and never return."""
    context = zmq.Context(io_threads=1)
    sides = []
    for kind, address in ((zmq.XSUB, sys.argv[1]), (zmq.XPUB, sys.argv[2])):
        side = context.socket(kind)
        side.sndhwm = side.rcvhwm = HIGH_WATER_MARK
        side.bind(address)
        sides.append(side)
    zmq.proxy(*sides)


main()
