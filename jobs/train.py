"""The job `ovis2 train`: fine-tune an Ovis2, or train one by Ovis2's stages, on one machine or a Ray cluster.

`--recipe FILE` runs several stages, each of which begins with the model of the one before it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import EXIT_CODES, FAILED, OK, run_job
from jobs.command_line import Command, parse_command_line
from jobs.trainer_names import advise
from jobs.usage import BAD_USAGE
from pipelines.training.config import TrainConfig
from pipelines.training.recipe import RecipeOptions

_NOTES = "\n".join(
    [
        "exit codes:",
        f"  {OK}  the model is in OUTPUT/model",
        f"  {FAILED}  the run failed or was stopped; the same command without --overwrite resumes it",
        f"  {BAD_USAGE}  {EXIT_CODES[BAD_USAGE]}",
    ]
)

COMMAND = Command(
    "train",
    TrainConfig,
    "Train an Ovis2 on dialogues, captions or preferences, by its stages or with LoRA.",
    "INPUT OUTPUT --model MODEL",
    (
        "dialogues.json tuned --model AIDC-AI/Ovis2-2B --lora-rank 16",
        "data.yaml stage2 --model stage1/model --stage 2 --num-workers 8 --gradient-accumulation-steps 32",
        "pairs.jsonl aligned --model tuned/model --stage dpo --rpo-alpha 0.1",
        "--recipe recipe.yaml made",
    ),
    _NOTES,
    advise=advise,
)
RECIPE = Command(
    "train --recipe",
    RecipeOptions,
    "Train the stages of a recipe in order, each from the model of the one before it.",
    "--recipe FILE OUTPUT",
    ("--recipe recipe.yaml made",),
    _NOTES,
    places=("output",),
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m jobs.train") -> int:
    """Run the job -> its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument.partition("=")[0] == "--recipe" for argument in arguments):
        options = parse_command_line(RECIPE, arguments, prog)
        from pipelines.training.recipe import run_recipe  # loads Ray, which --help and usage errors do without

        return run_job(lambda: run_recipe(options))
    config = parse_command_line(COMMAND, arguments, prog)
    from pipelines.training.run import run_training

    return run_job(lambda: run_training(config))


if __name__ == "__main__":
    sys.exit(main())
