"""Options of a run in sections, one for each stage; the configuration of a job is all sections, flat.

A function takes only the section that it needs: a configuration is an instance of each section. An option either
decides what the rows hold, and is then part of the fingerprint, or only how the run is executed (`decides_rows=False`).
An option that decides rows and is added after version 0.1 names its version: `since="0.2"`.

The command line, `--help` and docs/options.md are made from these fields: type, bounds, default and description.
`unset` says what a default of None or () means. Text in `Annotated` names the value, as in `--id-column COLUMN`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

import pyarrow as pa
from PIL import ImageColor
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from ovis_model.config import EngineName, Quantization
from ovis_model.inputs.prompt import CHAIN_OF_THOUGHT
from pipelines import schema
from pipelines.storage import store
from pipelines.tasks.questionnaire import FlatLayout, Questionnaire, TaskLayout
from pipelines.tasks.task import Task, check_texts, list_places, read_tasks

SINGLE_IMAGE_MAX_TILES, MULTI_IMAGE_MAX_TILES, FRAME_MAX_TILES = 9, 4, 1  # the model card's
PIXELS = "pixels"  # the frame encoder that needs no model

GroupBy = Literal["basename", "file"]
Column = Annotated[str, "COLUMN"]
Location = Annotated[str, "PATH"]


def declare_option(
    default: Any, *, description: str, unset: str = "", decides_rows: bool = True, since: str = "", **bounds: Any
) -> Any:
    """Declare a field that users can set. `unset` describes a default of None or ()."""
    extra: dict[str, Any] = {"unset": unset, "decides_rows": decides_rows, "since": since}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


def _declare_execution(default: Any, *, description: str, **bounds: Any) -> Any:
    """Declare an option that changes only how the run is executed, never what a row holds."""
    return declare_option(default, description=description, decides_rows=False, **bounds)


def split_at_commas(value: Any) -> Any:
    """Split a text as flags have it into values; return anything else unchanged."""
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


def wrap_one(value: Any) -> Any:
    """Wrap a text that stands for a list of one; return anything else unchanged."""
    return (value,) if isinstance(value, str) else value


class Section(BaseModel):
    """A group of options. Unknown options are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    title: ClassVar[str]


