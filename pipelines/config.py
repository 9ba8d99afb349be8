"""Options of a run in sections, one for each stage; a job's configuration is all of them, flat.

A function takes the section that it needs: a configuration is an instance of each. `fingerprint_fields` collects the
options that decide what the rows hold; the others, declared with `_how`, say how the work is done. An option that is
added to decide rows says since which version: `json_schema_extra={"since": "0.2"}`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from ovis_model.inputs.prompt import CHAIN_OF_THOUGHT
from pipelines import schema
from pipelines.tasks.questionnaire import FlatLayout, Questionnaire, TaskLayout
from pipelines.tasks.task import Task, check_texts, read_tasks

SINGLE_IMAGE_MAX_TILES, MULTI_IMAGE_MAX_TILES, FRAME_MAX_TILES = 9, 4, 1  # the model card's
PIXELS = "pixels"  # the frame encoder that needs no model


def _how(default: Any, *, description: str, **bounds: Any) -> Any:
    """Declare an option that says how the work is done and never changes what a row holds."""
    return Field(default, description=description, json_schema_extra={"decides_rows": False}, **bounds)


class Section(BaseModel):
    """Some options. Unknown ones are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SourceOptions(Section):
    """What the rows are: read when INPUT is listed."""

    input: tuple[str, ...] = Field(
        min_length=1, description="a file, directory, glob or URI of images, tar, Parquet or JSONL; may be repeated"
    )
    image_column: str | None = Field(None, description="column that holds the images; '' for none")
    id_column: str | None = Field(None, description="column of unique ids; default the place in the input")
    keep_columns: tuple[str, ...] = Field((), description="columns C1,C2 to copy into the output")
    on_duplicate_id: Literal["error", "suffix", "skip"] = Field(
        "error", description="what a row is whose id an earlier one has: an error, a row ID~2, or left out"
    )
    window_s: float | None = Field(None, gt=0, description="cut longer videos into rows of so many seconds")
    limit: PositiveInt | None = Field(None, description="only the first rows of the input")
    allow_private_addresses: bool = _how(False, description="read http(s) URLs of hosts inside your network too")

    @field_validator("keep_columns", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value

    @field_validator("keep_columns")
    @classmethod
    def _check_unique(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("name each column once")
        return value


class ModelOptions(Section):
    """Which model answers."""

    model: str = Field(description='a directory, a hub id such as AIDC-AI/Ovis2-1B, a URI, or "demo"')
    revision: str | None = Field(None, description="commit, tag or branch of a hub id")


class ImageOptions(Section):
    """How images and the frames of videos are shown to the model."""

    max_tiles: PositiveInt | None = Field(
        None, description="most cells an image is cut into; default 9 for one image a row, 4 for several, 1 for frames"
    )
    num_frames: PositiveInt = Field(12, description="most frames of a video that the model is shown")
    fps: float | None = Field(None, gt=0, description="at most so many frames, or candidates, a second of video")
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

    @model_validator(mode="after")
    def _check_frames_can_be_chosen(self) -> Self:
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

    def max_tiles_per_image(self, num_images: int) -> int:
        """Return the maximum number of cells for each image in a row of `num_images`."""
        return self.max_tiles or (SINGLE_IMAGE_MAX_TILES if num_images <= 1 else MULTI_IMAGE_MAX_TILES)

    @property
    def max_tiles_per_frame(self) -> int:
        """Maximum number of cells for each frame of a video."""
        return self.max_tiles or FRAME_MAX_TILES

    @property
    def max_tiles_per_row(self) -> int:
        """Maximum number of tiles, overviews included, of a row with one image or one video."""
        cells = self.max_tiles_per_frame
        return max(self.max_tiles_per_image(1) + 1, self.num_frames * (cells + (cells > 1)))

    @property
    def needs_encoder(self) -> bool:
        """Whether frames are compared by a model."""
        return self.frame_selection != "uniform" and self.frame_encoder != PIXELS


class SamplingOptions(Section):
    """How answers are generated, unless a task says otherwise."""

    system_prompt: str | None = Field(None, description="instead of the model's own")
    max_new_tokens: PositiveInt = Field(512, description="longest answer, in tokens")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the most probable tokens of this mass")
    top_k: int = Field(0, ge=0, description="keep this many most probable tokens; 0 keeps all")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1 discourages tokens already generated")
    stop: tuple[str, ...] = Field((), description="end an answer before this text; may be repeated")
    seed: int = Field(0, description="of sampling; a row's sample depends on it and the row's id only")

    _check_texts = field_validator("system_prompt", "stop")(check_texts)

    def task_defaults(self) -> dict[str, Any]:
        """Return the value of each field that a task may leave open."""
        given = self.model_dump(include=set(SamplingOptions.model_fields))
        return {"system": given.pop("system_prompt"), **given}


class ResourceOptions(Section):
    """What the work runs on."""

    num_replicas: PositiveInt | Literal["auto"] = _how("auto", description="copies of the model")
    tensor_parallel: PositiveInt | Literal["auto"] = _how(
        "auto", description="GPUs of one copy of the model; auto is as few as hold it"
    )
    autoscale: bool = _how(False, description="have the cluster start nodes for --num-replicas, and begin meanwhile")
    num_preprocessors: PositiveInt | Literal["auto"] = _how("auto", description="CPU actors that decode and tile")
    device: Literal["auto", "cpu", "cuda"] = _how("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto is bfloat16 on CUDA and float32 on a CPU"
    )

    @model_validator(mode="after")
    def _check_autoscale(self) -> Self:
        if self.autoscale and self.num_replicas == "auto":
            raise ValueError("--autoscale needs to know for how many: give --num-replicas N")
        return self


class OutputOptions(Section):
    """Where the rows go, and what happens to those of an earlier run."""

    output: str = _how(..., description="a directory or URI")
    rows_per_file: PositiveInt = _how(10_000, description="rows of an output file at most")
    max_error_rate: float = _how(0.1, ge=0, le=1, description="exit 3 when more of the rows are errors")
    stop_error_rate: float = _how(
        0.9, gt=0, le=1, description="stop early when more of the rows so far, at least 500, are errors; 1 never stops"
    )
    overwrite: bool = _how(False, description="remove an earlier run from OUTPUT first")
    retry_errors: bool = _how(False, description="take up the error rows of the run in OUTPUT again")
    extend: bool = _how(False, description="add the rows of INPUT that the run in OUTPUT does not have yet")

    @model_validator(mode="after")
    def _check_resume(self) -> Self:
        if self.overwrite and (self.extend or self.retry_errors):
            raise ValueError("--overwrite leaves nothing to extend or to retry; give one of them")
        return self


class RunConfig(OutputOptions, ResourceOptions, SamplingOptions, ImageOptions, ModelOptions, SourceOptions):
    """Every option that all jobs over rows have. What is asked of the rows is for each job to add."""

    @property
    def questionnaire(self) -> Questionnaire:
        """What is asked of every row, and the columns of the answers."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_output(self) -> Self:
        if taken := sorted(set(self.keep_columns).intersection(self.questionnaire.schema.names)):
            raise ValueError(
                f"--keep-columns: the output has columns {', '.join(taken)} of its own; rename yours in the input"
            )
        if self.extend and self.on_duplicate_id == "suffix":
            raise ValueError("--extend needs ids that do not depend on the order of a listing; suffixes do")
        return self

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the options that decide what the rows hold, as JSON values.

        An option that was added after version 0.1 is there only with another value than its default, so that the
        fingerprint of an old run stays what it was.
        """
        added = {name for name in _deciding_options(type(self)) if _extra(type(self), name).get("since")}
        unset = {name for name in added if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", include=_deciding_options(type(self)) - unset)

    @classmethod
    def fingerprint_defaults(cls) -> dict[str, Any]:
        """Return the default, as a JSON value, of each option that decides rows: what a record without it means."""
        names = {name for name in _deciding_options(cls) if not cls.model_fields[name].is_required()}
        defaults = {name: cls.model_fields[name].default for name in names}
        return cls.model_construct(**defaults).model_dump(mode="json", include=names, warnings=False)


def _deciding_options(config: type[Section]) -> set[str]:
    return {name for name in config.model_fields if _extra(config, name).get("decides_rows", True)}


def _extra(config: type[Section], name: str) -> dict[str, Any]:
    extra = config.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


class CaptionConfig(RunConfig):
    """One question, answered in free text."""

    prompt: str = Field(
        "Describe the image.", description="what to ask; {name} stands for a column if the input has columns"
    )
    prompt_column: str | None = Field(None, description="column of questions; a row without one is asked --prompt")
    chain_of_thought: bool = Field(False, description="ask for step-by-step reasoning before the answer")

    _check_prompt = field_validator("prompt")(check_texts)

    @property
    def questionnaire(self) -> Questionnaire:
        """One task without a name, laid out flat."""
        return Questionnaire(
            tasks=(Task.model_construct(name="", prompt=self.prompt, **self.task_defaults()),),
            layout=FlatLayout(prompt_suffix=f"\n{CHAIN_OF_THOUGHT}" if self.chain_of_thought else ""),
            prompt_column=self.prompt_column or "",
            has_default_prompt="prompt" not in self.model_fields_set,
        )


class AnnotateConfig(RunConfig):
    """Several named questions, each with its own type of answer."""

    tasks: tuple[Task, ...] = Field(description="YAML file of the questions")
    regenerate: Literal["flagged"] | None = Field(
        None, description="answer once more where an answer is flagged, by other sampling; both answers are kept"
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _read_file(cls, value: Any) -> Any:
        return read_tasks(value) if isinstance(value, str) else value

    @field_validator("tasks")
    @classmethod
    def _check_not_empty(cls, value: tuple[Task, ...]) -> tuple[Task, ...]:  # min_length counts the faultless ones only
        if not value:
            raise ValueError("give at least one")
        return value

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = Counter(schema.result(self.questionnaire.schema).names)
        if twice := sorted(name for name, count in names.items() if count > 1):
            raise ValueError(f"--tasks: two columns of the output would be called {', '.join(twice)}; rename a task")
        return self

    @property
    def questionnaire(self) -> Questionnaire:
        """Every task, in columns of its own."""
        return Questionnaire(
            tasks=tuple(task.with_defaults(**self.task_defaults()) for task in self.tasks),
            layout=TaskLayout(with_alternatives=self.regenerate is not None),
        )
