"""Ask a benchmark's questions as VLMEvalKit's Ovis2 class does (vlmeval/vlm/ovis/ovis.py), to the character."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ovis_model.inputs.prompt import CHAIN_OF_THOUGHT, IMAGE_MARK
from ovis_model.wording import count_nouns
from pipelines.evaluation.scoring.options import assign_letters, get_options
from pipelines.evaluation.scoring.scores import Item, is_missing, parse_list

DIRECT = "Answer with the option's letter from the given choices directly."
_SHORT = "Answer the question using a single word or phrase."
_LANGUAGE = "Answer the question using a word or phrase in the language of the question."
_CAREFULLY = "Provide a step-by-step solution to the problem carefully."
_VIDEO_MME = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
_MVBENCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question."
)
_MLVU = "Carefully watch this video and pay attention to every detail. Based on your observations, "
_MMBENCH_VIDEO = (
    "You will be provided with {} separate frames uniformly sampled from a video, the frames are provided in "
    "chronological order of the video.\n"
    "Please analyze these images and provide the answer to the question about the video content.\n"
    "Please directly reply with your response to the only question."
)
_NUMBERED_MARK = re.compile(r"<image (\d)>")
_ANSWER_IS = re.compile("the answer is", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """A query with one `<image>` mark per image; `images` are their places (from 0) in the item, in order."""

    query: str
    images: tuple[int, ...]


@dataclass(frozen=True)
class Style:
    """What a prompt depends on besides the item: the model's size, and whether to reason first."""

    size: str
    chain_of_thought: bool = False


ImagePrompt = Callable[[Item, Style], str]
VideoPrompt = Callable[[Item, int], str]
"""An item and the number of frames -> the query, with a mark per frame."""


def ask_choice(item: Item, style: Style) -> str:
    """Return hint, question and options; an open question, without options, as it is."""
    options = get_options(item)
    hint = [] if is_missing(item.get("hint")) else [str(item["hint"])]
    lines = [*hint, str(item["question"]), *(f"{letter}. {text}" for letter, text in options.items())]
    return "\n".join([*lines, *([CHAIN_OF_THOUGHT if style.chain_of_thought else DIRECT] if options else [])])


def ask_yes_no(item: Item, style: Style) -> str:
    """Return HallusionBench's question; the 34B model is told the two answers."""
    return f"{item['question']}{' Please answer yes or no.' if style.size == '34B' else ''}\n{_SHORT}"


def ask_plainly(item: Item, style: Style) -> str:
    """Return the question alone, or with the request for reasoning (OCRBench, MathVista)."""
    return f"{item['question']}\n{CHAIN_OF_THOUGHT}" if style.chain_of_thought else str(item["question"])


def ask_mmvet(item: Item, style: Style) -> str:
    """Return MMVet's question, whose request for reasoning names no form of the answer."""
    return f"{item['question']}\n{_CAREFULLY}" if style.chain_of_thought else str(item["question"])


def ask_mtvqa(item: Item, style: Style) -> str:
    """Return MTVQA's question, to be answered in its language."""
    return f"{item['question']}\n{_LANGUAGE}"


def place_images(text: str, num_images: int, *, numbered: bool = False) -> Prompt:
    """Return the query with the images first; if `numbered`, each where `<image k>` is in the text (MMMU).

    Raise ValueError for a number that no image has.
    """
    if numbered and _NUMBERED_MARK.search(text):
        return _place_numbered(text, num_images)
    if num_images <= 1:
        return Prompt(f"{IMAGE_MARK}\n{text}" if num_images else text, tuple(range(num_images)))
    return Prompt("\n".join([*[IMAGE_MARK] * num_images, text.strip()]), tuple(range(num_images)))


def _place_numbered(text: str, num_images: int) -> Prompt:
    first, *others = _NUMBERED_MARK.split(text)
    numbers, texts = [int(number) for number in others[::2]], others[1::2]
    if wrong := [number for number in numbers if not 1 <= number <= num_images]:
        raise ValueError(f"the question names <image {wrong[0]}>, but the item has {count_nouns(num_images, 'image')}")
    chunks = [first.strip()]
    for text_after in texts:
        chunks += [IMAGE_MARK, text_after.strip()]
    return Prompt("\n".join(chunks), tuple(number - 1 for number in numbers))


def ask_video_mme(item: Item, num_frames: int, subtitles: str | None = None) -> str:
    """Return Video-MME's prompt; `subtitles` are the lines shown with the frames, None for the setting without."""
    shown = "" if subtitles is None else f"This video's subtitles are listed below:\n{subtitles}\n"
    candidates = "\n".join(map(str, parse_list(item["candidates"])))
    frames = "These are the frames of a video. "
    return _join_frames(
        num_frames, f"{frames}{shown}{_VIDEO_MME}", f"Question: {item['question']}\n{candidates}\nAnswer:"
    )


def ask_mvbench(item: Item, num_frames: int) -> str:
    """Return MVBench's prompt, which begins the answer."""
    return _join_frames(num_frames, _MVBENCH, _list_options(item), "Only give the best option.", "Best option:(")


def ask_mlvu(item: Item, num_frames: int) -> str:
    """Return the prompt of MLVU's multiple-choice half."""
    instruction = f"{_MLVU}select the best option that accurately addresses the question."
    return _join_frames(num_frames, instruction, _list_options(item), "Only give the best option.")


def ask_mlvu_open(item: Item, num_frames: int) -> str:
    """Return the prompt of MLVU's open half."""
    return _join_frames(num_frames, f"{_MLVU}answer the given questions.", str(item["question"]))


def ask_mmbench_video(item: Item, num_frames: int) -> str:
    """Return MMBench-Video's prompt for one question."""
    return _join_frames(num_frames, _MMBENCH_VIDEO.format(num_frames), f"Question: {item['question']}\nAnswer:")


def ask_temp_compass(item: Item, num_frames: int) -> str:
    """Return TempCompass's prompt for the item's type of task."""
    match item["task_type"]:
        case "yes_no":
            return _join_frames(num_frames, str(item["question"]), "Please answer yes or no:")
        case "captioning":
            return _join_frames(num_frames, str(item["question"]))
        case _:
            question = "\n".join([str(item["question"]), *map(str, parse_list(item["candidates"]))])
            return _join_frames(num_frames, question, "Please directly give the best option:")


def _list_options(item: Item) -> str:
    options = assign_letters(parse_list(item["candidates"]))
    lines = [f"({letter}) {text}" for letter, text in options.items()]
    return "\n".join([f"Question: {item['question']}", "Options:", *lines])


def _join_frames(num_frames: int, *texts: str) -> str:
    return "\n".join([*[IMAGE_MARK] * num_frames, *(text.strip() for text in texts)])


def cut_reasoning(query: str, answer: str) -> str:
    """Return what follows the first "the answer is" in an answer to a query that asked for reasoning."""
    match = _ANSWER_IS.search(answer) if CHAIN_OF_THOUGHT.partition(", and ")[2] in query else None
    return answer[match.end() :].lstrip(":").strip() if match else answer
