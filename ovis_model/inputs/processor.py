"""Build requests from text and images; detokenize output ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from ovis_model.checkpoint import fetch_checkpoint
from ovis_model.config import OvisConfig
from ovis_model.inputs.prompt import DEFAULT_SYSTEM_PROMPT, IMAGE_MARK, ChatTokenizer, build_image_query, expand_atoms
from ovis_model.inputs.tiling import choose_grid, tile_images
from ovis_model.tokenizer import detokenize, load_tokenizer
from ovis_model.types import Request


class Processor:
    """The CPU half of Ovis2. Knows the checkpoint's tokenizer and sizes, not its weights."""

    def __init__(self, config: OvisConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._chat = ChatTokenizer(tokenizer)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, revision: str | None = None) -> Processor:
        """Load the processor of a checkpoint in either layout, without its weights.

        `checkpoint.fetch_checkpoint` explains the arguments. Raise ValueError if the checkpoint cannot be found or is
        not an Ovis2.
        """
        directory = fetch_checkpoint(str(path_or_id), revision, weights=False)
        return cls(OvisConfig.from_directory(directory), load_tokenizer(directory))

    def build_request(
        self, text: str, images: Sequence[Image.Image] = (), max_tiles: int = 9, system_prompt: str | None = None
    ) -> Request:
        """Build the request that asks `text` about `images`, each cut into at most `max_tiles` tiles and an overview.

        `text` contains one `<image>` mark per image, or none: then the images come first. Raise ValueError for another
        number of marks, for an empty image and for text that is not Unicode.
        """
        rgb_images = [_convert_to_rgb(image) for image in images]
        ids = self.encode_prompt(text, [image.size for image in rgb_images], max_tiles, system_prompt)
        [request] = self.build_requests([ids], rgb_images, max_tiles)
        return request

    def build_requests(
        self, prompts: Sequence[Sequence[int]], images: Sequence[Image.Image], max_tiles: int = 9
    ) -> list[Request]:
        """Build one request per prompt about the same RGB `images`.

        `prompts` are ids from `encode_prompt` for the sizes of these images. The requests form one group, so the engine
        encodes the images once.
        """
        return self.join_tiles(prompts, *tile_images(images, max_tiles, self.config.vision.image_size))

    def join_tiles(
        self, prompts: Sequence[Sequence[int]], tiles: NDArray[np.uint8], sizes: NDArray[np.int32]
    ) -> list[Request]:
        """Build one request per prompt about the same tiles uint8[N, 3, S, S] of sizes int32[N, 2]."""
        group, per_tile = uuid4(), self.config.vision.tokens_per_tile
        return [Request(expand_atoms(ids, per_tile), tiles, sizes, group) for ids in prompts]

    def encode_prompt(
        self,
        text: str,
        image_sizes: Sequence[tuple[int, int]] = (),
        max_tiles: int = 9,
        system_prompt: str | None = None,
    ) -> list[int]:
        """Encode the prompt of `build_request` for images of (width_px, height_px); each tile is one atom.

        `build_requests` expands an atom to the placeholders of its visual tokens.
        """
        tile_size = self.config.vision.image_size
        grids = [choose_grid(width, height, max_tiles, tile_size) for width, height in image_sizes]
        query = text if IMAGE_MARK in text else build_image_query(text, len(grids))
        return self._chat.encode_prompt(query, grids, DEFAULT_SYSTEM_PROMPT if system_prompt is None else system_prompt)

    def encode_answer(self, text: str) -> list[int]:
        """Encode a whole answer: the text and the end of the turn. Raise ValueError for text that is not Unicode."""
        return self._chat.encode_answer(text)

    def detokenize(self, ids: Iterable[int]) -> str:
        """Convert output ids to text, without special tokens."""
        return detokenize(self._tokenizer, ids)


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    # As in the original, colours under transparency are kept. convert() would copy an image that is already RGB.
    return image if image.mode == "RGB" else image.convert("RGB")
