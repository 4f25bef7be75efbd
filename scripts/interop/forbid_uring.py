#!/usr/bin/env python3
"""Runs a command in which io_uring is refused, as container runtimes refuse it.

    forbid_uring.py COMMAND [ARGUMENT...]

A seccomp filter makes io_uring_setup, io_uring_enter and io_uring_register fail with EPERM for
this process and its children only; nothing on the machine changes, and root is not needed.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
RETURN_ALLOW = 0x7FFF0000
RETURN_ERRNO = 0x00050000
RETURN_KILL = 0x80000000

LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K
NUMBER_OFFSET, ARCH_OFFSET = 0, 4  # in struct seccomp_data

ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# The three numbers are the same on every architecture.
IO_URING_CALLS = (425, 426, 427)


class Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def instructions():
    """The filter: a foreign architecture dies, the three calls fail, everything else passes."""
    step = struct.Struct("=HBBI").pack
    calls = len(IO_URING_CALLS)
    code = [
        step(LOAD_WORD, 0, 0, ARCH_OFFSET),
        step(JUMP_EQUAL, 1, 0, ARCHES[platform.machine()]),
        step(RETURN, 0, 0, RETURN_KILL),
        step(LOAD_WORD, 0, 0, NUMBER_OFFSET),
    ]
    for index, number in enumerate(IO_URING_CALLS):
        code.append(step(JUMP_EQUAL, calls - index, 0, number))
    code.append(step(RETURN, 0, 0, RETURN_ALLOW))
    code.append(step(RETURN, 0, 0, RETURN_ERRNO | errno.EPERM))
    return code


def forbid():
    """Install the filter in this process; it stays over exec."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = instructions()
    data = ctypes.create_string_buffer(b"".join(code))
    program = Program(len(code), ctypes.addressof(data))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


def main():
    """Forbid, then become the command."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    forbid()
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
