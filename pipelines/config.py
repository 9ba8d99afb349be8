"""The options of a run: one definition for flags, YAML and Python."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from ovis_model.inputs.prompt import CHAIN_OF_THOUGHT
from pipelines import schema
from pipelines.tasks.answer_types import Answered
from pipelines.tasks.task import Task, check_text, columns_of, no_values, read_tasks, values_of

SINGLE_IMAGE_MAX_TILES, MULTI_IMAGE_MAX_TILES, FRAME_MAX_TILES = 9, 4, 1  # the model card's
PIXELS = "pixels"  # the frame encoder that needs no model


class RunConfig(BaseModel):
    """Options of every job. `fingerprint_fields` says which of them decide what the rows hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    input: tuple[str, ...] = Field(
        min_length=1, description="a file, directory, glob or URI of images, tar, Parquet or JSONL; may be repeated"
    )
    output: str = Field(description="a directory or URI")
    model: str = Field(description='a directory, a hub id such as AIDC-AI/Ovis2-1B, a URI, or "demo"')
    revision: str | None = Field(None, description="commit, tag or branch of a hub id")

    image_column: str | None = Field(None, description="column that holds the images; '' for none")
    id_column: str | None = Field(None, description="column of unique ids; default the place in the input")
    keep_columns: tuple[str, ...] = Field((), description="columns C1,C2 to copy into the output")
    on_duplicate_id: Literal["error", "suffix", "skip"] = Field(
        "error", description="what a row is whose id an earlier one has: an error, a row ID~2, or left out"
    )

    system_prompt: str | None = Field(None, description="instead of the model's own")
    max_tiles: PositiveInt | None = Field(
        None,
        description="most cells an image is cut into; default 9 for one image a row, 4 for several, 1 for frames",
    )

    num_frames: PositiveInt = Field(12, description="most frames of a video that the model is shown")
    fps: float | None = Field(None, gt=0, description="at most so many frames, or candidates, a second of video")
    window_s: float | None = Field(None, gt=0, description="cut longer videos into rows of so many seconds")
    frame_selection: Literal["uniform", "top-k", "mdp3"] = Field(
        "uniform", description="evenly spread; or of --num-candidates those that match the question, or that and differ"
    )
    num_candidates: PositiveInt = Field(128, description="evenly spread frames that top-k and mdp3 choose from")
    frame_query: str | None = Field(
        None, description="what chosen frames should match, instead of the row's question; '' for nothing"
    )
    frame_encoder: str = Field(
        "google/siglip-so400m-patch14-384",
        description='a SigLIP, by directory or hub id, that compares frames; or "pixels", which needs no model',
    )

    max_new_tokens: PositiveInt = Field(512, description="longest answer, in tokens")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the most probable tokens of this mass")
    top_k: int = Field(0, ge=0, description="keep this many most probable tokens; 0 keeps all")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1 discourages tokens already generated")
    stop: tuple[str, ...] = Field((), description="end an answer before this text; may be repeated")
    seed: int = Field(0, description="of sampling; a row's sample depends on it and the row's id only")

    num_replicas: PositiveInt | Literal["auto"] = Field("auto", description="copies of the model")
    tensor_parallel: PositiveInt | Literal["auto"] = Field(
        "auto", description="GPUs of one copy of the model; auto is as few as hold it"
    )
    autoscale: bool = Field(False, description="have the cluster start nodes for --num-replicas, and begin meanwhile")
    num_preprocessors: PositiveInt | Literal["auto"] = Field("auto", description="CPU actors that decode and tile")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto is bfloat16 on CUDA and float32 on a CPU"
    )

    rows_per_file: PositiveInt = Field(10_000, description="rows of an output file at most")
    limit: PositiveInt | None = Field(None, description="only the first rows of the input")
    allow_private_addresses: bool = Field(False, description="read http(s) URLs of hosts inside your network too")
    max_error_rate: float = Field(0.1, ge=0, le=1, description="exit 3 when more of the rows are errors")
    stop_error_rate: float = Field(
        0.9, gt=0, le=1, description="stop early when more of the rows so far, at least 500, are errors; 1 never stops"
    )
    overwrite: bool = Field(False, description="remove an earlier run from OUTPUT first")
    retry_errors: bool = Field(False, description="take up the error rows of the run in OUTPUT again")
    extend: bool = Field(False, description="add the rows of INPUT that the run in OUTPUT does not have yet")

    @field_validator("system_prompt", "stop")
    @classmethod
    def _is_unicode(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for text in (value,) if isinstance(value, str) else value or ():
            check_text(text)
        return value

    @model_validator(mode="after")
    def _says_how_many(self) -> RunConfig:
        if self.autoscale and self.num_replicas == "auto":
            raise ValueError("--autoscale needs to know for how many: give --num-replicas N")
        return self

    @model_validator(mode="after")
    def _frames_can_be_chosen(self) -> RunConfig:
        if self.frame_selection == "top-k" and (self.frame_encoder == PIXELS or self.frame_query == ""):
            raise ValueError(
                "top-k chooses the frames that match a text: give a --frame-encoder that reads text and no empty "
                "--frame-query, or use mdp3, which can do without"
            )
        if self.frame_selection != "uniform" and self.num_candidates < self.num_frames:
            raise ValueError(
                f"{self.num_frames} frames cannot be chosen from {self.num_candidates}; raise --num-candidates"
            )
        return self

    @field_validator("keep_columns", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _no_clash(self) -> RunConfig:
        if taken := sorted(set(self.keep_columns).intersection(self.columns.names)):
            raise ValueError(
                f"--keep-columns: the output has columns {', '.join(taken)} of its own; rename yours in the input"
            )
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise ValueError("--keep-columns: name each column once")
        return self

    @model_validator(mode="after")
    def _one_way_to_go_on(self) -> RunConfig:
        if self.overwrite and (self.extend or self.retry_errors):
            raise ValueError("--overwrite leaves nothing to extend or to retry; give one of them")
        if self.extend and self.on_duplicate_id == "suffix":
            raise ValueError("--extend needs ids that do not depend on the order of a listing; suffixes do")
        return self

    def tiles_for(self, num_images: int) -> int:
        """`max_tiles` of each image in a row of `num_images`."""
        return self.max_tiles or (SINGLE_IMAGE_MAX_TILES if num_images <= 1 else MULTI_IMAGE_MAX_TILES)

    @property
    def tiles_for_frames(self) -> int:
        """`max_tiles` of each frame of a video."""
        return self.max_tiles or FRAME_MAX_TILES

    def _defaults(self) -> dict[str, Any]:
        """Of what a task leaves open."""
        return {
            "system": self.system_prompt,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "stop": self.stop,
            "seed": self.seed,
        }

    @property
    def asked(self) -> tuple[Task, ...]:
        """What is asked of every row, with nothing left open."""
        raise NotImplementedError

    @property
    def columns(self) -> pa.Schema:
        """Of the output, without kept columns."""
        raise NotImplementedError

    @property
    def asks_again(self) -> bool:
        """Where an answer is flagged."""
        return False

    @property
    def own_prompts(self) -> str | None:
        """The column of prompts that rows bring along, "" for that of their format; None if they bring none."""
        return None

    @property
    def prompt_is_open(self) -> bool:
        """Nobody said what to ask."""
        return False

    def manifest_prompt(self, prompts: Sequence[str]) -> str:
        """What the manifest holds for a row that is asked these, one for each of `asked`."""
        raise NotImplementedError

    def prompts(self, manifest_prompt: str) -> Sequence[str]:
        """Back again."""
        raise NotImplementedError

    def values(self, answers: Sequence[Answered]) -> dict[str, Any]:
        """The columns of a row that the answers to `asked` decide."""
        raise NotImplementedError

    def no_values(self) -> dict[str, Any]:
        """The same of a row that failed."""
        raise NotImplementedError

    @property
    def provenance(self) -> dict[str, Any]:
        """What run.json tells beside the options."""
        return {}

    def fingerprint_fields(self) -> dict[str, Any]:
        """The options that decide what the rows hold; the others say how the work is done."""
        return self.model_dump(mode="json", exclude=_HOW_NOT_WHAT)


class CaptionConfig(RunConfig):
    """One question, answered in free text."""

    prompt: str = Field(
        "Describe the image.", description="what to ask; {name} stands for a column if the input has columns"
    )
    prompt_column: str | None = Field(None, description="column of questions; a row without one is asked --prompt")
    chain_of_thought: bool = Field(False, description="ask for step-by-step reasoning before the answer")

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, value: str) -> str:
        check_text(value)
        return value

    @property
    def asked(self) -> tuple[Task, ...]:
        return (Task.model_construct(name="", prompt=self.prompt, **self._defaults()),)

    @property
    def columns(self) -> pa.Schema:
        return schema.OUTPUT

    @property
    def own_prompts(self) -> str | None:
        return self.prompt_column or ""

    @property
    def prompt_is_open(self) -> bool:
        return "prompt" not in self.model_fields_set

    def manifest_prompt(self, prompts: Sequence[str]) -> str:
        [prompt] = prompts
        return f"{prompt}\n{CHAIN_OF_THOUGHT}" if self.chain_of_thought else prompt

    def prompts(self, manifest_prompt: str) -> Sequence[str]:
        return (manifest_prompt,)

    def values(self, answers: Sequence[Answered]) -> dict[str, Any]:
        [answer] = answers
        return {
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "mean_logprob": answer.mean_logprob,
            **_counts(answers),
        }

    def no_values(self) -> dict[str, Any]:
        return {"text": "", "finish_reason": "", "mean_logprob": float("nan")}


class AnnotateConfig(RunConfig):
    """Several named questions, each with its own type of answer."""

    tasks: tuple[Task, ...] = Field(description="YAML file of the questions")
    regenerate: Literal["flagged"] | None = Field(
        None, description="answer once more where an answer is flagged, by other sampling; both answers are kept"
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return read_tasks(value) if isinstance(value, str) else value

    @field_validator("tasks")
    @classmethod
    def _is_not_empty(cls, value: tuple[Task, ...]) -> tuple[Task, ...]:  # min_length counts the faultless ones only
        if not value:
            raise ValueError("give at least one")
        return value

    @model_validator(mode="after")
    def _names_are_unique(self) -> AnnotateConfig:
        names = schema.result(self.columns).names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"--tasks: two columns of the output would be called {', '.join(twice)}; rename a task")
        return self

    @property
    def asks_again(self) -> bool:
        return self.regenerate is not None

    @property
    def asked(self) -> tuple[Task, ...]:
        return tuple(task.of_run(**self._defaults()) for task in self.tasks)

    @property
    def provenance(self) -> dict[str, Any]:
        return {"tasks": [task.model_dump(mode="json") for task in self.asked]}

    @property
    def columns(self) -> pa.Schema:
        return pa.schema([*schema.ITEM, *columns_of(self.tasks, with_alternatives=self.asks_again)])

    def manifest_prompt(self, prompts: Sequence[str]) -> str:
        return json.dumps(prompts, ensure_ascii=False)

    def prompts(self, manifest_prompt: str) -> Sequence[str]:
        prompts: list[str] = json.loads(manifest_prompt)
        return prompts

    def values(self, answers: Sequence[Answered]) -> dict[str, Any]:
        return {**values_of(self.tasks, answers), **_counts(answers)}

    def no_values(self) -> dict[str, Any]:
        return no_values(self.tasks)


def _counts(answers: Sequence[Answered]) -> dict[str, int]:
    return {"num_output_tokens": sum(answer.num_tokens for answer in answers)}


_HOW_NOT_WHAT = {
    "output",
    "num_replicas",
    "tensor_parallel",
    "autoscale",
    "num_preprocessors",
    "device",
    "rows_per_file",
    "allow_private_addresses",
    "max_error_rate",
    "stop_error_rate",
    "overwrite",
    "retry_errors",
    "extend",
}


Config = TypeVar("Config", bound=RunConfig)


def parse_command_line(kind: type[Config], prog: str, description: str, argv: Sequence[str]) -> Config:
    """Flags over --config's YAML over defaults. Prints what is wrong and exits with 2 on bad usage."""
    parser = _parser(kind, prog, description)
    flags = vars(parser.parse_args(argv))
    paths, config_file = flags.pop("paths", []), flags.pop("config", None)
    try:
        return kind(**_with_paths(_read_yaml(config_file), flags, paths))
    except ValidationError as error:
        parser.error("; ".join(map(_describe, error.errors())))
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))


