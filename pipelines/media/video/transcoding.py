"""Read a video that PyAV cannot read with the ffmpeg binary of the extra `video`, which knows further codecs.

The binary decodes the video into raw frames in a pipe, which PyAV then reads like any other video, in order.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import MediaError
from pipelines.media.video.container import FORMATS, NotReadable

_MAX_COPY_BYTES = 8 << 30  # of a video that is no local file of its own, on the local disk
_MAX_CPU_S = 600  # if its reader dies and nobody ends it
_INSTALL = "pip install 'ovis2-ray[video]' for an ffmpeg that reads more formats"
_FOUND = re.compile(rb"Input #0, (\S+), from .*?: Video: (\w+)", re.DOTALL)


@contextmanager
def transcode(file: BinaryIO, path: str | None, reason: NotReadable) -> Iterator[RawFrames]:
    """Open a video for the other ffmpeg; `path` is the local file that holds it and nothing else, if there is one.

    Raise `reason`, why PyAV cannot read it, with the extra to install if there is no such ffmpeg.
    """
    binary = _find_binary(reason)
    with ExitStack() as stack:
        num_bytes = file.seek(0, io.SEEK_END)
        if path is None:
            path = stack.enter_context(_copy(file, num_bytes))
        yield stack.enter_context(RawFrames(binary, path, num_bytes))


def _find_binary(reason: NotReadable) -> str:
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise NotReadable(f"{reason}; {_INSTALL}") from error


@contextmanager
def _copy(file: BinaryIO, num_bytes: int) -> Iterator[str]:
    """Yield the path of a temporary copy: most formats cannot be read from a pipe."""
    if num_bytes > _MAX_COPY_BYTES:
        raise MediaError(f"too large to copy for another ffmpeg: {num_bytes:,} of at most {_MAX_COPY_BYTES:,} bytes")
    with tempfile.NamedTemporaryFile(suffix=".video") as copy:
        file.seek(0)
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        yield copy.name


class RawFrames(io.BufferedIOBase):
    """The frames of a video file as NUT, to be read in order; `seek(0)` decodes from the start again."""

    def __init__(self, binary: str, path: str, num_bytes: int) -> None:
        super().__init__()
        self._binary, self._path, self._num_bytes = binary, path, num_bytes
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process: subprocess.Popen[bytes] | None = None

    def seekable(self) -> bool:
        """Return False: there is no index to seek by."""
        return False

    def readable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to the start, or return the size of the encoded file for its end."""
        if whence == io.SEEK_END:
            return self._num_bytes
        self._end()
        return 0

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes of the frames."""
        if self._process is None:
            self._process = self._start()
        assert self._process.stdout is not None
        return self._process.stdout.read(-1 if size is None else size)

    def close(self) -> None:
        """End the process."""
        if not self.closed:
            self._end()
            self._log.close()
        super().close()

    def describe(self) -> dict[str, str]:
        """Return the format and the codec of the file, as far as the binary has named them."""
        self._log.seek(0)
        found = _FOUND.search(self._log.read(1 << 16))
        if found is None:
            return {}
        names = found[1].decode().split(",")
        return {"format": "mp4" if "mp4" in names else names[0], "codec": found[2].decode()}

    def _start(self) -> subprocess.Popen[bytes]:
        # No other files, no network: playlists are refused, as everywhere. Colours and orientation are ffmpeg's.
        limits = ["-timelimit", str(_MAX_CPU_S), "-protocol_whitelist", "file", "-format_whitelist", FORMATS]
        given = [*limits, "-threads", "1", "-i", f"file:{Path(self._path)}"]
        raw = ["-an", "-sn", "-dn", "-fps_mode", "passthrough", "-c:v", "rawvideo", "-pix_fmt", "rgb24"]
        return subprocess.Popen(
            [self._binary, "-hide_banner", "-nostdin", *given, *raw, "-f", "nut", "pipe:1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
        self._process = None
