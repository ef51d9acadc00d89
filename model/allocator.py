"""How this process keeps memory for tensors on the CPU."""

import ctypes
import sys

# <malloc.h> of glibc
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
# Larger tensors are still mapped: kept ones of such sizes would leave holes of such sizes.
_SETTINGS = ((_MMAP_THRESHOLD, 128 << 20), (_TRIM_THRESHOLD, 512 << 20), (_TOP_PAD, 64 << 20))


def keep_freed_memory() -> bool:
    """Let glibc keep up to 512 MiB of freed memory for this process; whether it does so now.

    By default every large tensor is mapped anew, and the kernel zeroes its pages at first touch:
    about a tenth of the time of inference and training on a CPU (docs/log.md). A setting of the
    whole process, so programs choose it, not libraries.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and min(mallopt(*setting) for setting in _SETTINGS) == 1