class SourceOptions(Section):
    """Which rows there are. Applied while INPUT is listed."""

    title = "input"

    input: tuple[Location, ...] = Field(
        min_length=1, description="file, directory, glob or URI of images, videos, tar, Parquet, Arrow or JSON lines"
    )
    image_column: Column | None = declare_option(
        None, description="column that holds the images; '' if rows have none", unset="guessed from names and types"
    )
    id_column: Column | None = declare_option(
        None, description="column of unique ids", unset="the row's URI, with its place in a file of many rows"
    )
    keep_columns: Annotated[tuple[str, ...], "COLUMN,..."] = declare_option(
        (), description="columns to copy into the output", unset="none"
    )
    on_duplicate_id: Literal["error", "suffix", "skip"] = declare_option(
        "error", description="if an id occurs again: refuse the input, rename the row to ID~2, or skip the row"
    )
    subtitle_column: Column | None = declare_option(
        None, since="0.2", description="column of SRT or WebVTT for {subtitles}", unset="the video's own text track"
    )
    group_by: GroupBy = declare_option(
        "basename",
        since="0.2",
        description="rows of a tar: one per name up to its first dot, as in WebDataset, or one per image file",
    )
    split: Literal["shots"] | None = declare_option(
        None, since="0.2", description="cut videos at their shots, one row each", unset="videos are not cut at shots"
    )
    min_shot_s: float = declare_option(
        0.6, since="0.2", ge=0, description="join shots of fewer seconds to their neighbours, with --split shots"
    )
    window_s: float | None = declare_option(
        None,
        gt=0,
        description="cut longer videos, or longer shots, into windows of this many seconds, one row each",
        unset="no windows",
    )
    limit: PositiveInt | None = declare_option(
        None, description="use only the first N rows of the input", unset="all rows"
    )
    shard: Annotated[str, "I/N"] | None = declare_option(
        None,
        since="0.2",
        pattern=r"^[1-9][0-9]{0,4}/[1-9][0-9]{0,4}$",
        description="do part I of N of the rows, next to drivers that do the others, each in a directory of OUTPUT",
        unset="all rows",
    )
    allow_private_addresses: bool = _declare_execution(
        False, description="also read http(s) URLs of hosts inside your own network"
    )

    @property
    def shard_numbers(self) -> tuple[int, int]:
        """The numbers I, from 1, and N of --shard; 1 of 1 without it."""
        index, _, count = (self.shard or "1/1").partition("/")
        return int(index), int(count)

    @property
    def cuts_videos(self) -> bool:
        """Whether videos are cut into several rows."""
        return self.split is not None or self.window_s is not None

    @field_validator("shard")
    @classmethod
    def _check_shard(cls, value: str | None) -> str | None:
        if value is not None and int(value.partition("/")[0]) > int(value.partition("/")[2]):
            raise ValueError(f"{value} has no such part; I is from 1 to N")
        return value

    _split_columns = field_validator("keep_columns", mode="before")(split_at_commas)

    @field_validator("keep_columns")
    @classmethod
    def _check_unique(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a column twice")
        return value


class ModelOptions(Section):
    """Which model answers."""

    title = "model"

    model: Annotated[str, "MODEL"] = Field(
        description='Hugging Face id such as AIDC-AI/Ovis2-1B, directory, URI, or "demo" for the bundled model'
    )
    revision: Annotated[str, "REVISION"] | None = declare_option(
        None, description="commit, tag or branch of the Hugging Face id", unset="the main branch"
    )


class ImageOptions(Section):
    """How the model sees images and the frames of videos."""

    title = "images and video"

    max_tiles: PositiveInt | None = declare_option(
        None,
        description="maximum number of tiles per image; fewer are faster, more show finer print",
        unset="9 for one image per row, 4 for several, 1 per video frame",
    )
    partial_images: Literal["error", "keep"] = declare_option(
        "error",
        since="0.2",
        description="truncated or damaged images: error rows, or the part that can be decoded, with a warning",
    )
    background: Annotated[str, "RGB"] | None = declare_option(
        None,
        since="0.2",
        description="colour behind transparent images: #rrggbb, three numbers such as 255,255,255, or a name",
        unset="the colour that the transparent pixels have, as in the original",
    )
    fast_decode: bool = declare_option(
        False,
        since="0.2",
        description="decode JPEG images much larger than their tiles at a fraction of their size; not exact",
    )
    num_frames: PositiveInt = declare_option(12, description="maximum number of frames per video")
    fps: float | None = declare_option(
        None, gt=0, description="maximum number of frames, or candidates, per second of video", unset="no limit"
    )
    frames_as_card: bool = declare_option(
        False,
        description="repeat a frame that is shown at several of the chosen times, as the model card does",
        since="0.2",
    )
    on_truncated: Literal["error", "take"] = declare_option(
        "error", description="truncated videos: error rows, or frames of the part that is readable", since="0.2"
    )
    frame_selection: Literal["uniform", "top-k", "mdp3"] = declare_option(
        "uniform",
        description="frames of a video: evenly spread; those that match the question best; or that match it and differ",
    )
    num_candidates: PositiveInt = declare_option(
        128, description="number of evenly spread frames that top-k and mdp3 choose from"
    )
    frame_query: str | None = declare_option(
        None, description="text that the chosen frames should match; '' for no text", unset="the row's question"
    )
    frame_encoder: Annotated[str, "MODEL"] = declare_option(
        "google/siglip-so400m-patch14-384",
        description='SigLIP that compares frames: directory or Hugging Face id; "pixels" compares without a model',
    )

    @field_validator("background")
    @classmethod
    def _read_colour(cls, value: str | None) -> str | None:
        return None if value is None else "#{:02x}{:02x}{:02x}".format(*_parse_colour(value))

    @property
    def background_colour(self) -> tuple[int, int, int] | None:
        """The colour to draw transparent images over."""
        return None if self.background is None else _parse_colour(self.background)

    @model_validator(mode="after")
    def _check_frames_can_be_chosen(self) -> Self:
        if self.frame_selection == "top-k" and (self.frame_encoder == PIXELS or self.frame_query == ""):
            raise ValueError(
                "--frame-selection top-k matches frames with a text: use a SigLIP as --frame-encoder and a non-empty "
                "--frame-query, or choose mdp3, which works without a text"
            )
        if self.frame_selection != "uniform" and self.num_candidates < self.num_frames:
            raise ValueError(
                f"--num-candidates {self.num_candidates} is less than --num-frames {self.num_frames}; "
                "raise --num-candidates"
            )
        return self

    def max_tiles_per_image(self, num_images: int) -> int:
        """Return the maximum number of tiles for each image of a row with `num_images`."""
        return self.max_tiles or (SINGLE_IMAGE_MAX_TILES if num_images <= 1 else MULTI_IMAGE_MAX_TILES)

    @property
    def max_tiles_per_frame(self) -> int:
        """Maximum number of tiles for each frame of a video."""
        return self.max_tiles or FRAME_MAX_TILES

    @property
    def max_tiles_per_row(self) -> int:
        """Maximum number of tiles, overviews included, of a row with one image or one video."""
        tiles = self.max_tiles_per_frame
        return max(self.max_tiles_per_image(1) + 1, self.num_frames * (tiles + (tiles > 1)))

    @property
    def needs_encoder(self) -> bool:
        """Whether a model compares the frames."""
        return self.frame_selection != "uniform" and self.frame_encoder != PIXELS


def _parse_colour(text: str) -> tuple[int, int, int]:
    numbers = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*", text)
    try:
        colour: tuple[int, ...] = ImageColor.getrgb(f"rgb({text})" if numbers else text)
        red, green, blue = colour
    except ValueError as error:
        raise ValueError(
            f"{text!r} is not a colour; give #rrggbb, three numbers up to 255, or a name like white"
        ) from error
    if max(red, green, blue) > 255:
        raise ValueError(f"{text!r} is not a colour; its numbers may be up to 255")
    return red, green, blue


class SamplingOptions(Section):
    """How answers are generated. A task may override each option for itself."""

    title = "generation"

    system_prompt: str | None = declare_option(None, description="system prompt", unset="the model's own")
    max_new_tokens: PositiveInt = declare_option(512, description="maximum length of an answer, in tokens")
    temperature: float = declare_option(0.0, ge=0, description="sampling temperature; 0 is greedy decoding")
    top_p: float = declare_option(
        1.0, gt=0, le=1, description="sample from the most probable tokens that reach this total"
    )
    top_k: int = declare_option(0, ge=0, description="sample from this many most probable tokens; 0 uses all")
    repetition_penalty: float = declare_option(
        1.0, gt=0, description="above 1, tokens that already occurred are less likely"
    )
    stop: tuple[str, ...] = declare_option((), description="end the answer before this text", unset="none")
    seed: int = declare_option(0, description="random seed; a row's sample depends only on the seed and the row's id")

    _check_texts = field_validator("system_prompt", "stop")(check_texts)

    def task_defaults(self) -> dict[str, Any]:
        """Return {field: value} for the fields that a task may leave open."""
        given = self.model_dump(include=set(SamplingOptions.model_fields))
        return {"system": given.pop("system_prompt"), **given}


class ResourceOptions(Section):
    """Which hardware the run uses."""

    title = "cluster"

    num_replicas: PositiveInt | Literal["auto"] = _declare_execution(
        "auto", description="number of copies of the model; auto fills the cluster"
    )
    tensor_parallel: PositiveInt | Literal["auto"] = _declare_execution(
        "auto", description="GPUs per copy of the model, on one node; auto takes the fewest that hold it"
    )
    autoscale: bool = _declare_execution(
        False, description="let the cluster start nodes for --num-replicas; the run begins with those it has"
    )
    num_preprocessors: PositiveInt | Literal["auto"] = _declare_execution(
        "auto", description="number of CPU actors that decode and tile; auto goes by the GPUs and CPUs of the cluster"
    )
    device: Literal["auto", "cpu", "cuda"] = _declare_execution(
        "auto", description="device of the model; auto is cuda if the cluster has GPUs"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = declare_option(
        "auto", description="precision of the model; auto is bfloat16 on CUDA and float32 on a CPU"
    )

    quantization: Quantization = declare_option(
        "none",
        since="0.2",
        description="fp8 halves the weights of decoder and vision tower, on GPUs since L4 and H100; it changes answers",
    )

    engine: EngineName = declare_option(
        "ovis",
        since="0.2",
        description="what generates: the engine of this project, or vLLM (package vllm) fed with its embeddings",
    )

    @model_validator(mode="after")
    def _check_quantization(self) -> Self:
        if self.quantization == "fp8" and self.dtype == "float32":
            raise ValueError("--quantization fp8 computes in bfloat16; leave out --dtype float32")
        return self

    @model_validator(mode="after")
    def _check_autoscale(self) -> Self:
        if self.autoscale and self.num_replicas == "auto":
            raise ValueError("--autoscale needs a number of replicas; give --num-replicas N")
        return self


class OutputOptions(Section):
    """Where the rows go, and how many of them may be errors."""

    title = "output"

    output: Location = _declare_execution(..., description="directory or URI for the results")
    media_columns: bool = declare_option(
        False,
        since="0.2",
        description="add columns about the media: width, height, format, bytes; for videos also duration, fps, codec",
    )
    save_frames: Annotated[str, "DIR"] | None = declare_option(
        None,
        since="0.2",
        description="directory or URI for JPEG files of the images and frames that the model sees, named by row id",
        unset="they are not saved",
    )
    rows_per_file: PositiveInt = _declare_execution(10_000, description="maximum number of rows per output file")
    max_error_rate: float = _declare_execution(
        0.1, ge=0, le=1, description="exit with code 3 if a larger share of the rows are errors"
    )
    stop_error_rate: float = _declare_execution(
        0.9,
        gt=0,
        le=1,
        description="stop early if a larger share of the rows so far, at least 500, are errors; 1 never stops",
    )

    @field_validator("save_frames")
    @classmethod
    def _make_absolute(cls, value: str | None) -> str | None:  # so that any process of the cluster finds it
        return None if value is None else store.make_absolute(value)


class ResumeOptions(Section):
    """What happens to the rows of an earlier run in OUTPUT. By default, finished rows are kept and the rest follow."""

    title = "resume"

    overwrite: bool = _declare_execution(False, description="delete the earlier run in OUTPUT and start again")
    retry_errors: bool = _declare_execution(
        False, description="retry the error rows in OUTPUT, e.g. after fixing the cause"
    )
    extend: bool = _declare_execution(False, description="add rows of INPUT that the run in OUTPUT does not have yet")

    @model_validator(mode="after")
    def _check_resume(self) -> Self:
        if self.overwrite and (self.extend or self.retry_errors):
            other = "--extend" if self.extend else "--retry-errors"
            raise ValueError(f"--overwrite deletes the run that {other} needs; give one of the two")
        return self


class RunConfig(
    ResumeOptions, OutputOptions, ResourceOptions, SamplingOptions, ImageOptions, ModelOptions, SourceOptions
):
    """The options that all jobs over rows share. Each job adds the questions."""

    @property
    def questionnaire(self) -> Questionnaire:
        """The questions for every row, and the columns of the answers."""
        raise NotImplementedError

    @property
    def row_columns(self) -> pa.Schema:
        """The columns on request about a row and its media."""
        warning = schema.WARNING if self.partial_images == "keep" else ()
        saved = schema.SAVED_FRAMES if self.save_frames is not None else ()
        return pa.schema([*warning, *saved, *(schema.MEDIA if self.media_columns else ())])

    @model_validator(mode="after")
    def _check_output(self) -> Self:
        if taken := sorted(set(self.keep_columns).intersection(self.questionnaire.schema.names)):
            raise ValueError(f"--keep-columns: the output already has {', '.join(taken)}; rename yours in the input")
        if self.extend and self.on_duplicate_id == "suffix":
            raise ValueError(
                "--extend needs stable ids, and --on-duplicate-id suffix depends on the order of the input; "
                "use error or skip"
            )
        return self

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the options that decide what the rows hold, as JSON values.

        Include an option that was added after version 0.1 only if it differs from its default, so that the fingerprint
        of an older run stays the same.
        """
        return self.model_dump(mode="json", include=_deciding_options(type(self)) - _find_later_defaults(self))

    def fingerprint_defaults(self) -> dict[str, Any]:
        """Return the default of each option that decides rows, as a JSON value, for records that lack the option."""
        return _dump_defaults(type(self), _deciding_options(type(self)))


def _deciding_options(config: type[Section]) -> set[str]:
    return {name for name in config.model_fields if read_extra(config, name).get("decides_rows", True)}


def _dump_defaults(kind: type[BaseModel], names: Iterable[str]) -> dict[str, Any]:
    defaults = {name: kind.model_fields[name].default for name in names if not kind.model_fields[name].is_required()}
    return kind.model_construct(**defaults).model_dump(mode="json", include=set(defaults), warnings=False)


def _find_later_defaults(model: BaseModel) -> set[str]:
    """Return the fields that were added after version 0.1 and have their default."""
    fields = type(model).model_fields
    later = {name for name in fields if read_extra(type(model), name).get("since")}
    return {name for name in later if getattr(model, name) == fields[name].default}


def read_extra(config: type[BaseModel], name: str) -> dict[str, Any]:
    """Return what an option declares besides its type: `decides_rows`, `unset`, `since`."""
    extra = config.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


class CaptionConfig(RunConfig):
    """One question, answered in free text."""

    title = "prompt"

    prompt: str = declare_option(
        "Describe the image.",
        description="question for every row; {name} inserts a column if the input has columns, {subtitles} the video's",
    )
    prompt_column: Column | None = declare_option(
        None, description="column of questions; rows where it is empty get --prompt", unset="--prompt for all rows"
    )
    chain_of_thought: bool = declare_option(False, description="ask for step-by-step reasoning before the answer")

    _check_prompt = field_validator("prompt")(check_texts)

    @property
    def questionnaire(self) -> Questionnaire:
        """One task without a name, laid out flat."""
        return Questionnaire(
            tasks=(Task.model_construct(name="", prompt=self.prompt, **self.task_defaults()),),
            layout=FlatLayout(prompt_suffix=f"\n{CHAIN_OF_THOUGHT}" if self.chain_of_thought else ""),
            prompt_column=self.prompt_column or "",
            has_default_prompt="prompt" not in self.model_fields_set,
            row_columns=self.row_columns,
        )


class AnnotateConfig(RunConfig):
    """Several named questions, each with its own type of answer."""

    title = "questions"

    tasks: Annotated[tuple[Task, ...], "FILE"] = Field(
        description="YAML file of the questions; docs/annotate.md describes it"
    )
    regenerate: Literal["flagged"] | None = declare_option(
        None, description="generate flagged answers again with other sampling; keeps both answers", unset="off"
    )

    @field_validator("tasks", mode="wrap")
    @classmethod
    def _read_file(cls, value: Any, build: Callable[[Any], tuple[Task, ...]]) -> tuple[Task, ...]:
        if not isinstance(value, str):
            return build(value)
        tasks = build(read_tasks(value))
        return tuple(task.locate(place) for task, place in zip(tasks, list_places(value), strict=True))

    @field_validator("tasks")
    @classmethod
    def _check_not_empty(cls, value: tuple[Task, ...]) -> tuple[Task, ...]:  # min_length counts the faultless ones only
        if not value:
            raise ValueError("holds no task; give at least one")
        return value

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = Counter(schema.build_result_schema(self.questionnaire.schema).names)
        if twice := sorted(name for name, count in names.items() if count > 1):
            last = [task for task in self.tasks if any(name.startswith(task.name) for name in twice)][-1]
            named = ", ".join(twice)
            raise ValueError(f"{last.place_label}two columns of the output would be named {named}; rename a task")
        return self

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the options that decide what the rows hold; a task's fields follow the same rule as options."""
        tasks = [task.model_dump(mode="json", exclude=_find_later_defaults(task)) for task in self.tasks]
        return {**super().fingerprint_fields(), "tasks": tasks}

    def fingerprint_defaults(self) -> dict[str, Any]:
        """Return also, as `task`, the defaults of a task's fields."""
        kind = type(self.tasks[0])
        return {**super().fingerprint_defaults(), "task": _dump_defaults(kind, kind.model_fields)}

    @property
    def questionnaire(self) -> Questionnaire:
        """All tasks, each in its own columns."""
        return Questionnaire(
            tasks=tuple(task.fill_defaults(**self.task_defaults()) for task in self.tasks),
            layout=TaskLayout(with_alternatives=self.regenerate is not None),
            row_columns=self.row_columns,
        )
