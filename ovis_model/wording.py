"""Count things in messages: "1 row", "2 rows"."""

from __future__ import annotations


def count_nouns(count: float, one: str, many: str = "") -> str:
    """Return `count` with the words that fit it: `one` for 1, otherwise `many`, by default `one` with an "s".

    The words may be a whole clause, such as "row repeats an id" and "rows repeat an id".
    """
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {one if count == 1 else many or f'{one}s'}"
