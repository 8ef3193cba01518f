"""Host side: text and images -> token ids, patches, and every index array that the device code takes.

Done once for a prompt; nothing downstream tokenises or looks at an image again (TRL #6401, EasyR1 #392).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from capcur_jax.errors import InputError
from capcur_jax.models import config as config_lib
from capcur_jax.models.config import ModelConfig, VisionConfig

# Tokens of Qwen's vocabulary that a sampler must never produce: they crash the next forward pass (EasyR1 #110).
VISION_PLACEHOLDERS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
# A noncharacter of Unicode, for use inside of programs: it stands in control tokens that are text.
_TEXT = "\ufdd0"


class BadInput(ValueError):
    """A prompt that can't be used: names the image or the limit and the remedy. The run skips and counts it."""


class BadImage(BadInput):
    """The image is missing or can't be read."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the model."""

    tokens: np.ndarray  # [T] int32, image tokens expanded
    positions: np.ndarray  # [3, T] int32
    next_position: int
    visual_index: np.ndarray  # [T] int32 into this prompt's own merged features, -1 at text
    patches: np.ndarray  # [P, channels x pixels] uint8; the frames of a still image are all the same
    grids: tuple[tuple[int, int, int], ...]  # (time, rows, columns) of patches, an image each

    def __len__(self) -> int:
        return len(self.tokens)


def mrope_positions(
    tokens: np.ndarray, grids: Sequence[tuple[int, int, int]], image_token: int, merge: int
) -> tuple[np.ndarray, int]:
    """MRoPE positions [3, T] of a prompt and the position that follows it (max + 1).

    Text advances all three axes together; an image's tokens share one time and count rows and columns from there,
    and the text after it goes on from the image's longer side.
    """
    positions = np.zeros((3, len(tokens)), np.int32)
    at = current = 0
    images = iter(grids)
    while at < len(tokens):
        if tokens[at] != image_token:
            positions[:, at] = current
            at, current = at + 1, current + 1
            continue
        time, height, width = next(images)
        rows, columns = height // merge, width // merge
        count = time * rows * columns
        grid = np.stack(np.meshgrid(np.arange(time), np.arange(rows), np.arange(columns), indexing="ij"))
        positions[:, at : at + count] = grid.reshape(3, -1) + current
        at, current = at + count, current + max(rows, columns)
    return positions, int(positions.max(initial=-1)) + 1


