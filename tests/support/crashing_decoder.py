"""The child process of a plan's sample, in which two pictures crash the decoder."""

from __future__ import annotations

import os
import sys
from typing import Any

from pipelines import preprocess
from pipelines.forecast.sample import main
from pipelines.media.images import DecodedImage, read_image


def read_or_crash(data: bytes, **options: Any) -> DecodedImage:
    image = read_image(data, **options)
    if image.pixels.width in (70, 80):
        os.abort()
    return image


if __name__ == "__main__":
    preprocess.read_image = read_or_crash
    main(*map(int, sys.argv[1:]))
