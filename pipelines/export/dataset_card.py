"""Write the dataset card of an export for the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator

_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
task_categories:
- image-to-text
---

# {name}

Answers of a vision-language model, exported by `ovis2 export`. {rows} rows.

| | |
|---|---|
| model | {model} |
| filter | {filter} |

## Questions

{questions}

The answers are the model's and were not checked by people. The images belong to their owners: add their licence
before you publish this dataset.
"""


def make_card(lines: Iterator[str]) -> Iterator[bytes]:
    """Yield the card from one line of JSON: name, rows, model, filter and questions."""
    about = json.loads(next(lines))
    questions = "\n".join(
        f"- `{name}`: {json.dumps(prompt, ensure_ascii=False)}" for name, prompt in about["questions"]
    )
    yield _CARD.format(**{**about, "questions": questions}).encode()
