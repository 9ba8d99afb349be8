"""Check before the run starts that the model exists and that the tasks fit it."""

from __future__ import annotations

import sys
from typing import TypeVar

from ovis_model.checkpoint import describe_checkpoint, resolve_local_path
from ovis_model.engine.vllm_engine.versions import check_vllm
from ovis_model.grammar.guides import check
from ovis_model.grammar.json_schema import find_ignored
from ovis_model.inputs.processor import Processor
from ovis_model.inputs.prompt import remove_marks
from ovis_model.sizing import check_tensor_parallel
from ovis_model.weight_files import check_weight_files
from pipelines.config import RunConfig
from pipelines.media.frame_encoder import describe_encoder
from pipelines.tasks.answer_types import Record
from pipelines.tasks.task import Task

Config = TypeVar("Config", bound=RunConfig)


def resolve_model_paths(config: Config) -> Config:
    """Return the configuration with its model paths made absolute, so that every node can open them."""
    paths = {"model": resolve_local_path(config.model), "frame_encoder": resolve_local_path(config.frame_encoder)}
    return config.model_copy(update=paths)


def check_model(config: RunConfig) -> None:
    """Check the model and the options as far as possible without loading weights. Raise ValueError."""
    if config.engine == "vllm":
        check_vllm()
    check_weight_files(config.model, config.revision)
    processor = Processor.from_pretrained(config.model, config.revision)
    if config.tensor_parallel != "auto":
        check_tensor_parallel(processor.config.language, config.tensor_parallel)
    for task in config.questionnaire.tasks:
        _check_task(task, processor)


def describe_models(config: RunConfig) -> dict[str, str | None]:
    """Return the ids, revisions and hashes that identify the model and the frame encoder. Raise ValueError."""
    return {**describe_checkpoint(config.model, config.revision), **describe_encoder(config)}


def _check_task(task: Task, processor: Processor) -> None:
    label, params = task.place_label, task.make_sampling_params("", processor.encode_answer)
    for option in task.answer.options:
        if (read := processor.detokenize(processor.encode_answer(option))) != option:
            raise ValueError(f"{label}the model's tokenizer reads the choice {option!a} as {read!a}; write it so")
    if params.constraint is not None:
        try:
            check(params.constraint)
        except ValueError as error:
            raise ValueError(f"{label}{error}") from error
    if isinstance(task.answer, Record) and (words := find_ignored(task.answer.schema)):
        print(
            f"{label}ignored in the schema, as they say nothing about answers: {', '.join(words)}",
            file=sys.stderr,
        )
    room = processor.config.max_length - len(
        processor.encode_prompt(remove_marks(task.prompt), system_prompt=task.system)
    )
    longest = max(params.choices, key=len, default=())
    if len(longest) >= room:
        raise ValueError(
            f"{label}a prompt of {processor.config.max_length - room} tokens and a choice of {len(longest)} leave "
            f"no room for an image in the model's context of {processor.config.max_length} tokens; shorten them"
        )
    if params.max_new_tokens >= processor.config.max_length:
        raise ValueError(
            f"{label}--max-new-tokens {params.max_new_tokens} leaves no room for a prompt in the model's context "
            f"of {processor.config.max_length} tokens; lower it"
        )
