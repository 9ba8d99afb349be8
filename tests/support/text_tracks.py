"""Add text tracks to videos with the ffmpeg binary that comes with moviepy, as PyAV encodes no subtitles."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg

Line = tuple[float, float, str]


def format_srt(lines: Sequence[Line]) -> str:
    """Return SRT of (start_s, stop_s, text)."""
    blocks = [f"{n}\n{_format(start)} --> {_format(stop)}\n{text}\n" for n, (start, stop, text) in enumerate(lines, 1)]
    return "\n".join(blocks)


def _format(time_s: float) -> str:
    seconds, milliseconds = divmod(round(time_s * 1000), 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02},{milliseconds:03}"


def add_text_tracks(
    path: Path, video: Path, *tracks: Sequence[Line], codec: str, dispositions: Sequence[str] = ()
) -> Path:
    """Write `video` with these text tracks; each has one of the dispositions, if given."""
    texts = [path.with_suffix(f".{number}.srt") for number in range(len(tracks))]
    for text, lines in zip(texts, tracks, strict=True):
        text.write_text(format_srt(lines))
    inputs = [part for file in (video, *texts) for part in ("-i", str(file))]
    maps = [part for number in range(len(tracks) + 1) for part in ("-map", str(number))]
    marks = [part for number, name in enumerate(dispositions) for part in (f"-disposition:s:{number}", name)]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *inputs, *maps, "-c:v", "copy", "-c:s", codec]
    subprocess.run([*command, *marks, str(path)], check=True, stdin=subprocess.DEVNULL)
    return path
