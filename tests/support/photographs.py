"""Find the photographs in scikit-learn and scikit-image: real cameras and scanners, many modes and formats."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError


@cache
def find_photographs() -> tuple[Path, ...]:
    """Return the image files installed with the two packages; downloads are not included."""
    import skimage
    import sklearn

    roots = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"]
    return tuple(path for root in roots for path in sorted(root.iterdir()) if _is_image(path))


def _is_image(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with Image.open(path):
            return True
    except UnidentifiedImageError:
        return False
