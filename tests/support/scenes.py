"""Draw small pictures, encode them in any of Pillow's formats, and decode them as the product does."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.media.images import decode_image


def draw_scene(width: int = 37, height: int = 23) -> Image.Image:
    """Draw a smooth picture, which lossy formats reproduce closely, with a different colour at each corner."""
    y, x = np.mgrid[0 : 1 : complex(height), 0 : 1 : complex(width)]
    return Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8))


def encode_image(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decode_pixels(data: bytes) -> NDArray[np.uint8]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)
