"""Decode videos in a child process with limits on time and memory, so that a crash fails only one row.

`python -m pipelines.media.video.process FD` runs the child; it answers over the socket FD until its parent exits.
"""

from __future__ import annotations

import io
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, BinaryIO, cast

import numpy as np

from ovis_model.child_process import ChildProcess, Json, MessageStream, StreamEnded, end_with_parent
from pipelines.errors import CredentialsRefused, MediaError, StoreFault
from pipelines.media.reference import VideoLocation, Window
from pipelines.media.subtitles import Cue
from pipelines.media.video.container import NotReadable
from pipelines.media.video.frames import Frame, Pixels, TiledFrame, TiledVideo, Tiling, VideoInfo
from pipelines.media.video.sampling import Sampling, decode_frames_at, read_frame_times, sample_frames, tile_frames
from pipelines.media.video.shots import Cutting, find_cuts
from pipelines.media.video.source import FrameTimes
from pipelines.media.video.text_track import read_track
from pipelines.media.video.transcoding import RawFrames, transcode
from pipelines.storage import store
from pipelines.storage.sized_file import SizedFile

TIMEOUT_S = 600.0
MAX_MEMORY_BYTES = 4 << 30
_BLOCK_BYTES = 1 << 20
_SPARE_BYTES = 256 << 20


