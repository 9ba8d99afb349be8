"""Bring the tiles of vision passes to the device: on CUDA through pinned memory, while the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ovis_model.engine.prefix_sharing import Item
from ovis_model.network.uploads import count_bytes, pack, unpack, upload


class Piece(NamedTuple):
    """Tiles `start` to `stop` of an item."""

    item: Item
    start: int
    stop: int


def split_into_passes(items: Iterable[Item], max_tiles: int) -> Iterator[list[Piece]]:
    """Yield the tiles of all items in passes of `max_tiles`, of which the last may have fewer."""
    pieces: list[Piece] = []
    room = max_tiles
    for item in items:
        start = 0
        while start < len(item.tiles):
            stop = min(len(item.tiles), start + room)
            pieces.append(Piece(item, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield pieces
                pieces, room = [], max_tiles
    if pieces:
        yield pieces


class TileLoader(Protocol):
    """A way for tiles to the device."""

    def send_ahead(self, items: Iterable[Item]) -> None:
        """Begin to copy the tiles of items that will be encoded later, if that saves time."""
        ...

    def load(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """Return the tiles uint8[N, 3, S, S] and tile sizes int32[N, 2] of a pass on the device."""
        ...


class DirectLoader:
    """Tiles are copied when they are needed, as on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send_ahead(self, items: Iterable[Item]) -> None:
        """Do nothing."""

    def load(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """Copy all pieces at once."""
        arrays = (array for piece in pieces for array in _cut(piece))
        return _join([*_pair(upload(self._device, *arrays))])


class CopyStream(Protocol):
    """A queue of copies next to the work of the device; `CudaCopyStream` is the real one."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Return uint8[num_bytes] of the host from which copies need not wait."""
        ...

    def send(self, source: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy a tensor of `allocate`; return the copy on the device and an event that follows it."""
        ...

    def receive(self, tensors: Sequence[Tensor], event: Any) -> None:
        """Let later work on the device wait for the event, and keep the memory of the tensors until it is done."""
        ...

    def mark(self) -> Any:
        """Return an event that follows the work that the device has been given so far."""
        ...


class CudaCopyStream:
    """A CUDA stream for copies to `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def allocate(self, num_bytes: int) -> Tensor:
        """Allocate pinned memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def send(self, source: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Copy on the stream, into memory of that stream."""
        with torch.cuda.stream(self._stream):
            return source.to(self._device, non_blocking=True), self._stream.record_event()

    def receive(self, tensors: Sequence[Tensor], event: torch.cuda.Event) -> None:
        """Let the current stream wait; record that it uses the tensors, which belong to another stream."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(current)

    def mark(self) -> torch.cuda.Event:
        """Record an event on the current stream."""
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event


@dataclass(frozen=True)
class Sent:
    """Tiles and tile sizes on their way to the device, which `event` follows."""

    tiles: Tensor
    sizes: Tensor
    event: Any


class StagedLoader:
    """Tiles go through two pinned buffers in turn, on a stream of copies, while the device computes.

    The host fills a buffer when its last copy is done. It is at most two passes ahead of the device, so that the tiles
    of no more than two passes take memory there, next to those sent ahead.
    """

    def __init__(self, copies: CopyStream, num_bytes: int) -> None:
        """Allocate buffers of `num_bytes`, the tiles of a pass, at first use."""
        self._copies, self._num_bytes = copies, num_bytes
        self._buffers: deque[tuple[Tensor, Any]] = deque()
        self._passes: deque[Any] = deque()  # an event before each of the last passes

    def send_ahead(self, items: Iterable[Item]) -> None:
        """Send the tiles of `items` that are not sent yet; together they fill at most one pass."""
        new = [item for item in items if item.sent is None]
        for item, sent in zip(new, self._send([Piece(item, 0, len(item.tiles)) for item in new]), strict=True):
            item.sent = sent

    def load(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """Return the tiles that were sent ahead with those that are sent now."""
        self._limit_passes()
        new = iter(self._send([piece for piece in pieces if piece.item.sent is None]))
        parts = []
        for item, start, stop in pieces:
            sent = item.sent
            part = next(new) if sent is None else Sent(sent.tiles[start:stop], sent.sizes[start:stop], sent.event)
            self._copies.receive((part.tiles, part.sizes), part.event)
            parts.append((part.tiles, part.sizes))
        return _join(parts)

    def _send(self, pieces: Sequence[Piece]) -> list[Sent]:
        if not pieces:
            return []
        arrays = [array for piece in pieces for array in _cut(piece)]
        buffer = self._take_buffer(count_bytes(arrays))
        pack(arrays, buffer)
        packed, event = self._copies.send(buffer[: count_bytes(arrays)])
        self._buffers.append((buffer, event))
        return [Sent(tiles, sizes, event) for tiles, sizes in _pair(list(unpack(packed, arrays)))]

    def _take_buffer(self, num_bytes: int) -> Tensor:
        """Return the buffer that has been copied longest ago, once that copy is done."""
        if len(self._buffers) < 2:
            return self._copies.allocate(max(self._num_bytes, num_bytes))
        buffer, event = self._buffers.popleft()
        event.synchronize()
        return buffer if len(buffer) >= num_bytes else self._copies.allocate(num_bytes)

    def _limit_passes(self) -> None:
        """Wait until all passes but the last two have begun."""
        self._passes.append(self._copies.mark())
        if len(self._passes) > 2:
            self._passes.popleft().synchronize()


def make_tile_loader(device: torch.device, num_bytes: int) -> TileLoader:
    """Return the loader for a device; `num_bytes` is the size of the tiles of a pass."""
    return StagedLoader(CudaCopyStream(device), num_bytes) if device.type == "cuda" else DirectLoader(device)


def _cut(piece: Piece) -> tuple[Any, Any]:
    item, start, stop = piece
    return item.tiles[start:stop], item.tile_sizes[start:stop]


def _pair(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tensors[::2], tensors[1::2], strict=True)


def _join(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate tiles and tile sizes of several pieces."""
    if len(parts) == 1:
        return parts[0]
    tiles, sizes = zip(*parts, strict=True)
    return torch.cat(tiles), torch.cat(sizes)
