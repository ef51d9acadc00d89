"""Freed memory stays with a process that wants it so."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from model.allocator import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("refused")
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
before = 0
for _ in range(9):
    block = ctypes.c_void_p(libc.malloc(40 << 20))
    ctypes.memset(block, 1, 40 << 20)
    libc.free(block)
    before = before or resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_used_again_without_the_kernel() -> None:
    assert faults("default") > 8 * 10_000  # pages of 4 KiB
    assert faults("keep") < 1_000