class VideoDecoder:
    """One child process that decodes one video after another, started on first use; one thread may use it at a time.

    Its methods raise MediaError if a video cannot be decoded within the limits, OSError if it cannot be read, and
    StoreFault if its store does not answer.
    """

    def __init__(self, *, timeout_s: float = TIMEOUT_S, max_memory_bytes: int = MAX_MEMORY_BYTES) -> None:
        self._timeout_s, self._max_memory_bytes = timeout_s, max_memory_bytes
        self._process: ChildProcess | None = None

    def sample_frames(
        self,
        location: VideoLocation,
        sampling: Sampling,
        window: Window | None = None,
        size: tuple[int, int] | None = None,
    ) -> list[Frame]:
        """Return evenly spread frames; see `sampling.sample_frames`."""
        window = window or Window()
        return self._request_frames("sample", location, sampling=asdict(sampling), window=list(window), size=size)

    def decode_frames_at(self, location: VideoLocation, times_s: Sequence[float]) -> list[Frame]:
        """Return the frames at these times; see `sampling.decode_frames_at`."""
        return self._request_frames("at", location, times_s=list(times_s))

    def read_frame_times(self, location: VideoLocation) -> FrameTimes:
        """Return the time of each frame; see `sampling.read_frame_times`."""
        reply, _ = self._ask("times", location)
        return FrameTimes(reply["times_s"], reply["fps"])

    def tile_frames(
        self, location: VideoLocation, wanted: Sampling | Sequence[float], tiling: Tiling, window: Window | None = None
    ) -> TiledVideo:
        """Return frames as tiles, which need a hundredth of the memory of large frames; see `sampling.tile_frames`."""
        which = {"sampling": asdict(wanted)} if isinstance(wanted, Sampling) else {"times_s": list(wanted)}
        reply, arrays = self._ask("tile", location, tiling=list(tiling), window=list(window or Window()), **which)
        tiles, jpegs = arrays[: len(arrays) // 2], map(bytes, arrays[len(arrays) // 2 :])
        facts = zip(tiles, reply["sizes"], reply["frames"], jpegs, strict=True)
        frames = [
            TiledFrame(tile, np.array(sizes, np.int32), width, height, time_s, jpeg)
            for tile, sizes, (width, height, time_s), jpeg in facts
        ]
        return TiledVideo(frames, VideoInfo(**reply["info"]))

    def read_subtitles(self, location: VideoLocation, window: Window) -> list[Cue]:
        """Return the cues of the text track in the window; see `text_track.read_track`."""
        reply, _ = self._ask("subtitles", location, window=list(window))
        return [Cue(*cue) for cue in reply["cues"]]

    def find_cuts(self, location: VideoLocation, cutting: Cutting, window: Window) -> list[float]:
        """Return the times in seconds at which to cut the video; see `shots.find_cuts`."""
        reply, _ = self._ask("cuts", location, cutting=asdict(cutting), window=list(window))
        return list(map(float, reply["cuts_s"]))

    def close(self) -> None:
        """Stop the process; a later call starts a new one."""
        if self._process is not None:
            self._process.close()
        self._process = None

    def _request_frames(self, action: str, location: VideoLocation, **arguments: Any) -> list[Frame]:
        reply, pixels = self._ask(action, location, **arguments)
        return [Frame(*frame) for frame in zip(pixels, reply["timestamps_s"], strict=True)]

    def _ask(self, action: str, location: VideoLocation, **arguments: Any) -> tuple[Json, list[Pixels]]:
        """Send a request and return the reply; retry once in a new process if this one dies or runs out of memory.

        It may have been killed from outside, or earlier videos may have left too little memory.
        """
        for last_try in (False, True):
            stream = MessageStream(self._connect(), time.monotonic() + self._timeout_s)
            try:
                request = {
                    "action": action,
                    "location": location[:3],
                    "arguments": arguments,
                    "stores": store.get_settings(),
                }
                stream.send(request, location.data)
                reply = stream.receive_json()
                if reply.get("error") == "memory":
                    self.close()
                    if not last_try:
                        continue
                _raise_if_error(reply)
                return reply, [stream.receive(shape) for shape in reply["shapes"]]
            except TimeoutError as error:
                self.close()
                raise MediaError(f"decoding takes longer than {self._timeout_s:g} s") from error
            except (StreamEnded, ConnectionError) as error:
                how = self._describe_end()
                if last_try:
                    raise MediaError(f"the decoder crashed twice on this video ({how})") from error
        raise AssertionError("unreachable")

    def _connect(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            module = "pipelines.media.video.process"
            self._process = ChildProcess(module, self._max_memory_bytes, environment=_ONE_THREAD)
        return self._process.socket

    def _describe_end(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self.close()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _raise_if_error(reply: Json) -> None:
    match reply.get("error"):
        case "read":
            raise OSError(reply["reason"])
        case "store":
            raise StoreFault(reply["reason"])
        case "decode" | "memory":
            raise MediaError(reply["reason"])


def main(fd: int, parent: int, max_memory_bytes: int) -> None:
    """Answer requests until the other side closes the socket or exits."""
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    end_with_parent(parent)
    stream = MessageStream(socket.socket(fileno=fd))
    while True:
        try:
            request = stream.receive_json()
            data = stream.receive(request["num_bytes"]).tobytes()
        except (StreamEnded, ConnectionError):
            return
        answer, arrays = _answer(request, data)
        stream.send(answer, *arrays)


def _answer(request: Json, data: bytes) -> tuple[Json, list[Pixels]]:
    """Return the reply and the arrays that follow it."""
    try:
        store.use_settings(request["stores"])
        uri, offset, num_bytes = request["location"]
        location = VideoLocation(uri, offset, num_bytes, data)
        with _open_video(location) as file:
            try:
                return _run(request["action"], file, request["arguments"])
            except NotReadable as reason:
                path = store.find_local_path(uri) if not data and offset < 0 else None
                with transcode(file, path, reason) as frames:
                    return _run_transcoded(request["action"], frames, request["arguments"], reason)
    except MediaError as error:
        # Decoders hide a lack of memory behind other errors.
        return {"error": "memory" if _is_memory_short() else "decode", "reason": str(error)}, []
    except MemoryError:
        return {"error": "memory", "reason": "decoding needs more memory than the limit per video"}, []
    except (StoreFault, CredentialsRefused) as error:
        return {"error": "store", "reason": str(error)}, []
    except OSError as error:
        return {"error": "read", "reason": error.strerror or str(error) or type(error).__name__}, []
    except Exception as error:
        # On damaged data libraries may raise any exception, and none of them may stop the run.
        return {"error": "decode", "reason": f"{type(error).__name__}: {error}"}, []


def _is_memory_short() -> bool:
    """Return whether the limit leaves too little memory for a video, because of earlier ones."""
    try:
        np.empty(_SPARE_BYTES, np.uint8)
    except MemoryError:
        return True
    return False


def _run(action: str, file: BinaryIO, arguments: Json) -> tuple[Json, list[Pixels]]:
    match action:
        case "times":
            return {**read_frame_times(file)._asdict(), "shapes": []}, []
        case "sample":
            return _pack_frames(_sample(file, **arguments))
        case "at":
            return _pack_frames(decode_frames_at(file, **arguments))
        case "subtitles":
            return {"cues": read_track(file, Window(*arguments["window"])), "shapes": []}, []
        case "cuts":
            cutting, window = Cutting(**arguments["cutting"]), Window(*arguments["window"])
            return {"cuts_s": find_cuts(file, cutting, window), "shapes": []}, []
        case _:
            return _pack_video(_tile(file, **arguments))


def _run_transcoded(action: str, frames: RawFrames, arguments: Json, reason: NotReadable) -> tuple[Json, list[Pixels]]:
    """Return what `_run` returns for frames that another ffmpeg decodes. Raise `reason` if it cannot either."""
    try:
        reply, arrays = _run(action, cast(BinaryIO, frames), arguments)
    except NotReadable:
        raise reason from None
    if "info" in reply:
        reply["info"] |= frames.describe()
    return reply, arrays


def _sample(file: BinaryIO, sampling: Json, window: list[float], size: list[int] | None) -> list[Frame]:
    return sample_frames(file, Sampling(**sampling), Window(*window), (size[0], size[1]) if size else None)


def _tile(
    file: BinaryIO,
    tiling: list[Any],
    window: list[float],
    sampling: Json | None = None,
    times_s: Sequence[float] = (),
) -> TiledVideo:
    wanted = Sampling(**sampling) if sampling else times_s
    return tile_frames(file, wanted, Tiling(*tiling), Window(*window))


def _pack_frames(frames: list[Frame]) -> tuple[Json, list[Pixels]]:
    pixels = [frame.pixels for frame in frames]
    times_s = [frame.timestamp_s for frame in frames]
    return {"shapes": [array.shape for array in pixels], "timestamps_s": times_s}, pixels


def _pack_video(clip: TiledVideo) -> tuple[Json, list[Pixels]]:
    arrays = [frame.tiles for frame in clip.frames] + [np.frombuffer(frame.jpeg, np.uint8) for frame in clip.frames]
    sizes = [frame.sizes.tolist() for frame in clip.frames]
    frames = [(frame.width, frame.height, frame.timestamp_s) for frame in clip.frames]
    shapes = [array.shape for array in arrays]
    return {"shapes": shapes, "sizes": sizes, "frames": frames, "info": asdict(clip.info)}, arrays


@contextmanager
def _open_video(location: VideoLocation) -> Iterator[BinaryIO]:
    if location.data:
        yield io.BytesIO(location.data)
        return
    with store.open_file(location.uri, block_bytes=_BLOCK_BYTES) as file:
        yield file if location.offset < 0 else io.BufferedReader(_Part(file, location.offset, location.num_bytes))


class _Part(SizedFile):
    """A file object over `num_bytes` of another file from `offset`."""

    def __init__(self, file: BinaryIO, offset: int, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self._file, self._offset = file, offset

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._num_bytes - self._at))
        self._file.seek(self._offset + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
