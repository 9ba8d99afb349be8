"""What was trained is a checkpoint that the engine loads and that answers as it was taught."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ovis_model.config import OvisConfig
from ovis_model.engine.engine import OvisEngine
from ovis_model.inputs.processor import Processor
from ovis_model.network.weights import WeightsError
from ovis_model.training.examples import TrainingExample
from ovis_model.training.export import export_network, load_network, make_network
from ovis_model.training.lora import LoraConfig, add_adapters
from ovis_model.training.model import TrainingModel
from ovis_model.training.optimizer import Optimizer, Schedule
from ovis_model.training.parts import group_parameters
from ovis_model.types import Request, SamplingParams
from tests.support.engines import generate_ids, make_golden_requests
from tests.support.golden_data import CHECKPOINTS, LAYOUTS, checkpoint_dir
from tests.support.training import TINY, draw_images, load_training_model, make_batch, make_builder, make_examples

FACTS = {"stage": "4", "data": "drawn", "steps": 3}


def load_engine_of(directory: Path) -> OvisEngine:
    return OvisEngine.from_pretrained(str(directory), device="cpu", dtype="float32")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exported_network_answers_as_its_source(tmp_path: Path, checkpoint: str, layout: str) -> None:
    """The source's weights are rounded to bfloat16, as those of the export."""
    source = checkpoint_dir(checkpoint, layout)  # type: ignore[arg-type]
    network = load_network(source)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()
    export_network(network, source, tmp_path, FACTS)
    network.requires_grad_(False)
    exported, params = load_engine_of(tmp_path), SamplingParams(max_new_tokens=8)
    requests = make_golden_requests(checkpoint)[:3]
    assert generate_ids(exported, requests, params) == generate_ids(OvisEngine.from_model(network), requests, params)
    found, wanted = exported.config, OvisConfig.from_directory(source)
    assert (found.vision, found.language, found.eos_token_ids) == (wanted.vision, wanted.language, wanted.eos_token_ids)
    assert found.layout == "aidc" and found.dtype == "bfloat16"
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert "| data | drawn |" in (tmp_path / "README.md").read_text()
    assert Processor.from_pretrained(tmp_path).encode_prompt("Hi") == Processor.from_pretrained(source).encode_prompt(
        "Hi"
    )
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True


def test_large_networks_are_exported_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = load_network(TINY)
    export_network(network, TINY, tmp_path / "whole", FACTS)
    monkeypatch.setattr("ovis_model.training.export._MAX_SHARD_BYTES", 200_000)
    for _ in range(2):  # the second replaces the first
        export_network(network, TINY, tmp_path / "shards", FACTS)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    whole, sharded = load_network(tmp_path / "whole"), load_network(tmp_path / "shards")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))
    monkeypatch.undo()
    export_network(network, TINY, tmp_path / "shards", FACTS)
    assert [path.name for path in (tmp_path / "shards").glob("*.safetensors*")] == ["model.safetensors"]


def test_adapters_are_merged_when_exported(tmp_path: Path) -> None:
    network = load_network(TINY)
    add_adapters(network, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    for name, parameter in network.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    export_network(network, TINY, tmp_path, FACTS)
    base, merged = (dict(network.named_parameters()) for network in (load_network(TINY), load_network(tmp_path)))
    changed = {name for name, x in base.items() if not torch.equal(x.bfloat16().float(), merged[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    export_network(load_network(TINY), TINY, tmp_path, FACTS)
    weights = load_file(tmp_path / "model.safetensors")
    weights["vte.weight"][3, 5] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"NaN or infinite values in vte\.weight"):
        load_network(tmp_path)


def test_a_new_network_depends_on_its_seed_alone() -> None:
    config = OvisConfig.from_directory(TINY)
    torch.manual_seed(5)
    first, state = make_network(config, 1), torch.get_rng_state()
    torch.manual_seed(6)
    second, other = make_network(config, 1), make_network(config, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.vte.weight, other.vte.weight)
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())


def test_a_new_network_finds_all_words_about_as_probable() -> None:
    config = OvisConfig.from_directory(TINY)
    model = TrainingModel(make_network(config, 0))
    loss, count = model.loss_sum(make_batch(model, make_examples()))
    assert float(loss.detach()) / count == pytest.approx(np.log(config.language.vocab_size), abs=1.0)


ROWS = [
    ("What is it?", "A dog.", [(1, 2)]),
    ("What is it?", "A cat on a sofa.", [(1, 1)]),
    ("What is it?", "Two birds!", [(2, 1)]),
    ("How many?", "3", [(1, 1), (1, 1)]),
    ("Say hello.", "Hello!", []),
    ("Name a colour.", "Red, or blue", []),
    ("<image> What moves? <image>", "A ball", [(1, 1), (1, 1)]),
    ("Is it large?", "No", [(1, 1)]),
]


def test_eight_rows_learnt_by_heart_are_answered_with_their_ends(tmp_path: Path) -> None:
    model = load_training_model(TINY, "all")
    builder = make_builder()
    examples = [
        builder.build_dialogue([("user", question), ("assistant", answer)], draw_images(i, *grids))
        for i, (question, answer, grids) in enumerate(ROWS)
    ]
    loss = learn_by_heart(model, examples)
    export_network(model.network, TINY, tmp_path, FACTS)
    completions = load_engine_of(tmp_path).generate(
        [make_request(x) for x in examples], SamplingParams(max_new_tokens=30)
    )
    processor = Processor.from_pretrained(tmp_path)
    assert [processor.detokenize(completion.output_ids) for completion in completions] == [row[1] for row in ROWS]
    assert all(completion.finish_reason == "stop" for completion in completions)
    assert loss < 0.01


def learn_by_heart(model: TrainingModel, examples: list[TrainingExample], num_steps: int = 180) -> float:
    optimizer = Optimizer(group_parameters(model.network, 3e-3), Schedule(num_steps=num_steps, warmup_ratio=0.05))
    batch = make_batch(model, examples)
    for _ in range(num_steps):
        loss, count = model.loss_sum(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(count)
    return float(loss.detach()) / count


def make_request(example: TrainingExample) -> Request:
    prompt = example.input_ids[: int(np.flatnonzero(example.labels != -100)[0])]
    return Request(prompt, example.tiles, example.tile_sizes)
