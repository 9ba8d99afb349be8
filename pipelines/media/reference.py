"""Where the bytes of an image or a video are: what a manifest row holds instead of payload."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Kind = Literal["file", "tar", "tgz", "parquet", "arrow"]


class ImageRef(NamedTuple):
    """Where the bytes of an image are.

    kind      fields that count
    file      uri; num_bytes as listed, -1 if nobody asked
    tar       uri, offset, num_bytes, member (its name)
    tgz       the same, offset in the unpacked stream
    parquet   uri, row (of the file), member (the column); stands for all images of that cell, maybe none
    arrow     the same, row of the batch that is the message at offset, of num_bytes
    """

    kind: Kind
    uri: str
    offset: int = -1
    num_bytes: int = -1
    member: str = ""
    row: int = -1
    start_s: float = 0.0  # of a video: the part of it, in seconds from its start
    stop_s: float = math.inf


def resolve(path: str, of_file: str) -> str:
    """`path` as given in `of_file`: a URI or absolute, else relative to that file."""
    if "://" in path or path.startswith("/"):
        return path
    return f"{of_file.rpartition('/')[0]}/{path}"
