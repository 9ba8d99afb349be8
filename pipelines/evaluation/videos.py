"""Extract the frames of a benchmark's videos as JPEG files, as VLMEvalKit does, before its items are asked.

All items about a video share its files. Frames that exist already are not extracted again.
"""

from __future__ import annotations

import io
import json
import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import MediaError
from pipelines.evaluation.benchmarks import Dataset
from pipelines.evaluation.files import leads_out
from pipelines.evaluation.frames import FrameRule, select_subtitles, split_in_segments, spread_evenly, take_per_second
from pipelines.evaluation.scoring.scores import Item, get_index, is_missing
from pipelines.media.images import decode_image
from pipelines.media.reference import VideoLocation
from pipelines.media.video.process import VideoDecoder
from pipelines.monitoring.progress import Progress
from pipelines.storage import store

_FRAMES_AT_ONCE = 8  # of a video in memory: 200 MB in 4K
_GIF_FPS, _FOLDER_FPS = 25.0, 3.0  # VLMEvalKit's, for what states no rate


@dataclass(frozen=True)
class Clip:
    """What an item shows: a file or a folder of numbered images, as `path` below the directory of videos.

    bounds_s: the part to show, None for all of it.
    """

    path: str
    kind: str
    bounds_s: tuple[float, float] | None = None

    @property
    def folder(self) -> str:
        """Name of the folder of its frames."""
        bounds = "" if self.bounds_s is None else "/{:g}-{:g}".format(*self.bounds_s)
        return f"{self.path}{bounds}"


@dataclass(frozen=True)
class Frames:
    """The frames of a clip: their files, their places in the video from 0, and its frames per second."""

    uris: Sequence[str]
    indices: Sequence[int]
    fps: float


class UnreadableVideo(ValueError):  # noqa: N818  (the name says what happened)
    """A video cannot be read or decoded: an error of the items about it, not of the run."""


def find_clip(item: Item) -> Clip:
    """Return what an item shows. Raise ValueError for a path that leads out of the directory of videos."""
    if "prefix" in item:
        suffix = "" if is_missing(item.get("suffix")) else item["suffix"]
        path = f"{item['prefix']}/{item['video']}{suffix}"
    else:
        path = f"video/{item['video']}.mp4"
    bounds_s = (float(item["start"]), float(item["end"])) if item.get("bound") in (True, "True") else None
    return Clip(_check_path(item, path), str(item.get("data_type", "video")), bounds_s)


def extract_frames(
    dataset: Dataset, clips: Sequence[Clip], root: str, rule: FrameRule, target: str, *, reuse: bool = True
) -> dict[Clip, Frames | UnreadableVideo]:
    """Write the frames of each clip below `target`, in as many processes as there are CPUs, and return their files.

    root: the directory of videos. reuse: keep frames that exist. Raise StoreFault if a store does not answer.
    """
    distinct = list(dict.fromkeys(clips))
    with _open_decoders(min(len(distinct), os.cpu_count() or 1)) as decoders, Progress("videos", len(distinct)) as bar:

        def extract(clip: Clip) -> Frames | UnreadableVideo:
            decoder = decoders.get()
            try:
                folder = store.join(target, clip.folder)
                note = store.join(folder, f"{rule.fps:g}fps.json" if rule.fps else f"{rule.num_frames}.json")
                if not reuse or store.find_file(note) is None:
                    _extract(dataset, clip, root, rule, note, decoder)
                return _read_frames(note)
            except UnreadableVideo as error:
                return error
            finally:
                decoders.put(decoder)

        found = {}
        with ThreadPoolExecutor(max(1, decoders.qsize())) as pool:
            for clip, frames in zip(distinct, pool.map(extract, distinct), strict=True):
                found[clip] = frames
                bar.advance(1)
    return found


def read_subtitles(item: Item, frames: Frames, root: str) -> str:
    """Return the subtitles shown with the frames, "" for a video without. Raise ValueError if they are unreadable."""
    uri = store.join(root, _check_path(item, str(item["subtitle_path"])))
    if store.find_file(uri) is None:
        return ""
    try:
        return select_subtitles(store.read_bytes(uri).decode(), frames.indices, frames.fps)
    except ValueError as error:
        raise ValueError(f"index {get_index(item)}: cannot read {uri}: {error}") from error


