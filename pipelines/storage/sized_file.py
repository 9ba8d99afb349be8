"""The position in a file of a known size, for files that are read in another way than from a descriptor."""

from __future__ import annotations

import io


class SizedFile(io.RawIOBase):
    """A file of `num_bytes` that can be read and sought; a subclass reads from `_at` on."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes, self._at = num_bytes, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset` from the place that `whence` names, at least 0, and return the position."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        self._at = max(0, start + offset)
        return self._at
