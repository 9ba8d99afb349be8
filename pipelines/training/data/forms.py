"""Read a row of training data in the forms of Ovis, LLaVA and ShareGPT, OpenAI, TRL and ms-swift.

A row is a dialogue with answers to learn, or a prompt with a chosen and a rejected answer. Its media stand where its
turns have `<image>`; without any mark they come first. Reads no pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from ovis_model.inputs.prompt import IMAGE_MARK
from ovis_model.wording import count_nouns
from pipelines.media.reference import ImageRef, parse_reference
from pipelines.sources.conversations import get_content, get_media, get_role, is_media, is_turns

Role = Literal["system", "user", "assistant"]
Refer = Callable[[Any], ImageRef]
"""Returns the reference to what a row names or holds as an image; raises ValueError."""

_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"model": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"}
_TURNS = ("messages", "conversations", "conversation")
_IMAGES = ("image", "images", "image_path")
_VIDEOS = ("video", "videos")
_CAPTIONS = ("caption", "txt")
_TEXTS = ("chosen", "rejected", "rejected_response", "prompt", "system", "max_partition", "video_frames")
FIELDS = (*_TURNS, *_IMAGES, *_VIDEOS, *_CAPTIONS, *_TEXTS, "rejected_images", "id")
"""Every field that decides a row."""

_VIDEO_MARK = "<video>"
MediaKind = Literal["images", "video", "frames"]


class TextTurn(NamedTuple):
    """What one side says."""

    role: Role
    text: str


@dataclass(frozen=True)
class Dialogue:
    """A row: the turns with their answers, or those before an answer with `chosen` and `rejected`.

    kind: whether `media` are images, one video, or the frames of one.
    is_caption: the turns are a template and a caption, not a chat.
    max_tiles: of each image of this row; None for the limit of the run.
    """

    turns: tuple[TextTurn, ...]
    media: tuple[ImageRef, ...] = ()
    kind: MediaKind = "images"
    chosen: str = ""
    rejected: str = ""
    is_caption: bool = False
    max_tiles: int | None = None

    @property
    def is_pair(self) -> bool:
        """Whether the row is a preference."""
        return bool(self.chosen)

    def to_json(self) -> str:
        """Encode the row as JSON."""
        return json.dumps({**asdict(self), "media": [reference.to_struct() for reference in self.media]})

    @classmethod
    def from_json(cls, text: str) -> Dialogue:
        """Decode the result of `to_json`."""
        values = json.loads(text)
        turns = tuple(TextTurn(*turn) for turn in values.pop("turns"))
        return cls(turns, tuple(map(parse_reference, values.pop("media"))), **values)


def parse_dialogue(
    values: Mapping[str, Any], refer: Refer, media: Sequence[ImageRef] = (), *, caption_template: str = ""
) -> Dialogue:
    """Return the row that the fields of an object or of a table hold. Raise ValueError with what is wrong.

    media: the images that the source itself found, such as the members of a tar; none to look for them in `values`.
    caption_template: the question of a row with a caption.
    """
    reader = _TurnReader(refer)
    if values.get("rejected_images"):
        raise ValueError("pairs that differ in their images (rejected_images) are not supported")
    if any(values.get(name) is not None for name in ("rejected", "rejected_response")):
        row = _parse_pair(values, reader)
    else:
        row = _parse_answers(values, reader, caption_template)
    row = _add_system(row, values)
    row = replace(row, max_tiles=_parse_max_tiles(values.get("max_partition")))
    return _mark_media(_add_media(row, values, (*media, *reader.held), refer))


class _TurnReader:
    """Reads turns; `held` collects the media in their parts."""

    def __init__(self, refer: Refer) -> None:
        self._refer = refer
        self.held: list[ImageRef] = []

    def read(self, turns: Sequence[Mapping[str, Any]]) -> tuple[TextTurn, ...]:
        """Return the turns as text with marks. Raise ValueError for a role that no side has."""
        return tuple(TextTurn(_parse_role(get_role(turn)), self._read_text(get_content(turn))) for turn in turns)

    def _read_text(self, content: Any) -> str:
        parts = content if isinstance(content, list) else [content]
        return "\n".join(text for part in parts if (text := self._read_part(part)))

    def _read_part(self, part: Any) -> str:
        if is_media(part):
            if value := get_media(part):
                self.held.append(self._refer(value))
            return _VIDEO_MARK if "video" in str(part.get("type")) or part.get("video") else IMAGE_MARK
        text = part.get("text") if isinstance(part, dict) else part
        if text is None or isinstance(text, str):
            return text or ""
        raise ValueError(f"a turn must hold text or parts, not {str(part)[:80]!r}")


def _parse_role(name: Any) -> Role:
    role = _ROLES.get(str(name))
    if role is None:
        raise ValueError(f"turns of {str(name)!r} are not supported; use system, user (human) and assistant (gpt)")
    return role


def _parse_answers(values: Mapping[str, Any], reader: _TurnReader, caption_template: str) -> Dialogue:
    turns = _find_turns(values, _TURNS)
    if turns is None:
        return Dialogue(_parse_caption(values, caption_template), is_caption=True)
    row = Dialogue(reader.read(turns))
    roles = [turn.role for turn in row.turns]
    if set(roles) == {"system"}:
        raise ValueError("the conversation has only system turns: there is nothing to learn")
    if "assistant" not in roles:
        raise ValueError("no turn is an answer: there is nothing to learn")
    _check_order(roles)
    for number, turn in enumerate(row.turns, 1):
        if turn.role == "assistant" and not turn.text.strip():
            raise ValueError(f"the answer in turn {number} is empty")
    return row


def _check_order(roles: Sequence[Role]) -> None:
    """Raise ValueError unless turns alternate after at most one system turn and end with an answer."""
    spoken = roles[1:] if roles[:1] == ["system"] else list(roles)
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError(
            f"the turns are {', '.join(roles)}: user and assistant must alternate after at most one system turn, and "
            "the last must be an answer"
        )


def _find_turns(values: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]] | None:
    found = [values[name] for name in names if values.get(name) is not None]
    if not found:
        return None
    turns = json.loads(found[0]) if isinstance(found[0], str) and found[0].startswith("[") else found[0]
    if turns == []:
        raise ValueError("the conversation has no turn")
    if not is_turns(turns):
        raise ValueError("the conversation must be a list of turns, each with a role")
    return list(turns)


def _parse_caption(values: Mapping[str, Any], template: str) -> tuple[TextTurn, ...]:
    caption = next((values[name] for name in _CAPTIONS if values.get(name) is not None), None)
    if caption is None:
        raise ValueError("neither turns (conversations, messages), a caption, nor a pair (chosen, rejected)")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("the caption is empty")
    return (TextTurn("user", template), TextTurn("assistant", caption))


def _parse_pair(values: Mapping[str, Any], reader: _TurnReader) -> Dialogue:
    """Parse ours and TRL's (prompt, chosen, rejected) or ms-swift's form (messages, rejected_response)."""
    if values.get("rejected_response") is not None:
        *before, last = reader.read(_find_turns(values, _TURNS) or [])
        if last.role != "assistant":
            raise ValueError("the last turn must be the chosen answer to rejected_response")
        return _make_pair(before, last.text, values["rejected_response"])
    chosen, rejected = (_read_answer(values.get(name), reader) for name in ("chosen", "rejected"))
    prompt = values.get("prompt")
    if isinstance(prompt, str) and not prompt.startswith("["):
        turns: Sequence[TextTurn] = [TextTurn("user", prompt)]
    else:
        turns = reader.read(_find_turns(values, ("prompt", *_TURNS)) or [])
    if not turns and chosen[0] != rejected[0]:
        raise ValueError("chosen and rejected begin with different prompts")
    return _make_pair(turns or chosen[0], chosen[1], rejected[1])


def _read_answer(value: Any, reader: _TurnReader) -> tuple[tuple[TextTurn, ...], str]:
    """Return the turns before an answer, if it comes with them, and its text."""
    if value is None or isinstance(value, str):
        return (), value or ""
    if not is_turns(value):
        raise ValueError("chosen and rejected must be text or turns that end with an answer")
    *before, last = reader.read(value)
    return tuple(before), last.text if last.role == "assistant" else ""


def _make_pair(turns: Sequence[TextTurn], chosen: str, rejected: Any) -> Dialogue:
    """Return the pair. Raise ValueError if it carries no signal."""
    if not isinstance(rejected, str) or not rejected.strip() or not chosen.strip():
        raise ValueError("the chosen or the rejected answer is empty")
    if chosen == rejected:
        raise ValueError("the chosen and the rejected answer are identical: the pair carries no preference")
    if not turns or turns[-1].role != "user":
        raise ValueError("the prompt of a pair must end with a turn of the user")
    _check_order([*(turn.role for turn in turns), "assistant"])
    return Dialogue(tuple(turns), chosen=chosen, rejected=rejected)


def _add_system(row: Dialogue, values: Mapping[str, Any]) -> Dialogue:
    system = values.get("system")
    if not isinstance(system, str) or not system or row.turns[0].role == "system":
        return row
    return replace(row, turns=(TextTurn("system", system), *row.turns))


def _parse_max_tiles(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"max_partition is {value!r}; give the largest number of tiles, from 1")


def _add_media(row: Dialogue, values: Mapping[str, Any], held: Sequence[ImageRef], refer: Refer) -> Dialogue:
    """Add the media: those of the source and of the turns, else those in the row's own fields."""
    frames, videos = _to_list(values.get("video_frames")), _list_values(values, _VIDEOS)
    if frames:
        return replace(row, media=tuple(map(refer, frames)), kind="frames")
    is_video = bool(videos) or any(_VIDEO_MARK in turn.text for turn in row.turns if turn.role == "user")
    media = tuple(held) or tuple(map(refer, videos or _list_values(values, _IMAGES)))
    if is_video and len(media) != 1:
        raise ValueError(f"a row about a video must have exactly one and nothing else, not {len(media)}")
    return replace(row, media=media, kind="video" if is_video else "images")


