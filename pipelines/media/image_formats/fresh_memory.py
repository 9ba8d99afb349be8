"""Choose what newly allocated memory holds, to notice decoders that leave a part of it as it was."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_PERTURB = -6  # of glibc's mallopt
_CACHED_SIZES = range(24, 1040, 16)  # bytes; glibc reuses such blocks as they were, up to 7 of each
_CACHED_BLOCKS = 7


@contextmanager
def fill_new_memory(value: int) -> Iterator[None]:
    """Fill memory that C code allocates in this process with bytes of `value`, from 1 to 254.

    Only glibc offers this; with another C library, memory holds whatever it held before.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_PERTURB, value ^ 0xFF)  # glibc fills with the inverse
    _fill_cached_blocks(libc, value)
    try:
        yield
    finally:
        libc.mallopt(_M_PERTURB, 0)


def _fill_cached_blocks(libc: ctypes.CDLL, value: int) -> None:
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    blocks = [(libc.malloc(size), size) for size in _CACHED_SIZES for _ in range(_CACHED_BLOCKS)]
    for address, size in blocks:
        ctypes.memset(address, value, size)
        libc.free(address)
