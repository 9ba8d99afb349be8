"""Damaged images are kept in part as a browser shows them, on request; transparent ones get a background."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile
from pydantic import ValidationError

from pipelines.errors import MediaError
from pipelines.media.images import read_image
from tests.support import browser
from tests.support.job_configs import make_job_config
from tests.support.scenes import draw_scene, encode_image
from tests.support.stages import prepare_rows

WHITE = (255, 255, 255)


def draw_noise(width: int = 96, height: int = 128) -> Image.Image:
    """Draw a scene with noise, so that its file is long and each line needs its own bytes."""
    noise = np.random.default_rng(0).integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.asarray(draw_scene(width, height)) + noise).clip(0, 255).astype(np.uint8))


def read_pixels(data: bytes, **options: Any) -> NDArray[np.uint8]:
    return np.asarray(read_image(data, **options).pixels)


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
@pytest.mark.parametrize(
    ("format", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("BMP", {}), ("PPM", {}), ("TIFF", {})]
)
def test_the_lines_before_the_damage_are_kept(format: str, options: dict[str, Any], share: float) -> None:
    whole = encode_image(draw_noise(), format, **options)
    cut = whole[: int(share * len(whole))]
    if format != "TIFF":  # its directory is at the end
        partial = read_image(cut, keep_partial=True)
        pixels, wanted = np.asarray(partial.pixels), read_pixels(whole)
        is_kept = (pixels == wanted).all(axis=(1, 2))
        num_kept = int(is_kept.sum())
        assert max(0.05, 0.4 * share) < num_kept / len(wanted) <= share + 0.02
        assert is_kept[:num_kept].all() or (format == "BMP" and is_kept[-num_kept:].all())
        assert (pixels[np.roll(~is_kept, 9) & ~is_kept] == 255).all()
        assert partial.warning.startswith("partial image, ") and "truncated" in partial.warning
    with pytest.raises(MediaError):
        read_image(cut)


def test_the_passes_of_a_progressive_jpeg_cover_the_whole_image() -> None:
    scene = draw_scene(96, 128)
    whole = encode_image(scene, "JPEG", progressive=True, quality=95)
    for end in range(len(whole) // 2, len(whole), 9):
        pixels = read_pixels(whole[:end], keep_partial=True)
        assert np.abs(pixels.astype(int) - np.asarray(scene)).mean() < 8


def test_a_png_with_a_damaged_end_is_kept() -> None:
    whole = encode_image(draw_noise())
    partial = read_image(whole[:-12] + b"\0\0\x76NIDAT", keep_partial=True)
    assert (np.asarray(partial.pixels) == np.asarray(draw_noise())).all()
    assert partial.warning.startswith("partial image, 100% of its pixels: truncated PNG")


def test_whole_images_have_no_warning_and_equal_pixels() -> None:
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"):
        data = encode_image(draw_scene(), format)
        kept = read_image(data, keep_partial=True)
        assert kept.warning == "" and (np.asarray(kept.pixels) == read_pixels(data)).all()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "JPEG2000"])
def test_an_image_of_which_nothing_can_be_shown_stays_an_error(format: str) -> None:
    whole = encode_image(draw_noise(), format, **({"compression": "jpeg"} if format == "TIFF" else {}))
    for end in (10, 60, 100):
        with pytest.raises(MediaError) as plain:
            read_image(whole[:end])
        with pytest.raises(MediaError) as kept:
            read_image(whole[:end], keep_partial=True)
        assert str(kept.value) == str(plain.value)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_missing_part_has_the_colour_of_the_background() -> None:
    whole = encode_image(draw_noise())
    pixels = read_pixels(whole[: len(whole) // 2], keep_partial=True, background=(1, 2, 3))
    assert (pixels[-20:] == (1, 2, 3)).all()


def draw_transparent() -> Image.Image:
    image = draw_scene().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 37, dtype=np.uint8), (23, 1))))
    return image


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("background", [WHITE, (0, 0, 0), (12, 200, 99)])
def test_transparent_pixels_are_drawn_over_the_background(format: str, background: tuple[int, int, int]) -> None:
    image = draw_transparent()
    data = encode_image(image, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    pixels, alpha = np.asarray(image)[..., :3].astype(float), np.asarray(image)[..., 3:] / 255
    wanted = pixels * alpha + np.array(background) * (1 - alpha)
    assert np.abs(read_pixels(data, background=background) - wanted).max() <= 1
    assert (read_pixels(data) == pixels).all()  # as the original


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_colour_is_replaced_by_the_background(mode: str) -> None:
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    image.putpixel((3, 3), {"RGB": (0, 0, 0)}.get(mode, 0))
    transparent = image.getpixel((3, 3))
    data = encode_image(image, "PNG", transparency=transparent)
    pixels = read_pixels(data, background=(10, 20, 30))
    assert pixels[3, 3].tolist() == [10, 20, 30] and pixels[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("text", ["#fff", "#FFFFFF", "white", "255,255,255", "255, 255, 255"])
def test_a_colour_has_many_spellings_and_one_value(text: str) -> None:
    config = make_job_config(["in"], "out", background=text)
    assert config.background == "#ffffff" and config.background_colour == WHITE


@pytest.mark.parametrize("text", ["", "whit", "1,2", "256,0,0", "#12", "-1,2,3"])
def test_what_is_no_colour_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="is not a colour"):
        make_job_config(["in"], "out", background=text)


def test_a_run_keeps_partial_images_with_a_warning(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    whole = encode_image(draw_noise())
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "whole.png").write_bytes(whole)
    cut, good = prepare_rows(make_job_config([pictures], tmp_path / "out", partial_images="keep"))
    assert cut.stage == good.stage == good.warning == ""
    assert cut.warning.startswith("partial image, 5") and cut.requests
    assert [row.stage for row in prepare_rows(make_job_config([pictures], tmp_path / "out2"))] == ["decode", ""]


DRAW = """
const [source, done] = arguments;
const image = new Image();
image.onload = image.onerror = () => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  done([canvas.height, canvas.width, Array.from(pixels).join(" ")]);
};
image.src = source;
"""


def show_in_browser(driver: Any, data: bytes, kind: str) -> NDArray[np.uint8]:
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    height, width, pixels = driver.execute_async_script(DRAW, source)
    return np.array(pixels.split(), np.uint8).reshape(height, width, 4)[..., :3]


def interlace(image: Image.Image) -> bytes:
    """Encode as an interlaced PNG, which Pillow cannot write; ffmpeg does, through PyAV."""
    import av

    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = *image.size, "rgb24", 1  # type: ignore[assignment, attr-defined]
    codec.flags |= 0x20000000  # interlaced
    return b"".join(bytes(packet) for packet in codec.encode(av.VideoFrame.from_image(image)))  # type: ignore[attr-defined]


@pytest.mark.skipif(bool(browser.describe_missing()), reason=browser.describe_missing() or "there is one")
@pytest.mark.parametrize("kind", ["PNG", "interlaced", "JPEG", "transparent"])
@pytest.mark.parametrize("share", [0.4, 0.7, 1])
def test_an_image_is_shown_as_in_a_browser(driver: Any, kind: str, share: float) -> None:
    image = {"transparent": draw_transparent()}.get(kind, draw_noise())
    whole = interlace(image) if kind == "interlaced" else encode_image(image, "JPEG" if kind == "JPEG" else "PNG")
    data = whole[: int(share * len(whole))]
    seen = show_in_browser(driver, data, "jpeg" if kind == "JPEG" else "png")
    ours = read_pixels(data, keep_partial=True, background=WHITE)
    assert np.abs(seen.astype(int) - ours).max() <= (4 if kind == "JPEG" else 1)