def _list_values(values: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    return next((found for name in names if (found := _to_list(values.get(name)))), [])


def _to_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _mark_media(row: Dialogue) -> Dialogue:
    """Put the mark of a video first if its row has none. Raise ValueError for several."""
    if row.kind == "images":
        return row
    num_marks = sum(turn.text.count(_VIDEO_MARK) for turn in row.turns if turn.role == "user")
    if num_marks > 1:
        raise ValueError(f"the turns mark {count_nouns(num_marks, 'video')}; a row holds one")
    return row if num_marks or _count_marks(row.turns) else _prepend(row, f"{_VIDEO_MARK}\n")


def place_marks(row: Dialogue, num_images: int) -> Dialogue:
    """Return the row with one `<image>` per image or frame. Raise ValueError if the turns mark another number."""
    if row.kind != "images":
        marks = "\n".join([IMAGE_MARK] * num_images)
        turns = (TextTurn(r, t.replace(_VIDEO_MARK, marks) if r == "user" else t) for r, t in row.turns)
        row = replace(row, turns=tuple(turns))
    num_marks = _count_marks(row.turns)
    if num_marks == 0 and num_images and row.kind == "images":
        numbered = [f"Image {number}: {IMAGE_MARK}\n" for number in range(1, num_images + 1)]
        return _prepend(row, "".join(numbered) if num_images > 1 else f"{IMAGE_MARK}\n")
    if num_marks != num_images:
        raise ValueError(
            f"the turns mark {count_nouns(num_marks, 'image')} with {IMAGE_MARK}, but the row has {num_images}"
        )
    return row


def _count_marks(turns: Sequence[TextTurn]) -> int:
    return sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")


def _prepend(row: Dialogue, marks: str) -> Dialogue:
    first = next(number for number, turn in enumerate(row.turns) if turn.role == "user")
    asked = TextTurn("user", marks + row.turns[first].text)
    return replace(row, turns=(*row.turns[:first], asked, *row.turns[first + 1 :]))
