"""Read the text track of a video: SRT, mov_text, WebVTT, SSA or ASS; tracks of pictures are not read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition, Stream

from pipelines.media.reference import Window
from pipelines.media.subtitles import Cue, clean_text, select_cues
from pipelines.media.video.container import open_container, read_packets

_CODECS = frozenset(("subrip", "srt", "mov_text", "webvtt", "ass", "ssa", "text"))
_MAX_CUE_S = 30.0  # a cue that begins so long before a window is not looked for
_MAX_SPREAD_S = 10.0  # containers store a cue within so many seconds of the frames that are shown with it


def read_track(file: BinaryIO, window: Window) -> list[Cue]:
    """Return the cues of the text track that are shown in the window, in order; none without such a track.

    It is the default track, else the first that is not forced. Raise MediaError if the file is not a video.
    """
    with closing(open_container(file)) as container:
        if (track := _choose_track(container)) is None:
            return []
        start_s = (container.start_time or 0) / av.time_base
        _seek(container, window.start_s - _MAX_CUE_S, start_s)
        return select_cues(sorted(_read_cues(container, track, start_s, window.stop_s)), window)


def _choose_track(container: InputContainer) -> Stream | None:
    tracks = [stream for stream in container.streams.subtitles if _get_codec(stream) in _CODECS]
    return max(tracks, key=_rank, default=None)  # the first of those that are equal


def _get_codec(stream: Stream) -> str:
    context: Any = stream.codec_context
    return context.name if context is not None else ""


def _rank(stream: Stream) -> tuple[bool, bool]:
    return bool(stream.disposition & Disposition.default), not stream.disposition & Disposition.forced


def _seek(container: InputContainer, time_s: float, start_s: float) -> None:
    if time_s > 0:
        try:
            container.seek(round((time_s + start_s) * av.time_base))
        except av.FFmpegError:
            container.seek(0)


def _read_cues(container: InputContainer, track: Stream, start_s: float, stop_s: float) -> Iterator[Cue]:
    """Yield cues up to `stop_s`; the packets of the first video tell how far the file is read."""
    for packet in read_packets(container, track, *container.streams.video[:1]):
        if packet.pts is None or packet.time_base is None:
            continue
        time_s = float(packet.pts * packet.time_base) - start_s
        if packet.stream_index == track.index:
            yield from _decode(packet, time_s)
        elif time_s > stop_s + _MAX_SPREAD_S:
            return


def _decode(packet: Any, time_s: float) -> Iterator[Cue]:
    try:
        texts = [item.dialogue.decode("utf-8", "replace") for item in packet.decode() if hasattr(item, "dialogue")]
    except (av.FFmpegError, EOFError):
        return
    if text := clean_text("\n".join(texts)):
        stop_s = time_s + float((packet.duration or 0) * packet.time_base)
        yield Cue(round(time_s, 3), round(stop_s, 3), text)