def _merge_order(height: int, width: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of an image's patches in merge-block order, [height x width] each."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")

    def order(x):
        return x.reshape(height // merge, merge, width // merge, merge).transpose(0, 2, 1, 3).reshape(-1)

    return order(rows), order(columns)


def _taps(index: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The two table entries and weights of bilinear interpolation along one axis (ends aligned)."""
    source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    floor = np.floor(source)
    taps = np.clip(floor.astype(np.int32)[:, None] + np.arange(2), 0, side - 1)
    fraction = (source - floor)[:, None]
    return taps, np.concatenate([1 - fraction, fraction], axis=1).astype(np.float32)


def table_taps(grid: tuple[int, int, int], config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """For one image: entries of the learned positions [P, 4] and their weights [P, 4], in merge-block order."""
    time, height, width = grid
    rows, columns = _merge_order(height, width, config.merge_size)
    row_taps, row_weights = _taps(rows, height, config.table_side)
    column_taps, column_weights = _taps(columns, width, config.table_side)
    index = (row_taps[:, :, None] * config.table_side + column_taps[:, None, :]).reshape(-1, 4)
    weight = (row_weights[:, :, None] * column_weights[:, None, :]).reshape(-1, 4)
    return np.tile(index, (time, 1)), np.tile(weight, (time, 1))


def coordinates(grid: tuple[int, int, int], config: VisionConfig) -> np.ndarray:
    """(row, column) of each patch of one image [P, 2], in merge-block order."""
    time, height, width = grid
    return np.tile(np.stack(_merge_order(height, width, config.merge_size), axis=-1).astype(np.int32), (time, 1))


def pixels(values: np.ndarray, places: np.ndarray, config: VisionConfig) -> np.ndarray:
    """Patches of one image [P, channels x pixels] laid out as the image [height, width, channels]; what is not there is
    0.

    `values`: the patches themselves, or anything of their shape, such as a gradient. `places`: (row, column) of each,
    as `coordinates` gives them.
    """
    p = config.patch_size
    height, width = p * (places.max(axis=0) + 1)
    patches = values.reshape(len(values), -1, p, p).transpose(0, 2, 3, 1)
    image = np.zeros((height, width, patches.shape[-1]), patches.dtype)
    for (row, column), patch in zip(places, patches, strict=True):
        image[p * row : p * (row + 1), p * column : p * (column + 1)] = patch
    return image


def window_order(grid: tuple[int, int, int], config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """For one image's merged features [F]: the order that puts windows one after the other, and each one's window.

    Windows are squares of `config.window` merged features, cut off at the image's right and lower edges; frames keep
    theirs apart. Without windows the order is the image's own and the windows are its frames.
    """
    time, height, width = (n // m for n, m in zip(grid, (1, config.merge_size, config.merge_size), strict=True))
    frame, row, column = (x.reshape(-1) for x in np.indices((time, height, width), np.int32))
    side = config.window or max(height, width)
    across = -(-width // side)
    window = (frame * -(-height // side) + row // side) * across + column // side
    order = np.argsort(window, kind="stable")
    return order, window[order]


def _chat_template(directory: Path) -> str | None:
    """The template of chat_template.json, which counts before the tokenizer's own: the published Qwen2.5-VL tokenizers
    bring one that knows of tools and not of images."""
    file = directory / "chat_template.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} holds no chat template; copy the file again") from None


class Processor:
    """A checkpoint's tokenizer, chat template and image processor (transformers' own, the PIL one)."""

    def __init__(self, tokenizer, image_processor, config: ModelConfig):
        self.tokenizer, self.images, self.config = tokenizer, image_processor, config
        self._one_at_a_time = threading.Lock()
        self.end_tokens = tuple(self._ids(END_TOKENS))
        self.banned_tokens = tuple(self._ids(VISION_PLACEHOLDERS))
        self.pad_token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_tokens[-1]
        controls = set(tokenizer.all_special_tokens) | {*END_TOKENS, *VISION_PLACEHOLDERS}
        controls |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # The longest first: one may begin another.
        self._control = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))))
        self._control_ids = frozenset(self._ids(sorted(controls)))
        if not self.end_tokens:
            raise InputError(f"the tokenizer knows none of the end tokens {END_TOKENS}: not a Qwen tokenizer")
        token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if number >= config.text.vocabulary:
            raise InputError(
                f"the tokenizer's token {token!r} has the id {number}, but the embedding has {config.text.vocabulary} "
                "rows (vocab_size in config.json): a token was added and the model not resized. Resize its embeddings "
                "(transformers' resize_token_embeddings) and save it again, or take the token out of tokenizer.json"
            )

    def _ids(self, names: Sequence[str]) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        return [vocabulary[name] for name in names if name in vocabulary]

    @classmethod
    def from_directory(cls, directory: str | Path, min_pixels: int = 0, max_pixels: int = 0) -> Processor:
        """Loads what DIRECTORY holds; `min_pixels` / `max_pixels` (0: the checkpoint's own) bound an image's size."""
        # Imported here: transformers costs seconds, and models/ is imported by code that needs no tokenizer.
        from transformers import AutoImageProcessor, AutoTokenizer

        config = config_lib.from_directory(directory)
        # Newer writers keep the image settings in processor_config.json.
        if not any(
            (Path(directory) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
        ):
            raise InputError(f"{directory}: preprocessor_config.json is missing; copy the whole checkpoint")
        # Without its files transformers builds an empty tokenizer of Qwen's class and says nothing.
        if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise InputError(f"{directory}: tokenizer.json is missing; copy the whole checkpoint")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{directory}: no usable tokenizer ({error}); copy tokenizer.json too") from None
        tokenizer.chat_template = _chat_template(Path(directory)) or tokenizer.chat_template
        if not tokenizer.chat_template:
            raise InputError(f"{directory}: the tokenizer has no chat template; copy chat_template.jinja too")
        # backend="pil": the torchvision one gives slightly different pixels and needs PyTorch.
        try:
            images = AutoImageProcessor.from_pretrained(str(directory), local_files_only=True, backend="pil")
        except (OSError, ValueError) as error:
            raise InputError(f"{directory}: preprocessor_config.json is not usable ({error}); copy it again") from None
        read = {key: getattr(images, key) for key in ("patch_size", "temporal_patch_size", "merge_size")}
        for key, theirs in (read | config_lib.byte_values(vars(images))).items():
            ours = getattr(config.vision, key)
            if theirs != ours:
                raise InputError(
                    f"{directory}: {key} is {theirs} by preprocessor_config.json and {ours} by config.json; "
                    "copy the whole checkpoint"
                )
        size = dict(images.size)
        images.size = {
            "shortest_edge": min_pixels or size["shortest_edge"],
            "longest_edge": max_pixels or size["longest_edge"],
        }
        return cls(tokenizer, images, config)

    def render(self, parts: Sequence[str | None], system: str = "") -> str:
        """The chat prompt of one user turn; `parts` are texts and None for an image, in order.

        A control token in a text stays text (`tokenize`): it holds a mark that no tokenizer knows.
        """
        texts = [None if part is None else self.as_text(part) for part in parts]
        content = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in texts]
        messages = [{"role": "system", "content": self.as_text(system)}] if system else []
        messages.append({"role": "user", "content": content})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def tokenize(self, text: str, images: int) -> np.ndarray:
        """Token ids of a rendered prompt, whose control tokens are the chat template's own. Raises BadInput unless it
        holds one placeholder for each image, and where the tokenizer can't write a control token as text."""
        if _TEXT in text:
            ids, at = [], 0
            for match in self._control.finditer(text):
                ids += self.text_tokens(text[at : match.start()].replace(_TEXT, "")) + self._ids([match[0]])
                at = match.end()
            ids += self.text_tokens(text[at:].replace(_TEXT, ""))
        else:
            ids = self._tokenized(text, split=False)
        tokens = np.asarray(ids, np.int32)
        if (tokens == self.config.published.get("video_token_id")).any():
            raise BadInput("the prompt holds a video placeholder; videos are not supported, images are")
        placeholders = int((tokens == self.config.image_token).sum())
        if placeholders != images:
            raise BadInput(
                f"{placeholders} image placeholders for {images} images; give the question one mark an image (or the "
                "chat template does not write images)"
            )
        return tokens

    def text_tokens(self, text: str) -> list[int]:
        """Token ids of a text; a control token in it is text. Raises BadInput where the tokenizer can't write that."""
        tokens = self._tokenized(text, split=True)
        wrong = sorted(self._control_ids.intersection(tokens))
        if wrong:
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(wrong))
            raise BadInput(f"the text holds {names}, which the tokenizer can't write as text; take it out")
        return tokens

    def _tokenized(self, text: str, split: bool) -> list[int]:
        """One call at a time: transformers keeps the setting in the tokenizer, where other threads meet it."""
        with self._one_at_a_time:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]

    def as_text(self, text: str) -> str:
        """The text, with a mark inside each control token: `tokenize` takes it for text. Raises BadInput where the
        text holds the mark."""
        if _TEXT in text:
            raise BadInput("the text holds U+FDD0, which is no character; take it out")
        return self._control.sub(lambda match: match[0][0] + _TEXT + match[0][1:], text)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels at which the model sees an image of that size: whole patches that merge, within
        the bounds. Raises ValueError: it is too narrow."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        limits = self.images.size["shortest_edge"], self.images.size["longest_edge"]
        found = smart_resize(height, width, self.images.patch_size * self.images.merge_size, *limits)
        # Rounding may make it narrower than what is allowed: a rollout server, which sees the result, would refuse it.
        if max(found) > 200 * min(found):
            raise ValueError(f"the model would see {found[1]} x {found[0]}, and no side may be 200 times the other")
        return found

    def prepare(self, text: str, images: Sequence[Image.Image | np.ndarray] = ()) -> Prompt:
        """Token ids, patches and positions of a rendered prompt with one image placeholder per image.

        Args:
            images: pictures, which are resized, or else arrays [height, width, 3] uint8 whose size is by `resized`.
        """
        tokens = self.tokenize(text, len(images))
        vision, image_token = self.config.vision, self.config.image_token
        merge = vision.merge_size
        patches, grids = np.zeros((0, vision.patch_bytes), np.uint8), ()
        if images:
            # Arrays are not resized again: of narrow images a second time would not find the size of the first.
            arrays = {"do_resize": False, "input_data_format": "channels_last"}
            arrays = arrays if isinstance(images[0], np.ndarray) else {}
            # As bytes: the tower makes numbers of them, once for each pass instead of four bytes for each on the way.
            done = self.images(images=list(images), return_tensors="np", do_rescale=False, do_normalize=False, **arrays)
            frames = done["pixel_values"].reshape(-1, vision.channels, vision.temporal_patch_size, vision.patch_size**2)
            patches = frames[:, :, 0].reshape(-1, vision.patch_bytes).astype(np.uint8)
            grids = tuple(tuple(int(n) for n in grid) for grid in done["image_grid_thw"])
            counts = np.ones(len(tokens), np.int64)
            counts[tokens == image_token] = [t * h * w // merge**2 for t, h, w in grids]
            tokens = np.repeat(tokens, counts)
        positions, following = mrope_positions(tokens, grids, image_token, merge)
        visual = np.where(tokens == image_token, np.cumsum(tokens == image_token) - 1, -1).astype(np.int32)
        return Prompt(tokens, positions, following, visual, patches, grids)

    @functools.cached_property
    def opened(self) -> str:
        """What the chat template has begun of every response, as templates of thinking models do: "<think>", with the
        white space behind it, or ""."""
        tail = self.render(["?"]).rpartition("<think>")
        return tail[1] + tail[2] if tail[1] and not tail[2].strip() else ""

    def response(self, tokens: Sequence[int]) -> str:
        """The whole response of sampled tokens, as rewards judge it: with what the template has `opened`."""
        return self.opened + self.decode(tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of response tokens, end tokens and other special tokens left out."""
        return self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)
