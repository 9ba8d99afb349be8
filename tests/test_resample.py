"""The compiled resampler equals Pillow in every bit; where it is missing or differs, Pillow resizes, and says so."""

from __future__ import annotations

import logging
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from benchmarks import pillow_equality
from benchmarks.pillow_equality import draw_cases, draw_random, is_equal, tile_with_pillow
from ovis_model.inputs import resample
from ovis_model.inputs.tiling import list_crops, tile_image
from tests.support.golden_data import CHECKPOINTS, draw_picture, load_expected
from tests.support.photographs import find_photographs
from tests.support.resampler_builds import NAME, build_resampler, load_build, needs_compiler
from tests.support.roots import ROOT


def remove_x86_code(source: str) -> str:
    return source.replace("#define HAS_X86", "")


def remove_vnni(source: str) -> str:
    return source.replace("if (has_vnni())", "if (0)")


@pytest.fixture(
    scope="module", params=[str, remove_vnni, remove_x86_code], ids=["this processor", "without VNNI", "any processor"]
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    finished, files = build_resampler(tmp_path_factory.mktemp("build"), request.param)
    assert len(files) == 1, finished.stderr
    return load_build(files[0])


@pytest.fixture
def compiled(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Install the build of this checkout in this process."""
    install(built, monkeypatch)
    assert resample.load_resampler() is built
    yield built
    resample.load_resampler.cache_clear()


def install(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NAME, build)
    resample.load_resampler.cache_clear()


def assert_equal_to_pillow(images: int, seed: int) -> None:
    for i, (image, max_tiles, tile_size) in enumerate(draw_cases(images, seed)):
        assert is_equal(image, max_tiles, tile_size), f"{i}: {image.size}, {max_tiles=}, {tile_size=}"


@needs_compiler
def test_random_images_equal_pillows(compiled: ModuleType) -> None:
    assert_equal_to_pillow(150, seed=0)


@needs_compiler
@pytest.mark.slow
def test_thousands_of_random_images_equal_pillows(compiled: ModuleType) -> None:
    assert_equal_to_pillow(2000, seed=1)


@needs_compiler
def test_the_command_that_compares_folders_finds_a_difference(
    compiled: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_random(np.random.default_rng(0)).save(tmp_path / "noise.png")
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.setattr(sys, "argv", ["pillow_equality", "--sizes", "2", str(tmp_path)])
    assert pillow_equality.main() == 0
    assert "'not decoded': 1" in capsys.readouterr().out
    monkeypatch.setattr(pillow_equality, "tile_with_pillow", lambda *_: np.zeros(1))
    assert pillow_equality.main() == 1
    assert "noise.png" in capsys.readouterr().out


@needs_compiler
def test_photographs_equal_pillows(compiled: ModuleType) -> None:
    assert len(find_photographs()) >= 20
    for path in find_photographs():
        with Image.open(path) as file:
            image = file.convert("RGB")
        assert is_equal(image), path.name


@needs_compiler
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_golden_pictures_equal_pillows(compiled: ModuleType, checkpoint: str) -> None:
    """Pillow's tiles of these pictures equal the original's: see test_tiling.py."""
    data = load_expected(checkpoint)
    for case in data["preprocessing"]:
        assert is_equal(draw_picture(case).convert("RGB"), case["max_partition"], data["image_size"]), case


@needs_compiler
def test_an_image_in_pieces_equals_pillows(compiled: ModuleType) -> None:
    """Pillow keeps more than 16 MB in several pieces, from each of which some rows are taken at a time."""
    image = draw_random(np.random.default_rng(0)).resize((2501, 1801))
    with pytest.raises(ValueError, match="blocks"):
        image.__arrow_c_array__()
    assert is_equal(image)


@needs_compiler
@pytest.mark.parametrize("rows", [32, 64, 224, 256])
def test_strips_may_be_bytes_of_several_heights(compiled: ModuleType, rows: int) -> None:
    image = draw_random(np.random.default_rng(0)).resize((333, 250))
    crops = list_crops(image, 9, 56)
    tops = range(0, image.height, rows)
    strips = [image.crop((0, top, 333, min(top + rows, 250))).tobytes("raw", "RGBX") for top in tops]
    tiles = np.zeros((len(crops), 3, 56, 56), np.uint8)
    compiled.resize_crops(strips, *image.size, crops, tiles, 56)
    assert np.array_equal(tiles, tile_with_pillow(image, 9, 56))


@needs_compiler
def test_images_beyond_the_compiled_limit_are_resized_by_pillow(compiled: ModuleType) -> None:
    width = compiled.MAX_SIDE_PX + 1
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, width, 3), np.uint8))
    assert is_equal(image, 2, 56)
    with pytest.raises(ValueError, match=str(width)):
        call(compiled, width=width, height=1)


def call(
    compiled: ModuleType,
    box: tuple[int, ...] = (0, 0, 6, 4, 8, 5),
    strip: object = bytes(96),
    *,
    width: int = 6,
    height: int = 4,
    tile_size: int = 8,
    tiles_bytes: int = 192,
) -> bytes:
    tiles = bytearray(b"\xff" * tiles_bytes)
    compiled.resize_crops([strip], width, height, [box], tiles, tile_size)
    return bytes(tiles)


@needs_compiler
def test_only_the_crops_are_written(built: ModuleType) -> None:
    for plane in np.frombuffer(call(built), np.uint8).reshape(3, 8, 8):
        assert (plane[1:6] == 0).all()
        assert (plane[[0, 6, 7]] == 255).all()


@needs_compiler
@pytest.mark.parametrize(
    "box",
    [
        (-1, 0, 6, 4, 8, 8),
        (0, -1, 6, 4, 8, 8),
        (0, 0, 7, 4, 8, 8),
        (0, 0, 6, 5, 8, 8),
        (3, 0, 3, 4, 8, 8),
        (0, 4, 6, 3, 8, 8),
        (0, 0, 6, 4, 9, 8),
        (0, 0, 6, 4, 8, 9),
        (0, 0, 6, 4, 0, 8),
        (0, 0, 6, 4, 8, -(2**31)),
        (-(2**31), 0, 2**31 - 1, 4, 8, 8),
    ],
)
def test_a_box_outside_its_image_or_tile_is_refused(built: ModuleType, box: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="crop 0 is empty, or outside an image of 6 x 4 px or a tile of 8 px"):
        call(built, box)


@needs_compiler
@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0},
        {"height": -1},
        {"height": 5},
        {"height": 3},
        {"width": 5},
        {"tile_size": 0},
        {"tile_size": 9},
        {"tile_size": 2**31 - 1},
        {"tiles_bytes": 191},
        {"tiles_bytes": 384},
        {"strip": bytes(95)},
        {"strip": bytes(72)},
        {"strip": b""},
        {"strip": bytes(120)},
        {"strip": Image.new("RGB", (6, 5)).__arrow_c_array__()[1]},
        {"strip": Image.new("L", (6, 4)).__arrow_c_array__()[1]},
        {"strip": Image.new("RGB", (6, 4)).__arrow_c_array__()[0]},
    ],
)
def test_pixels_and_tiles_of_another_size_are_refused(built: ModuleType, wrong: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match=r"sides must be|do not fill|not whole rows|strips end|crop 0|not of pixels|incorrect name"
    ):
        call(built, **wrong)  # type: ignore[arg-type]


@needs_compiler
def test_wrong_types_are_refused(built: ModuleType) -> None:
    for arguments in (
        {"box": (0, 0, 6, 4, 8)},
        {"box": [0, 0, 6, 4, 8, 8]},
        {"strip": "ab"},
        {"strip": (bytes(24),) * 3},
    ):
        with pytest.raises(TypeError):
            call(built, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        built.resize_crops(None, 6, 4, [(0, 0, 6, 4, 8, 8)], bytearray(192), 8)


@needs_compiler
def test_threads_and_a_forked_process_give_the_same_tiles(compiled: ModuleType) -> None:
    images = [draw_random(np.random.default_rng(seed)) for seed in range(12)]
    expected = [digest(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(digest, images)) == expected
    with multiprocessing.get_context("fork").Pool(1) as processes:
        assert processes.map(digest, images) == expected


def digest(image: Image.Image) -> int:
    return hash(tile_image(image, 9, 112)[0].tobytes())


@needs_compiler
@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("PRECISION_BITS 22", "PRECISION_BITS 21", "differs from Pillow"),
        ('"OiiO!w*i"', '"OiiO!w*ii"', "is of another version"),
    ],
)
def test_a_build_that_is_unusable_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, old: str, new: str, reason: str
) -> None:
    _, files = build_resampler(tmp_path, lambda source: source.replace(old, new))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        install(load_build(files[0]), patch)
        assert resample.load_resampler() is resample.load_resampler() is None
    resample.load_resampler.cache_clear()
    [record] = caplog.records
    assert reason in record.getMessage()


def test_a_build_of_another_system_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"{NAME}.abi3.so").write_bytes(b"of another system")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.syspath_prepend(str(tmp_path))
        patch.delitem(sys.modules, NAME, raising=False)
        resample.load_resampler.cache_clear()
        assert resample.load_resampler() is None
    resample.load_resampler.cache_clear()
    [record] = caplog.records
    assert "cannot be loaded" in record.getMessage()


def test_without_a_compiler_the_package_is_built_without_the_resampler(tmp_path: Path) -> None:
    finished, files = build_resampler(tmp_path, CC=str(tmp_path / "no-compiler"))
    assert (finished.returncode, files) == (0, []), finished.stderr


def test_without_the_resampler_pillow_resizes_and_one_line_says_so() -> None:
    program = (
        "import logging, sys, numpy\n"
        f"sys.modules[{NAME!r}] = None\n"
        "logging.basicConfig(format='%(message)s')\n"
        "from PIL import Image\n"
        "from ovis_model.inputs.tiling import tile_image\n"
        "image = Image.fromarray(numpy.arange(7500, dtype=numpy.uint8).reshape(50, 50, 3))\n"
        "print(tile_image(image, 4, 28)[0].sum(), tile_image(image, 4, 28)[0].sum())\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    image = Image.fromarray(np.arange(7500, dtype=np.uint8).reshape(50, 50, 3))
    assert finished.stdout.split() == [str(tile_with_pillow(image, 4, 28).sum())] * 2
    [line] = finished.stderr.splitlines()
    assert "Pillow resizes the images" in line and "install a C compiler" in line
