"""What is frozen stays bitwise as it was, learning rates reach their parts, and updates can be resumed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovis_model.training.export import load_network
from ovis_model.training.lora import (
    TARGETS,
    AdapterError,
    LoraConfig,
    add_adapters,
    list_merged,
    load_adapters,
    remove_adapters,
    save_adapters,
)
from ovis_model.training.model import TrainingModel
from ovis_model.training.optimizer import GradientError, Optimizer, Schedule
from ovis_model.training.parts import (
    PartError,
    choose_trainable,
    draw_visual_table,
    group_parameters,
    list_trainable,
    measure_embeddings,
)
from ovis_model.training.stages import STAGES, Stage
from tests.support.golden_data import checkpoint_dir
from tests.support.training import (
    TINY,
    compute_gradients,
    hash_parameters,
    load_training_model,
    make_batch,
    make_examples,
    measure_difference,
)

UNUSED = "visual_tokenizer.backbone.trunk.post_trunk_norm.weight"


def make_optimizer(model: TrainingModel, learning_rate: float = 1e-3, num_steps: int = 10, **rates: float) -> Optimizer:
    return Optimizer(group_parameters(model.network, learning_rate, rates), Schedule(num_steps=num_steps))


def train(model: TrainingModel, optimizer: Optimizer, num_steps: int = 1) -> list[float]:
    batch, losses = make_batch(model, make_examples()), []
    for _ in range(num_steps):
        loss, count = model.loss_sum(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(count)
        losses.append(float(loss.detach()) / count)
    return losses


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_does_not_train_stays_bitwise_the_same(stage: Stage) -> None:
    model = load_training_model(TINY, STAGES[stage])
    before, trained = hash_parameters(model.network), list_trainable(model.network).keys()
    train(model, make_optimizer(model), 2)
    after = hash_parameters(model.network)
    assert {name for name in before if before[name] != after[name]} == set(trained)
    assert UNUSED not in trained


def test_each_stage_trains_the_parts_of_the_recipe() -> None:
    network = load_network(TINY)
    heads = {"visual_tokenizer.head.0.weight", "visual_tokenizer.head.1.weight", "visual_tokenizer.head.1.bias"}
    last_block = {name for name, _ in network.named_parameters() if ".blocks.1." in name}
    choose_trainable(network, STAGES["1"])
    assert list_trainable(network).keys() == heads | last_block | {"vte.weight"}
    for stage in ("2", "3"):
        choose_trainable(network, STAGES[stage])
        visual = {name for name, _ in network.named_parameters() if not name.startswith("llm.")}
        assert list_trainable(network).keys() == visual - {UNUSED}
    choose_trainable(network, "visual_tokenizer.backbone.layer.0|llm")
    assert {name.split(".")[0] for name in list_trainable(network)} == {"visual_tokenizer", "llm"}


@pytest.mark.parametrize(
    "parts", ["", "vision", "visual_tokenizer.backbone.layer.2", "visual_tokenizer.backbone.layer.x", "lora"]
)
def test_unknown_parts_are_refused(parts: str) -> None:
    with pytest.raises(PartError, match=r"unknown part|nothing to train"):
        choose_trainable(load_network(TINY), parts)


def test_each_part_moves_by_its_own_learning_rate() -> None:
    """The first step of AdamW changes every entry with a gradient by the learning rate."""
    rates = {"llm": 1e-5, "visual_tokenizer": 1e-4, "visual_tokenizer.head": 1e-3}
    model = load_training_model()
    before = {name: x.detach().clone() for name, x in model.network.named_parameters()}
    optimizer = make_optimizer(model, 1e-2, **rates)
    train(model, optimizer)
    expected = {"llm.": 1e-5, "visual_tokenizer.backbone.": 1e-4, "visual_tokenizer.head.": 1e-3, "vte.": 1e-2}
    for name, parameter in list_trainable(model.network).items():
        rate = next(rate for prefix, rate in expected.items() if name.startswith(prefix))
        moved = float((parameter.detach() - before[name]).abs().max())
        assert moved == pytest.approx(rate, rel=0.02), name


def test_a_rate_of_a_part_that_is_not_trained_is_refused() -> None:
    network = load_network(TINY)
    choose_trainable(network, "vte")
    with pytest.raises(PartError, match="'llm' has a learning rate, but nothing of it is trained"):
        group_parameters(network, 1e-3, {"llm": 1e-4})


def test_decay_spares_biases_and_norms() -> None:
    groups = group_parameters(load_training_model().network, 1e-3, weight_decay=0.1)
    decayed = {name for group in groups if group.weight_decay for name in group.parameters}
    assert "llm.model.embed_tokens.weight" in decayed
    assert not any("norm" in name or name.endswith("bias") or ".head.1." in name for name in decayed)


def test_schedules() -> None:
    cosine = Schedule(num_steps=100, warmup_ratio=0.1)
    assert [cosine.compute_factor(step) for step in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert cosine.compute_factor(55) == pytest.approx(0.5)
    assert cosine.compute_factor(99) == pytest.approx((1 + math.cos(math.pi * 89 / 90)) / 2)
    assert Schedule(num_steps=10, decay="linear", min_factor=0.1).compute_factor(5) == pytest.approx(0.55)
    assert Schedule(num_steps=10, decay="constant").compute_factor(9) == 1.0


def test_gradients_are_divided_by_the_ids_and_clipped() -> None:
    model = load_training_model()
    gradients = compute_gradients(model, make_batch(model, make_examples()))
    norm = math.sqrt(sum(float(x.square().sum()) for x in gradients.values()))
    model.zero_grad()
    optimizer = make_optimizer(model)
    loss, count = model.loss_sum(make_batch(model, make_examples()))
    loss.backward()  # type: ignore[no-untyped-call]
    assert optimizer.step(count).gradient_norm == pytest.approx(norm, rel=1e-5)
    moments = optimizer.get_state()
    squares = sum(float((x / 0.1).square().sum()) for name, x in moments.items() if name.endswith("exp_avg"))
    assert math.sqrt(squares) == pytest.approx(min(norm, 1.0), rel=1e-4)


def test_updates_equal_those_of_torchs_optimizer() -> None:
    ours, theirs = load_training_model(), load_training_model()
    batch = make_batch(theirs, make_examples())
    reference = torch.optim.AdamW(list_trainable(theirs.network).values(), lr=1e-3, weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: (1 + math.cos(math.pi * step / 10)) / 2)
    wanted = []
    for _ in range(4):
        loss, count = theirs.loss_sum(batch)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(theirs.network.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
        cosine.step()
        wanted.append(float(loss.detach()) / count)
    assert train(ours, make_optimizer(ours), 4) == pytest.approx(wanted, rel=1e-5)


def test_gradients_that_are_not_finite_change_nothing() -> None:
    model = load_training_model()
    optimizer, before = make_optimizer(model), hash_parameters(model.network)
    (model.loss_sum(make_batch(model, make_examples()))[0] * math.nan).backward()
    with pytest.raises(GradientError, match="step 0 have the norm nan"):
        optimizer.step(5)
    with pytest.raises(ValueError, match="nothing to learn from"):
        optimizer.step(0)
    assert hash_parameters(model.network) == before


def test_a_run_continues_from_its_state_bitwise(tmp_path: Path) -> None:
    whole = load_training_model()
    losses = train(whole, make_optimizer(whole), 6)
    first = load_training_model()
    optimizer = make_optimizer(first)
    begun = train(first, optimizer, 3)
    save_file(optimizer.get_state(), tmp_path / "optimizer.safetensors")
    save_file({name: x.detach() for name, x in list_trainable(first.network).items()}, tmp_path / "weights.safetensors")
    second = load_training_model()
    second.network.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=False)
    resumed = make_optimizer(second)
    resumed.set_state(load_file(tmp_path / "optimizer.safetensors"))
    assert [*begun, *train(second, resumed, 3)] == losses
    assert hash_parameters(second.network) == hash_parameters(whole.network)


def test_the_state_of_other_parameters_is_refused() -> None:
    model, other = load_training_model(), load_training_model(TINY, "vte")
    optimizer = make_optimizer(model)
    train(model, optimizer)
    with pytest.raises(ValueError, match="which is not trained; resume with the parts"):
        make_optimizer(other).set_state(optimizer.get_state())


def test_the_table_is_drawn_from_the_statistics_of_the_language_model() -> None:
    network, again = load_network(TINY), load_network(TINY)
    mean, std = measure_embeddings(network.llm.model.embed_tokens.weight)
    for drawn in (network, again):
        draw_visual_table(drawn, torch.Generator().manual_seed(7))
    found_mean, found_std = measure_embeddings(network.vte.weight)
    count = network.vte.weight.numel()
    assert abs(found_mean - mean) < 3 * std / math.sqrt(count)
    assert abs(found_std - std) < 3 * std / math.sqrt(2 * count)
    assert torch.equal(network.vte.weight, again.vte.weight)


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj"), ("down_proj",), ("gate_proj", "k_proj", "o_proj")])
def test_adapters_begin_as_the_base_and_merge_to_the_same(tmp_path: Path, targets: tuple[str, ...]) -> None:
    directory, config = checkpoint_dir("tiny112-untied"), LoraConfig(rank=4, alpha=8, targets=targets)
    network = load_network(directory)
    examples = make_examples(directory)
    base_model = TrainingModel(network)
    batch = make_batch(base_model, examples)
    with torch.no_grad():
        base = base_model.compute_losses(batch)
    before = hash_parameters(network)
    add_adapters(network, config, torch.Generator().manual_seed(0))
    choose_trainable(network, "lora")
    model = TrainingModel(network)
    assert torch.equal(model.compute_losses(batch), base)
    optimizer = make_optimizer(model, 1e-2)
    for _ in range(3):
        loss, count = model.loss_sum(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(count)
    assert {name: x for name, x in hash_parameters(network).items() if ".adapter." not in name} == before
    with torch.no_grad():
        adapted = model.compute_losses(batch)
        assert float((adapted - base).abs().max()) > 1e-2
        merged = load_network(directory)
        merged.load_state_dict(dict(list_merged(network)))
        torch.testing.assert_close(TrainingModel(merged).compute_losses(batch), adapted, atol=2e-5, rtol=1e-5)
        save_adapters(network, config, tmp_path, "tiny112-untied")
        remove_adapters(network)
        assert torch.equal(model.compute_losses(batch), base)
        add_adapters(network, config)
        load_adapters(network, tmp_path)
        assert torch.equal(model.compute_losses(batch), adapted)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    module = "self_attn" if targets[0] in TARGETS[:4] else "mlp"
    assert f"base_model.model.llm.model.layers.0.{module}.{targets[0]}.lora_A.weight" in names
    assert len(names) == 2 * 2 * len(targets)


def test_adapters_learn_in_bfloat16_with_recomputed_layers() -> None:
    gradients = []
    for options in ({}, {"precision": "bfloat16", "checkpoint_layers": True}):
        network = load_network(TINY)
        add_adapters(network, LoraConfig(rank=4), torch.Generator().manual_seed(0))
        for name, parameter in network.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        choose_trainable(network, "lora")
        model = TrainingModel(network, **options)  # type: ignore[arg-type]
        gradients.append(compute_gradients(model, make_batch(model, make_examples())))
    assert len(gradients[0]) == 2 * 7 * 2
    assert measure_difference(gradients[1], gradients[0]) < 0.2


def test_adapters_of_another_rank_are_refused(tmp_path: Path) -> None:
    network = load_network(TINY)
    add_adapters(network, LoraConfig(rank=2))
    save_adapters(network, LoraConfig(rank=2), tmp_path, "base")
    remove_adapters(network)
    add_adapters(network, LoraConfig(rank=4))
    with pytest.raises(AdapterError, match=r"of the shape \(2, 128\), but the model expects \(4, 128\)"):
        load_adapters(network, tmp_path)
    with pytest.raises(ValueError, match="targets among q_proj"):
        LoraConfig(targets=("lm_head",))
