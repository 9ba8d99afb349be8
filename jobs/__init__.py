"""The jobs `ovis2 NAME`, and what they share: `options` and `command_line` parse, `cli` runs and reports."""

import sys

if sys.argv[:1] == ["-m"]:
    # `python -m jobs.NAME` has this process run a job, and loads this package first. Later is too late: a Ctrl-C during
    # the imports of the job would print a trace, and a file could take the place of a closed stdout.
    from jobs.shell import prepare_process

    prepare_process()

JOBS = {
    "caption": "write a text about each image or video: a caption or the answer to a question",
    "annotate": "ask several questions about each image or video; each answer gets a typed column",
    "plan": "say before a run what limits it, how long it takes and what it costs; changes nothing",
    "list": "list the rows of a run once, for several drivers that each do a part of them",
    "evaluate": "ask and score the benchmarks of the Ovis2 release as VLMEvalKit does",
    "train": "train or fine-tune a model: by Ovis2's stages, with LoRA, or on preferences",
    "report": "write one HTML page about a run: counts, errors, distributions, a contact sheet",
    "export": "write chosen rows as WebDataset, Hugging Face dataset, LLaVA, COCO, CSV or JSON lines",
    "review": "accept or correct answers in a page on this machine, by keyboard",
    "compact": "merge the many Parquet files of a run into a few large ones",
    "demo": "caption drawn images with the bundled demo model and compare with the truth",
    "demo-answers": "annotate drawn images with the bundled demo model and write a report",
}
"""Name -> what the job does, as `ovis2 --help` lists them. The module of a job has _ in place of -."""
