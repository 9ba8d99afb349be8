"""Recognise what a directory holds: images, shards or a dataset of Hugging Face."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from pipelines.errors import SourceError
from pipelines.media.reference import VIDEO_SUFFIXES
from pipelines.storage import store
from pipelines.storage.store import FileInfo

KINDS = {
    ".tar": "tar",
    ".tar.gz": "tgz",
    ".tgz": "tgz",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
}
_IMAGE_FORMATS = "avif bmp dib gif ico j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _IMAGE_FORMATS.split()) | VIDEO_SUFFIXES
"""Of files that are images or become some: the frames of a video."""
_METADATA = "metadata.jsonl"
_UNREAD_METADATA = ("metadata.csv", "metadata.parquet")

logger = logging.getLogger(__name__)


def detect_kind(uri: str) -> str:
    """Return the kind of shard that the name says, or "file"."""
    name = store.strip_query(uri).lower()
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), "file")


def list_directory(uri: str) -> Iterable[FileInfo]:
    """Return the files of an INPUT that is a directory. Raises SourceError if it is not clear which ones are meant."""
    if saved := _saved_dataset(uri):
        return saved
    infos = store.list_files(uri)
    images = [info for info in infos if PurePosixPath(info.uri).suffix.lower() in IMAGE_SUFFIXES]
    if any(info.uri.rpartition("/")[2] in (_METADATA, *_UNREAD_METADATA) for info in infos) and images:
        return _image_folder(uri, infos, images)
    taken = images or _shards(uri, infos)
    left_out = {info.uri for info in infos}.difference(info.uri for info in taken)
    log_left_out(uri, Counter(PurePosixPath(other).suffix.lower() or "no suffix" for other in left_out))
    return taken


def _saved_dataset(uri: str) -> list[FileInfo]:
    """Return the shards of `Dataset.save_to_disk`, of all splits of a `DatasetDict`; none if it is neither."""
    splits = _json(uri, "dataset_dict.json").get("splits")
    if isinstance(splits, list):
        return [info for split in splits for info in _saved_dataset(store.join(uri, str(split)))]
    files = _json(uri, "state.json").get("_data_files")
    if not isinstance(files, list):
        return []
    return [_shard(store.join(uri, str(file["filename"]))) for file in files]


def _json(uri: str, name: str) -> dict[str, object]:
    """Return what a marker file says, nothing if it is missing or not ours."""
    marker = store.join(uri, name)
    if store.find_file(marker) is None:
        return {}
    try:
        values = json.loads(store.read_bytes(marker, 0, 16 << 20))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _shard(uri: str) -> FileInfo:
    info = store.find_file(uri)
    if info is None:
        raise SourceError(f"{store.redact(uri)} is missing: the dataset was not saved to its end, or moved in part")
    return info


def _image_folder(uri: str, infos: list[FileInfo], images: list[FileInfo]) -> list[FileInfo]:
    """Return the `metadata.jsonl` of each directory that has one, in place of the images below it."""
    if unread := [info.uri for info in infos if info.uri.rpartition("/")[2] in _UNREAD_METADATA]:
        raise SourceError(f"{unread[0]} is not read; make it {_METADATA}, or give {uri}/** to caption the images alone")
    metadata = [info for info in infos if info.uri.rpartition("/")[2] == _METADATA]
    described = tuple(info.uri.removesuffix(_METADATA) for info in metadata)
    others = [info for info in images if not info.uri.startswith(described)]
    logger.warning(
        "%s: %d images below %s are taken by the rows of that",
        store.redact(uri),
        len(images) - len(others),
        _METADATA,
    )
    return sorted([*metadata, *others], key=lambda info: info.uri)


def _shards(uri: str, infos: list[FileInfo]) -> list[FileInfo]:
    """Return those of a directory without images. Raises SourceError if they are of several kinds."""
    shards = [
        info for info in infos if detect_kind(info.uri) != "file" and not info.uri.rpartition("/")[2].startswith(".")
    ]
    kinds = sorted({detect_kind(info.uri) for info in shards})
    if len(kinds) > 1:
        raise SourceError(
            f"{store.redact(uri)} holds no images but shards of several kinds ({', '.join(kinds)}); give those that "
            f"are meant, such as {uri.rstrip('/')}/**/*.{kinds[0]}"
        )
    return shards


def log_left_out(uri: str, others: Counter[str]) -> None:
    """Log what was left out; `others` counts files by the end of their names."""
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        logger.warning("%s: left out %d files (%s)", store.redact(uri), others.total(), counts)
