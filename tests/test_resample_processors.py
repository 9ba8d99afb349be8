"""The C code of the resampler, built for ARM and run by QEMU, and built with sanitizers, equals Pillow in every bit."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pillow_equality import draw_cases, tile_with_pillow
from ovis_model.inputs.tiling import list_crops
from tests.support.resampler_builds import needs_compiler
from tests.support.roots import ROOT

INPUTS = ROOT / "ovis_model" / "inputs"
ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
# As in pyproject.toml.
FLAGS = ("-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")

needs_arm_tools = pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(EMULATOR)),
    reason="no gcc-aarch64-linux-gnu, libc6-dev-arm64-cross or qemu-user on this machine",
)


def build(directory: Path, compiler: str, *flags: str) -> Path:
    program = directory / "resample"
    source = ROOT / "tests" / "support" / "resample_program.c"
    subprocess.run([compiler, *FLAGS, *flags, f"-I{INPUTS}", source, "-o", program, "-lm"], check=True)
    return program


def assert_equals_pillow(command: list[str | Path], count: int) -> None:
    for image, max_tiles, tile_size in draw_cases(count, seed=0):
        crops = list_crops(image, max_tiles, tile_size)
        header = (
            np.array([*image.size, tile_size, len(crops)], np.int32).tobytes() + np.array(crops, np.int32).tobytes()
        )
        finished = subprocess.run(command, input=header + image.tobytes("raw", "RGBX"), capture_output=True)
        assert finished.returncode == 0, finished.stderr
        expected = tile_with_pillow(image, max_tiles, tile_size)
        tiles = np.frombuffer(finished.stdout, np.uint8).reshape(expected.shape)
        assert np.array_equal(tiles, expected), (image.size, max_tiles, tile_size)


@needs_arm_tools
@pytest.mark.parametrize("processor", ["neoverse-n1", "cortex-a57"], ids=["dot products", "without dot products"])
def test_arm_equals_pillow(tmp_path: Path, processor: str) -> None:
    program = build(tmp_path, ARM_COMPILER, "-static")
    assert_equals_pillow([EMULATOR, "-cpu", processor, program], 12)


@needs_arm_tools
def test_the_module_compiles_for_arm(tmp_path: Path) -> None:
    """Python's headers are this machine's: those of the limited API are the same for both."""
    include = f"-I{sysconfig.get_path('include')}"
    module = tmp_path / "_ovis_resample.abi3.so"
    command = [ARM_COMPILER, *FLAGS, "-shared", "-fPIC", include, INPUTS / "resample.c", "-o", module]
    subprocess.run(command, check=True)


@needs_compiler
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    program = build(tmp_path, "cc", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert_equals_pillow([program], 12)
