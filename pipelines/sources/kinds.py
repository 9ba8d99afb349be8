"""Name the kinds of files that INPUT may hold, by suffix."""

from __future__ import annotations

from pipelines.media.reference import VIDEO_SUFFIXES
from pipelines.storage import store

KINDS = {
    ".tar": "tar",
    ".tar.gz": "tgz",
    ".tgz": "tgz",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl",
    ".json": "json",
    ".json.gz": "json",
}
_IMAGE_FORMATS = (
    "avif bmp dib gif heic heif hif ico j2k jfif jp2 jpe jpeg jpg jxl pbm pgm png pnm ppm tga tif tiff webp"
)
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _IMAGE_FORMATS.split()) | VIDEO_SUFFIXES
"""Suffixes of images, and of videos, whose frames become images."""


def detect_kind(uri: str) -> str:
    """Return the kind of shard that the name indicates, or "file"."""
    name = store.strip_query(uri).lower()
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), "file")
