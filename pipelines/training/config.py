"""The options of a training run. Where Hugging Face's Trainer has an option, it has the same name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import PositiveInt, field_validator, model_validator

from ovis_model.inputs.prompt import IMAGE_MARK
from ovis_model.training.stages import STAGES, Stage
from pipelines.config import (
    ImageOptions,
    Location,
    ModelOptions,
    Section,
    declare_option,
    read_extra,
    split_at_commas,
    wrap_one,
)
from pipelines.training.data.data_sets import CAPTION_TEMPLATE, CaptionForm, DataSet, read_data_sets

_LEARNING_RATES: dict[str, float] = {"1": 1e-4, "2": 5e-5, "3": 5e-5, "4": 1e-5, "dpo": 1e-6}  # Ovis 1.5; TRL for DPO
_LORA_LEARNING_RATES: dict[str, float] = {"dpo": 2e-5}
_LORA_LEARNING_RATE = 1e-4


def _declare_execution(default: Any, *, description: str, **bounds: Any) -> Any:
    """Declare an option that decides no weight, so that a resumed run may change it."""
    return declare_option(default, description=description, decides_rows=False, **bounds)


class DataOptions(Section):
    """What the model learns from."""

    title: ClassVar[str] = "data"

    input: tuple[Location, ...] = declare_option(
        ..., min_length=1, description="JSON, JSON lines, Parquet or tar of rows, or a YAML file that lists data sets"
    )
    image_root: Location | None = declare_option(
        None, description="directory or URI that relative paths of images start at", unset="the directory of the data"
    )
    caption_template: str | None = declare_option(
        None,
        description=f"question of rows with a caption; {IMAGE_MARK} marks the image",
        unset=f"{IMAGE_MARK} and 'Describe the image.' on two lines",
    )
    caption_form: CaptionForm | None = declare_option(
        None,
        description="captions as answers of a chat, or as plain text after the template, whose end is not learnt",
        unset="plain in stage 1, as Ovis does it, else dialogue",
    )
    max_length: PositiveInt | None = declare_option(
        None, description="maximum length of a row in tokens; longer rows are errors, never cut", unset="the model's"
    )
    eval_rows: int = declare_option(
        0, ge=0, description="number of rows to hold out, chosen by the seed, for the validation loss and the samples"
    )
    eval_input: tuple[Location, ...] = declare_option(
        (), description="data of rows that are only held out, in the forms of INPUT", unset="none"
    )
    max_error_rate: float = _declare_execution(
        0.1, ge=0, le=1, description="do not start if a larger share of the rows are errors"
    )
    allow_private_addresses: bool = _declare_execution(
        False, description="also read http(s) URLs of hosts inside your own network"
    )


class StageOptions(Section):
    """Which weights move."""

    title: ClassVar[str] = "stage"

    stage: Stage = declare_option(
        "4",
        description="1 trains the last ViT block, head and table; 2 and 3 the whole visual part; 4 and dpo all",
    )
    train_modules: Annotated[str, "NAME|NAME"] | None = declare_option(
        None,
        description="parts to train in place of the stage's, such as visual_tokenizer.head|vte, llm or all",
        unset="by --stage",
    )
    initialize: Literal["none", "table", "all"] = declare_option(
        "none",
        description="draw weights at the start: the visual embedding table, from the statistics of the word "
        "embeddings, or all, for a model from nothing",
    )
    lora_rank: int = declare_option(
        0, ge=0, description="rank of LoRA adapters on the language model, which is then frozen; 0 trains without"
    )
    lora_alpha: float = declare_option(32.0, gt=0, description="the adapters' product is scaled by alpha / rank")
    beta: float = declare_option(0.1, gt=0, description="dpo: how closely the model stays at its start")
    rpo_alpha: float = declare_option(
        0.0, ge=0, description="dpo: weight of the chosen answers' own loss, which keeps their probability from falling"
    )


class StepOptions(Section):
    """How the weights move."""

    title: ClassVar[str] = "steps"

    learning_rate: float | None = declare_option(
        None, gt=0, description="peak learning rate", unset="1e-4, 5e-5, 5e-5, 1e-5, dpo 1e-6; LoRA 1e-4, dpo 2e-5"
    )
    learning_rates: Annotated[tuple[str, ...], "PART=RATE,..."] = declare_option(
        (), description="learning rates of single parts, such as vte=1e-3,llm=1e-5", unset="--learning-rate for all"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = declare_option(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_ratio: float = declare_option(0.05, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = declare_option(0.0, ge=0, description="weight decay of AdamW")
    adam_beta1: float = declare_option(0.9, ge=0, lt=1, description="decay of AdamW's mean")
    adam_beta2: float = declare_option(0.999, ge=0, lt=1, description="decay of AdamW's variance")
    max_grad_norm: float = declare_option(1.0, gt=0, description="clip the gradient to this norm")
    per_device_train_batch_size: PositiveInt = declare_option(8, description="rows per worker and micro-batch")
    gradient_accumulation_steps: PositiveInt = declare_option(1, description="micro-batches per step")
    num_train_epochs: PositiveInt = declare_option(1, description="number of passes over the data")
    max_steps: PositiveInt | None = declare_option(
        None, description="number of steps", unset="as many as --num-train-epochs needs"
    )
    seed: int = declare_option(0, ge=0, description="seed of the order of rows and of drawn weights")


class WorkerOptions(Section):
    """Which hardware trains."""

    title: ClassVar[str] = "workers"

    num_workers: PositiveInt = declare_option(
        1, description="number of workers, each on one GPU or on CPUs; a step has the rows of all of them"
    )
    device: Literal["auto", "cpu", "cuda"] = _declare_execution(
        "auto", description="device of the workers; auto is cuda if the cluster has GPUs"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = declare_option(
        "auto", description="precision of products; weights are float32. auto is bfloat16 on CUDA, float32 on CPUs"
    )
    fsdp: bool = declare_option(
        False, description="divide weights and optimizer between the workers (FSDP), for models that one cannot hold"
    )
    gradient_checkpointing: bool = declare_option(
        True, description="compute activations again in the backward pass; needs less memory"
    )
    dataloader_num_workers: int = _declare_execution(
        0, ge=0, description="processes per worker that prepare rows ahead; 0 prepares in a thread of the worker"
    )
    max_restarts: int = _declare_execution(
        3, ge=0, description="how often dead workers start again from the last checkpoint, without a new one between"
    )


class LogOptions(Section):
    """Where the model goes, and what is recorded."""

    title: ClassVar[str] = "output"

    output: Location = _declare_execution(..., description="directory or URI for the model, checkpoints and metrics")
    overwrite: bool = _declare_execution(False, description="delete the earlier run in OUTPUT and start again")
    save_steps: PositiveInt = _declare_execution(500, description="write a checkpoint each N steps; two are kept")
    logging_steps: PositiveInt = _declare_execution(10, description="write metrics each N steps")
    eval_steps: PositiveInt = _declare_execution(500, description="compute the validation loss each N steps")
    sample_steps: PositiveInt | None = _declare_execution(
        None, description="answer held-out rows each N steps", unset="at the end only"
    )
    num_samples: int = _declare_execution(4, ge=0, description="number of held-out rows to answer")
    merge: bool = _declare_execution(True, description="LoRA: also write the whole model with the adapters merged")


class TrainConfig(LogOptions, WorkerOptions, StepOptions, StageOptions, ImageOptions, ModelOptions, DataOptions):
    """All options of a training run."""

    title: ClassVar[str] = "training"

    _wrap_input = field_validator("input", "eval_input", mode="before")(wrap_one)

    @field_validator("stage", mode="before")
    @classmethod
    def _read_number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    _split_rates = field_validator("learning_rates", mode="before")(split_at_commas)

    @field_validator("learning_rates")
    @classmethod
    def _check_rates(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            part, _, rate = item.partition("=")
            try:
                is_valid = bool(part) and 0 <= float(rate) < 1
            except ValueError:
                is_valid = False
            if not is_valid:
                raise ValueError(f"{item!r} must be PART=RATE such as vte=1e-3")
        return value

    @model_validator(mode="after")
    def _check_frames(self) -> Self:
        if self.needs_encoder:
            raise ValueError(
                "--frame-selection with a SigLIP is not supported in training; use uniform, or --frame-encoder pixels"
            )
        return self

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        if self.lora_rank and self.stage not in ("4", "dpo"):
            raise ValueError(f"--lora-rank trains the language model, which stage {self.stage} does not; use stage 4")
        return self

    @property
    def is_preference(self) -> bool:
        """Whether rows are pairs."""
        return self.stage == "dpo"

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate of parts without their own."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.lora_rank:
            return _LORA_LEARNING_RATES.get(self.stage, _LORA_LEARNING_RATE)
        return _LEARNING_RATES[self.stage]

    @property
    def parts(self) -> str:
        """The parts that are trained, by Ovis's names."""
        return self.train_modules or ("lora" if self.lora_rank else STAGES[self.stage])

    @property
    def part_learning_rates(self) -> dict[str, float]:
        """The learning rates of single parts."""
        return {part: float(rate) for part, _, rate in (item.partition("=") for item in self.learning_rates)}

    @property
    def batch_size(self) -> int:
        """Rows per step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_workers

    def read_data_sets(self) -> list[DataSet]:
        """Return the data sets of INPUT. Raise ValueError."""
        return self._read(self.input)

    def read_eval_sets(self) -> list[DataSet]:
        """Return the data sets of --eval-input. Raise ValueError."""
        return self._read(self.eval_input)

    def _read(self, uris: tuple[str, ...]) -> list[DataSet]:
        form = self.caption_form or ("plain" if self.stage == "1" else "dialogue")
        template = self.caption_template or CAPTION_TEMPLATE
        return read_data_sets(uris, image_root=self.image_root, caption_template=template, caption_form=form)

    def identify(self) -> dict[str, Any]:
        """Return the options that decide the weights, as JSON values: a resumed run may not change them."""
        fields = type(self).model_fields
        deciding = {name for name in fields if read_extra(type(self), name).get("decides_rows", True)}
        return self.model_dump(mode="json", include=deciding)
