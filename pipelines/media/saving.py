"""Save what the model sees of each row, images and frames, as JPEG files named by the id of the row."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from pipelines.config import RunConfig
from pipelines.errors import CredentialsRefused, RunError, StoreFault
from pipelines.storage import store

_PLACES = ("data", "manifest", "cuts", "exchange")  # in OUTPUT, where the run writes
_QUALITY = 90
_MAX_SIDE_PX = 65_500  # of libjpeg
_FILES_AT_ONCE = 8
_MAX_NAME_BYTES = 120  # of an id in a name; file systems allow 255 in all
_UNSAFE = re.compile(r"[^\w.-]+")


def check_saved_frames(config: RunConfig) -> None:
    """Create the directory for saved frames, if they are wanted.

    Raise RunError if that is impossible, or if its files would be listed as INPUT or stand among those of the run.
    """
    if config.save_frames is None:
        return
    directory, output = store.normalize(config.save_frames), store.normalize(config.output)
    inputs = [] if _is_inside(directory, output) else [store.normalize(uri) for uri in config.input]
    for place in (*(store.join(output, name) for name in _PLACES), *inputs):
        if _is_inside(directory, place):
            raise RunError(f"--save-frames {config.save_frames} is inside {place}; give a directory of its own")
    if directory.rstrip("/") == output.rstrip("/"):
        raise RunError(f"--save-frames {config.save_frames} is OUTPUT itself; give a directory of its own")
    try:
        store.create_directory(config.save_frames)
    except OSError as error:
        raise RunError(f"--save-frames {config.save_frames} cannot be created: {error}") from error


def _is_inside(uri: str, directory: str) -> bool:
    return f"{uri.rstrip('/')}/".startswith(f"{directory.rstrip('/')}/")


def encode_jpeg(picture: Image.Image) -> bytes:
    """Encode an RGB image as JPEG of quality 90; one with a side beyond the format's limit is shrunk to it."""
    if max(picture.size) > _MAX_SIDE_PX:
        picture = picture.copy()
        picture.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def make_names(id_: str, count: int) -> tuple[str, ...]:
    """Return the paths of the files of a row below the directory, such as `3f/clip.mp4_t_0_2-3f9a2c41b7d05e16-000.jpg`.

    They hold the end of the id, as far as it is safe in a path, and a hash of the whole id, so that no two ids share a
    name, not even where names differ only in case. The folders, 256 of them, are the first two digits of the hash.
    """
    digest = hashlib.blake2b(id_.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    safe = _UNSAFE.sub("_", id_).encode("utf-8", "ignore")[-_MAX_NAME_BYTES:].decode("utf-8", "ignore")
    stem = "-".join(filter(None, (safe.strip("._-"), digest)))
    return tuple(f"{digest[:2]}/{stem}-{number:03}.jpg" for number in range(count))


class FrameSaver:
    """Writes the JPEG files of rows into a directory of any store, several at once."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._pool = ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="save")

    def save(self, id_: str, files: Sequence[bytes]) -> tuple[str, ...]:
        """Write the JPEG files of a row, replacing those of an earlier try, and return their paths in the directory.

        Raise StoreFault if one cannot be written: then no other row can be saved either.
        """
        names = make_names(id_, len(files))
        try:
            list(self._pool.map(self._write, names, files))
        except (OSError, CredentialsRefused) as error:
            raise StoreFault(f"frames cannot be saved in {store.redact(self._directory)}: {error}") from error
        return names

    def _write(self, name: str, data: bytes) -> None:
        store.write_bytes(store.join(self._directory, name), data)
