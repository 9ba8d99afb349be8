"""Open a video file: the formats that are read, the stream that players show, and what the header states."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from pipelines.errors import MediaError
from pipelines.media.video.frames import check_size

# Demuxers that read one file. Playlists (hls, dash, concat) would open other files, by name or over the network.
FORMATS = (
    "mov,mp4,matroska,webm,avi,flv,live_flv,mpeg,mpegts,mpegvideo,asf,ogg,rm,wtv,dv,mxf,nut,ivf,h264,hevc,av1,obu,"
    "m4v,h263,vc1,gif,y4m,yuv4mpegpipe,3gp,swf,nsv,smjpeg,mjpeg"
)
MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
INDEXED = (MP4, "matroska,webm", "avi", "flv")
"""Names of the formats whose files have an index."""

_BUFFER_BYTES = 1 << 16
_PROBED_PACKETS = 1000  # enough to tell a film from a cover, which has one
_HEADER_BYTES = 64 << 20

# ISO media except images in it (AVIF, HEIC), Matroska, AVI, FLV, ASF, Ogg, MPEG program and transport streams, MXF.
_SIGNATURES = re.compile(
    rb"....(ftyp(?!avi[fs]|hei[cmsx]|mif1|msf1)|moov|moof|mdat|wide|free|skip)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01"
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|OggS|\0\0\x01[\xba\xb3]|\x47.{187}\x47|\x06\x0e\x2b\x34",
    re.DOTALL,
)
_NO_FILM = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent


def has_video_signature(data: bytes) -> bool:
    """Return whether the first bytes are those of a video, which `decode_image` cannot read."""
    return _SIGNATURES.match(data) is not None


class NotReadable(MediaError):  # noqa: N818  (the name says what happened)
    """PyAV cannot read the file; another ffmpeg may."""


class _Unseekable:
    """A file that can only be read in order, so that no index is used."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read


def open_container(file: BinaryIO, *, seekable: bool = True) -> InputContainer:
    """Open a file, unless `seekable` without its index. Raise NotReadable if it is not a video."""
    if not file.seek(0, io.SEEK_END):
        raise MediaError("not a video: the file is empty")
    file.seek(0)
    options = {"format_whitelist": FORMATS}
    source: Any = file if seekable else _Unseekable(file)
    try:
        container: InputContainer = av.open(
            source, "r", buffer_size=_BUFFER_BYTES, options=options, metadata_errors="replace"
        )
        return container
    except MemoryError:
        raise
    except av.FFmpegError as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise NotReadable(f"not a video, or its header is damaged: {reason}") from error


def choose_stream(file: BinaryIO, container: InputContainer) -> int:
    """Return the index of the stream that players show. Raise MediaError if the file has none.

    It is the largest of those marked as default, or of all if none is. Covers and other streams of one picture count
    only if there is no film.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & _NO_FILM]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise MediaError(f"no video in the file: it holds {kinds}")
    known = [stream for stream in streams if _has_decoder(stream)]
    if not known:
        raise NotReadable("the video's codec is unknown, or its header is damaged")
    films = known if len(known) == 1 else _drop_still_pictures(file, known)
    best = max(films, key=lambda stream: (bool(stream.disposition & Disposition.default), _count_pixels(stream)))
    check_size(best.codec_context.width, best.codec_context.height)
    return best.index


def _has_decoder(stream: VideoStream) -> bool:
    context: Any = stream.codec_context
    return context is not None


def _count_pixels(stream: VideoStream) -> int:
    return stream.codec_context.width * stream.codec_context.height


def _drop_still_pictures(file: BinaryIO, streams: Sequence[VideoStream]) -> Sequence[VideoStream]:
    """Return the streams with more than one packet near the start of the file; all if there is none."""
    counts: Counter[int] = Counter()
    with closing(open_container(file)) as probe:
        for number, packet in enumerate(read_packets(probe, *(probe.streams[stream.index] for stream in streams))):
            counts[packet.stream_index] += packet.size > 0
            if number > _PROBED_PACKETS or all(counts[stream.index] > 1 for stream in streams):
                break
    return [stream for stream in streams if counts[stream.index] > 1] or streams


def read_packets(container: InputContainer, *streams: Stream) -> Iterator[Any]:
    """Yield packets up to the end of the file, or to the first that cannot be read."""
    try:
        yield from container.demux(*streams)
    except MemoryError:
        raise
    except av.FFmpegError:
        return


def read_fps(stream: VideoStream) -> float:
    """Return frames per second as ffmpeg prints them (two decimals) and moviepy reads them (29.97 is 30000 / 1001)."""
    rate = float(stream.average_rate or stream.guessed_rate or stream.base_rate or 0)
    stated = round(rate, 2)
    if stated <= 0:
        return rate if rate > 0 else 1.0
    for whole in (23, 24, 25, 30, 50):
        if stated != whole and abs(stated - whole * 1000 / 1001) < 0.01:
            return whole * 1000 / 1001
    return stated


def read_stated_end_s(stream: VideoStream) -> float | None:
    """Return the stated end of the frames in seconds, None if the header leaves it open; the sound may be longer."""
    if stream.duration is not None:
        return float(stream.duration * (stream.time_base or 0))
    if match := re.match(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):  # Matroska
        return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
    return None


def name_container(container: InputContainer) -> str:
    """Return the name of the format, the first of ffmpeg's names, but mp4 unless the file is QuickTime's."""
    name = container.format.name
    if name == MP4:
        return "mov" if container.metadata.get("major_brand", "").strip() == "qt" else "mp4"
    return name.partition(",")[0]


def has_encrypted_video(file: BinaryIO, container: InputContainer, stream: VideoStream) -> bool:
    """Return whether the header of an MP4 or a WebM says that the video is encrypted."""
    if container.format.name != MP4:
        return "enc_key_id" in stream.metadata
    with suppress(OSError, ValueError):
        header = _read_box(file, b"moov")
        return b"sinf" in header and (b"encv" in header or b"drmi" in header)
    return False


def _read_box(file: BinaryIO, name: bytes) -> bytes:
    """Return the content of a box at the top level of an MP4, b"" without one."""
    end, start = file.seek(0, io.SEEK_END), 0
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        size = int.from_bytes(head[8:16], "big") if size == 1 else size or end - start
        if head[4:8] == name:
            file.seek(start)
            return file.read(min(size, _HEADER_BYTES))
        if size < 8:
            break
        start += size
    return b""
