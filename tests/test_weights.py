"""Loading weights: both layouts fill the same model, shards and casts work, every faulty tensor is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ovis_model.config import Layout
from ovis_model.network.weights import WeightsError, load_model
from tests.support.golden_data import CHECKPOINTS, checkpoint_dir
from tests.support.roots import ROOT

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


def test_both_layouts_fill_the_same_model() -> None:
    for checkpoint in CHECKPOINTS:
        aidc, native = (
            load_model(checkpoint_dir(checkpoint, layout), device=CPU, dtype=torch.float32).state_dict()
            for layout in ("aidc", "native")
        )
        assert aidc.keys() == native.keys()
        assert all(torch.equal(aidc[name], native[name]) for name in aidc)


def test_loading_does_not_import_the_compiler_of_torch() -> None:
    """Its import takes as long as torch's own; that of sympy, which symbolic shapes need, a fifth of it."""
    program = (
        "import sys\n"
        "from ovis_model.engine.engine import OvisEngine\n"
        f"OvisEngine.from_pretrained({str(checkpoint_dir('tiny56-tied'))!r}, device='cpu')\n"
        "assert 'torch' in sys.modules and not {'torch._dynamo', 'sympy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_parameters_have_the_checkpoints_names() -> None:
    directory = checkpoint_dir("tiny112-untied", "aidc")
    stored = load_file(directory / "model.safetensors")
    model = load_model(directory, device=CPU, dtype=torch.float32)
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_bfloat16_is_the_rounded_float32() -> None:
    directory = checkpoint_dir("tiny56-tied", "native")
    exact = load_model(directory, device=CPU, dtype=torch.float32).state_dict()
    rounded = load_model(directory, device=CPU, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_shards_are_loaded_by_their_index(tmp_path: Path) -> None:
    directory = _copy_with(tmp_path, "aidc", lambda tensors: None)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = load_model(directory, device=CPU, dtype=torch.float32)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tied_checkpoint_may_also_store_its_head(tmp_path: Path) -> None:
    def add_head(tensors: Tensors) -> None:
        tensors["llm.lm_head.weight"] = tensors["llm.model.embed_tokens.weight"].clone()

    load_model(_copy_with(tmp_path, "aidc", add_head), device=CPU, dtype=torch.float32)


AIDC_QKV = "visual_tokenizer.backbone.trunk.blocks.1.attn.qkv.weight"
NATIVE_K = "model.vision_tower.transformer.encoder.layers.1.attention.k_proj.weight"


@pytest.mark.parametrize(("layout", "name"), [("aidc", AIDC_QKV), ("native", NATIVE_K)])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_a_fault_names_the_tensor(tmp_path: Path, layout: Layout, name: str, fault: str) -> None:
    def spoil(tensors: Tensors) -> None:
        if fault == "missing":
            del tensors[name]
        elif fault == "unexpected":
            tensors[name.replace(".1.", ".7.")] = torch.zeros(2)
        else:
            tensors[name] = tensors[name][1:].clone()

    named = name.replace(".1.", ".7.") if fault == "unexpected" else name
    with pytest.raises(WeightsError, match=f"{fault}: {named}"):
        load_model(_copy_with(tmp_path, layout, spoil), device=CPU, dtype=torch.float32)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    directory = _copy_with(tmp_path, "aidc", lambda tensors: None)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"no \.safetensors"):
        load_model(directory, device=CPU, dtype=torch.float32)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    directory = _copy_with(tmp_path, "aidc", lambda tensors: None)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load_model(directory, device=CPU, dtype=torch.float32)


def _copy_with(tmp_path: Path, layout: Layout, change: Callable[[Tensors], None]) -> Path:
    directory = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_dir("tiny56-tied", layout), directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    # Unlinked first: the loaded tensors may still map the old file.
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors")
    return directory
