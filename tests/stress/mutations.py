"""Damage bytes as disks, networks and attackers do; the same seed gives the same bytes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence


def mutate(data: bytes, seed: int, others: Sequence[bytes] = ()) -> bytes:
    """Return `data` after one to three random mutations; `others` are files to copy pieces from."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_MUTATIONS)(data, rng, others) if data else data
    return data


def _flip_bits(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 4, 32))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    return data[
        : rng.choice((rng.randrange(len(data)), max(0, len(data) - rng.randrange(1, 64)), rng.randrange(1, 40)))
    ]


def _splice(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others) if others else data
    at, begin = rng.randrange(len(data)), rng.randrange(len(other)) if other else 0
    piece = other[begin : begin + rng.choice((8, 100, 4000))]
    return data[:at] + piece + data[at + rng.choice((0, len(piece))) :]


def _edit_header(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3))):
        changed[rng.randrange(min(len(changed), 600))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def _edit_length(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Overwrite a number of two, four or eight bytes, the sizes of lengths and offsets."""
    form = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(form)
    if len(data) < size:
        return data
    at = rng.choice((rng.randrange(len(data) - size + 1), rng.randrange(min(len(data) - size + 1, 200))))
    largest = (1 << 8 * size) - 1
    value = rng.choice((0, 1, largest, largest >> 1, (largest >> 1) + 1, largest >> 4, rng.randrange(largest)))
    return data[:at] + struct.pack(form, value) + data[at + size :]


def _duplicate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    begin = rng.randrange(len(data))
    block = data[begin : begin + rng.choice((1, 64, 512, 5000))]
    return data[:begin] + block * rng.choice((2, 3, 20)) + data[begin:]


def _remove(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    begin = rng.randrange(len(data))
    return data[:begin] + data[begin + rng.choice((1, 2, 64, 512)) :]


def _blank(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    begin = rng.randrange(len(data))
    length = min(rng.choice((4, 100, 4096)), len(data) - begin)
    return data[:begin] + bytes([rng.choice((0, 0xFF))]) * length + data[begin + length :]


_MUTATIONS: tuple[Callable[[bytes, random.Random, Sequence[bytes]], bytes], ...] = (
    _flip_bits,
    _truncate,
    _splice,
    _edit_header,
    _edit_length,
    _duplicate,
    _remove,
    _blank,
)