def _check_path(item: Item, path: str) -> str:
    if leads_out(path):
        raise ValueError(f"index {get_index(item)}: {path} is not below the directory of videos")
    return str(PurePosixPath(path))


@contextmanager
def _open_decoders(count: int) -> Iterator[queue.SimpleQueue[VideoDecoder]]:
    decoders: queue.SimpleQueue[VideoDecoder] = queue.SimpleQueue()
    every = [VideoDecoder() for _ in range(count)]
    for decoder in every:
        decoders.put(decoder)
    try:
        yield decoders
    finally:
        for decoder in every:
            decoder.close()


def _extract(dataset: Dataset, clip: Clip, root: str, rule: FrameRule, note: str, decoder: VideoDecoder) -> None:
    """Write the frames of a clip beside `note`, and last the note that lists them."""
    with _explain(clip):
        video = _open_clip(clip, store.join(root, clip.path), decoder)
        indices = choose_indices(dataset, clip, rule, video)
        for index, pixels in zip(indices, video.decode(indices), strict=True):
            store.write_bytes(_name_frame(note, index), encode_frame(pixels))
    store.write_bytes(note, json.dumps({"indices": indices, "fps": video.fps}).encode())


def _read_frames(note: str) -> Frames:
    content = json.loads(store.read_bytes(note))
    return Frames([_name_frame(note, index) for index in content["indices"]], content["indices"], content["fps"])


def _name_frame(note: str, index: int) -> str:
    return f"{note.rpartition('/')[0]}/{index}.jpg"


@contextmanager
def _explain(clip: Clip) -> Iterator[None]:
    """Raise what is wrong with a video as UnreadableVideo."""
    try:
        yield
    except MediaError as error:
        raise UnreadableVideo(f"{clip.path}: {error}") from error
    except OSError as error:
        raise UnreadableVideo(f"{clip.path}: {error.strerror or error}") from error


def choose_indices(dataset: Dataset, clip: Clip, rule: FrameRule, video: _FileFrames | _FolderFrames) -> list[int]:
    """Return the places of the frames to show. Raise MediaError if there is none."""
    if rule.fps is not None:
        indices = take_per_second(video.num_frames, video.fps, rule.fps)
    elif dataset.frames == "evenly":
        indices = spread_evenly(video.num_frames, rule.num_frames)
    else:
        first = video.first_frame
        last = first + video.num_frames - 1
        indices = split_in_segments(last, rule.num_frames, video.fps, clip.bounds_s, first)
    if not indices:
        raise MediaError(f"the video is too short for a frame at {rule.fps:g} frames per second")
    return sorted(set(indices)) if clip.kind == "gif" else indices


def encode_frame(pixels: NDArray[np.uint8]) -> bytes:
    """Return a frame as JPEG of quality 75: VLMEvalKit shows the model frames that were compressed so."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def _open_clip(clip: Clip, uri: str, decoder: VideoDecoder) -> _FileFrames | _FolderFrames:
    if clip.kind == "frame":
        return _FolderFrames(uri)
    return _FileFrames(uri, decoder, _GIF_FPS if clip.kind == "gif" else None)


class _FileFrames:
    """The frames of a video file, by number from 0."""

    first_frame = 0

    def __init__(self, uri: str, decoder: VideoDecoder, fps: float | None) -> None:
        self._location, self._decoder = VideoLocation(uri), decoder
        self._times_s, stated_fps = decoder.read_frame_times(self._location)
        self.num_frames, self.fps = len(self._times_s), fps or stated_fps

    def decode(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield the pixels of frames in ascending order."""
        for start in range(0, len(indices), _FRAMES_AT_ONCE):
            times_s = [self._times_s[index] for index in indices[start : start + _FRAMES_AT_ONCE]]
            yield from (frame.pixels for frame in self._decoder.decode_frames_at(self._location, times_s))


class _FolderFrames:
    """The frames of a folder of images 00001.jpg, 00002.jpg ..."""

    first_frame, fps = 1, _FOLDER_FPS

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.num_frames = len(store.list_files(uri))

    def decode(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield the pixels of frames."""
        for index in indices:
            yield np.asarray(decode_image(store.read_bytes(store.join(self._uri, f"{index:05d}.jpg"))))
