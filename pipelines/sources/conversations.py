"""Find the question and the images in a row's conversation, in the forms of OpenAI, LLaVA, ms-swift and LLaMA-Factory.

The first turn of the user is the question. Other turns are not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_TURNS = ("messages", "conversations", "conversation", "input")
_TURN_SET = frozenset(_TURNS)
SPECIAL_FIELDS = _TURN_SET | {"body"}  # an object with one may be a conversation
_USERS = ("user", "human")
_TEXT_TYPES = ("text", "input_text")
_MEDIA_KEYS = ("image_url", "video_url", "image", "video", "input_image", "source", "url", "path")
_MARK = re.compile(r"<(?:image|video)>\n?|\n<(?:image|video)>$")

UNUSED_TURNS = "turns that are not used: system turns, answers, or further turns"
OTHER_COUNT = "another number of images in the text than in the row"


@dataclass(frozen=True)
class Conversation:
    """The first turn of the user: its text without marks such as `<image>`, their number, and the images in it."""

    text: str = ""
    num_marks: int = 0
    media: tuple[Any, ...] = ()
    has_other_turns: bool = False
    has_later_media: bool = False


def unwrap_request(values: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a request as in OpenAI's batch files, with its id; other objects unchanged."""
    body = values.get("body")
    if not isinstance(body, dict) or not any(is_turns(body.get(name)) for name in _TURNS):
        return values
    given = {name: value for name, value in values.items() if name not in ("body", "url", "method")}
    return {"id": values.get("custom_id"), **given, **body}


def find_conversation(values: Mapping[str, Any], prompt: str) -> Conversation | None:
    """Return the conversation in the column `prompt` or in one with a usual name, None if there is none."""
    if _TURN_SET.isdisjoint(values) and not isinstance(values.get(prompt), list):
        return None
    turns = next((values[name] for name in (prompt, *_TURNS) if is_turns(values.get(name))), None)
    if turns is None:
        return None
    asked = [number for number, turn in enumerate(turns) if get_role(turn) in _USERS]
    if not asked:
        return Conversation(has_other_turns=True)
    text, num_bare, media = _read_content(get_content(turns[asked[0]]))
    later = any(_read_content(get_content(turns[number]))[2] for number in asked[1:])
    plain, num_marks = strip_marks(text)
    return Conversation(plain, num_marks + num_bare, media, len(turns) > 1, later)


def strip_marks(text: str) -> tuple[str, int]:
    """Return the text without marks for images and videos, and their number."""
    plain, count = _MARK.subn("", text)
    while count and _MARK.search(plain):  # removing a mark can join the halves of another
        plain = _MARK.sub("", plain)
    return (plain.strip(), count) if count else (text, 0)


def is_turns(value: Any) -> bool:
    """Return whether a value is a list of turns, each with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(t, dict) and get_role(t) for t in value)


def get_role(turn: Mapping[str, Any]) -> Any:
    """Return the role of a turn, under the name that OpenAI or LLaVA gives it."""
    return turn.get("role") or turn.get("from")


def get_content(turn: Mapping[str, Any]) -> Any:
    """Return the content of a turn: text, or a list of parts."""
    return turn.get("content", turn.get("value"))


def is_media(part: Any) -> bool:
    """Return whether a part of a turn holds or marks an image or a video."""
    return isinstance(part, dict) and (
        any(name in str(part.get("type")) for name in ("image", "video")) or any(part.get(key) for key in _MEDIA_KEYS)
    )


def get_media(part: Mapping[str, Any]) -> Any:
    """Return what a part of a turn holds, None if it only marks a place."""
    return next((part[key] for key in _MEDIA_KEYS if part.get(key)), None)


def _read_content(content: Any) -> tuple[str, int, tuple[Any, ...]]:
    """Return the text of a turn, the number of images that it only marks, and the images that it holds."""
    parts = content if isinstance(content, list) else [content]
    texts = list(_read_texts(parts))
    media = [get_media(part) for part in parts if is_media(part)]
    held = tuple(item for item in media if item)
    return "\n".join(texts), len(media) - len(held), held


def _read_texts(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in _TEXT_TYPES else part
        if isinstance(text, str) and text:
            yield text
