"""Compare JPEG decoders with Pillow's: their bytes, and CPU time until there are pixels of 4 bytes.

    pip install simplejpeg PyTurboJPEG    (no dependencies; the second needs libturbojpeg of libjpeg-turbo 3)
    python -m benchmarks.jpeg_decoders FOLDER ...

Every JPEG file below the folders is decoded by each; then drawn photos are, in turns, and the medians are printed.
"""

from __future__ import annotations

import argparse
import io
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.preprocess import SIZES, draw_photo, encode_jpeg, measure_median_ms

SUFFIXES = (".jpg", ".jpeg")
Decode = Callable[[bytes], Any]


def decode_with_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=["JPEG"])
    image.load()
    return image


def list_decoders() -> dict[str, Decode]:
    """Return what decodes to uint8[H, W, 4], whose fourth value means nothing, for each installed package."""
    decoders: dict[str, Decode] = {}
    try:
        simple = import_module("simplejpeg")
        decoders["simplejpeg"] = lambda data: simple.decode_jpeg(data, "RGBX")
    except ImportError as error:
        print(f"simplejpeg: {error}")
    try:
        turbo = import_module("turbojpeg")
        decoder = turbo.TurboJPEG()
        decoders["PyTurboJPEG"] = lambda data: decoder.decode(data, pixel_format=turbo.TJPF_RGBX)
    except (ImportError, RuntimeError) as error:
        print(f"PyTurboJPEG: {error}")
    return decoders


def compare(data: bytes, decode: Decode) -> str:
    """Say how the decoder's pixels compare with Pillow's."""
    expected = _decode_or_none(lambda data: np.asarray(decode_with_pillow(data).convert("RGB")), data)
    found = _decode_or_none(decode, data)
    if expected is None or found is None:
        return "read by neither" if expected is found else "refused" if found is None else "refused by Pillow"
    return "equal" if np.array_equal(expected, found[..., :3]) else "different"


def _decode_or_none(decode: Decode, data: bytes) -> NDArray[np.uint8] | None:
    try:
        pixels: NDArray[np.uint8] = decode(data)
    except Exception:  # each decoder has exceptions of its own
        return None
    return pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    decoders = list_decoders()
    files = [path for folder in args.folders for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    for name, decode in decoders.items():
        print(f"{name}, {len(files)} files: {dict(Counter(compare(path.read_bytes(), decode) for path in files))}")
    print("CPU ms      " + "".join(f"{name:>13}" for name in ("Pillow", *decoders)))
    for width, height in SIZES:
        data = encode_jpeg(draw_photo(width, height))
        times = measure_median_ms(*(partial(decode, data) for decode in (decode_with_pillow, *decoders.values())))
        print(f"{f'{width} x {height}':12}" + "".join(f"{time:13.2f}" for time in times))


if __name__ == "__main__":
    main()