def _parser(kind: type[RunConfig], prog: str, description: str) -> argparse.ArgumentParser:
    # Built from the fields by hand: a library that maps flags to them splits list values at commas, and a path or
    # a stop string may hold one.
    parser = argparse.ArgumentParser(
        prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument(
        "paths", nargs="*", metavar="INPUT OUTPUT", help="input and output; or only OUTPUT with --input"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="these options, same names; flags win")
    for name, field in kind.model_fields.items():
        if name != "output":
            parser.add_argument(f"--{name.replace('_', '-')}", **_argument(name, field))
    return parser


def _argument(name: str, field: FieldInfo) -> dict[str, Any]:
    has_default = not field.is_required() and field.default not in (None, ())
    help_text = (field.description or "") + (f" (default {field.default})" if has_default else "")
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "help": help_text}
    is_list = field.annotation == tuple[str, ...] and name != "keep_columns"
    return {"action": "append" if is_list else "store", "help": help_text, "metavar": "X"}


def _with_paths(file: dict[str, Any], flags: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    """All options: flags over the file's; `INPUT OUTPUT`, or `OUTPUT` alone when the inputs are given by name."""
    values = {**file, **flags}
    if isinstance(file.get("input"), str):
        values["input"] = flags.get("input", [file["input"]])
    if len(paths) > 2 or (len(paths) == 1 and not values.get("input")):
        raise ValueError(f"expected INPUT and OUTPUT, got {paths}; give further inputs with --input")
    if len(paths) == 2:
        values["input"] = [paths[0], *flags.get("input", [])]
    return {**values, "output": paths[-1]} if paths else values


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    values = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold options as `name: value` lines")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _describe(error: Any) -> str:
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    first, *others = error["loc"]
    name = "--" + ": ".join([str(first).replace("_", "-"), *map(str, others)])
    if name == "--output":
        return "OUTPUT is missing"
    if name == "--input":
        return "INPUT is missing" if error["type"] in ("missing", "too_short") else f"INPUT: {error['msg']}"
    given = "" if error["type"] == "missing" else f" (got {error['input']!r})"
    return f"{name}: {error['msg']}{given}"
