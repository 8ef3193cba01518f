"""The models of the perception filter: served ones, and local checkpoints run by this project's own engine."""

from __future__ import annotations

import functools
import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from PIL import Image

from capcur_jax.data.problem import IMAGE_MARK, Drop
from capcur_jax.errors import InputError
from capcur_jax.hub import download
from capcur_jax.records.journal import fingerprint
from capcur_jax.rollout.chat import CONTROL_TOKEN, Chat, Failed, ask_all, image_part

PASSES = ("image", "caption")
SERVED = "served:"


class Asked(NamedTuple):
    """One question in one pass."""

    name: str  # the row's id
    parts: tuple[str | Path, ...]  # texts, and files of images where they stand
    bare: bool  # goes to the model as it is, without a chat template


class How(NamedTuple):
    """How all models are asked."""

    max_new_tokens: int = 8
    downsample: int = 1  # images are this much smaller along each side
    max_pixels: int = 0  # larger images are shrunk to this many; 0: to the model's bound
    batch: int = 16  # of a local model
    served: Mapping[str, Any] = MappingProxyType({})  # of a served one: `Chat`'s further arguments


Done = Callable[[Asked, str | Drop], None]


class FilterModel(Protocol):
    """A model that answers greedily. A context manager: it holds memory only inside."""

    name: str
    settings: dict[str, Any]  # what its answers depend on besides the questions

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: Any) -> None: ...

    def answer(self, questions: Sequence[Asked], done: Done) -> None:
        """Calls `done` with each question's reply, or with why there is none, in any order. Raises InputError,
        RolloutError when it can't go on."""


def open_models(specs: Sequence[str], how: How) -> list[FilterModel]:
    """The models that the specs name, "served:URL,NAME" or a checkpoint's directory; none is loaded yet.

    Raises:
      InputError: a spec that is neither, or one that is there twice.
    """
    if not specs:
        raise InputError("the filter needs a model; give --model served:URL,NAME or --model CHECKPOINT")
    if len(set(specs)) < len(specs):
        raise InputError("--model names one model twice; give each once")
    models = [_served(spec, how) if spec.startswith(SERVED) else LocalModel(spec, how) for spec in specs]
    names = [model.name for model in models]
    for model, spec in zip(models, specs, strict=True):
        if names.count(model.name) > 1:
            model.name = spec  # "final" and "final": the whole path tells them apart
    return models


def load(path: Path, how: How) -> Image.Image:
    """The image as the models get it. Raises BadImage."""
    from capcur_jax.data.images import load_image

    image = load_image(str(path))
    size = _shrunk(image.size, how)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _shrunk(size: tuple[int, int], how: How) -> tuple[int, int]:
    """Of (width, height), in any order."""
    size = tuple(max(1, side // how.downsample) for side in size)
    if how.max_pixels and math.prod(size) > how.max_pixels:
        scale = math.sqrt(how.max_pixels / math.prod(size))
        size = tuple(max(1, int(side * scale)) for side in size)
    return size


def _bad(asked: Asked, error: Exception) -> Drop:
    from capcur_jax.models.inputs import BadImage

    reason = "broken image" if isinstance(error, BadImage) else "unusable prompt"
    return Drop(f"row {asked.name}", reason, str(error)[:300])


# ---------------------------------------------------------------------- served


def _served(spec: str, how: How) -> ServedModel:
    parts = spec.removeprefix(SERVED).split(",")
    count = 0
    while count < len(parts) and parts[count].startswith(("http://", "https://")):
        count += 1
    name = ",".join(parts[count:]).strip()
    if not count or not name:
        raise InputError("--model served:... lacks an address or a name; give served:http://HOST:PORT,NAME")
    return ServedModel(parts[:count], name, how)


class ServedModel:
    """Behind an OpenAI-compatible server (several: of the same model)."""

    def __init__(self, addresses: Sequence[str], name: str, how: How):
        self.name, self._addresses, self._how = name, addresses, how
        self.settings = {"model": name}
        self._model = name

    def __enter__(self) -> ServedModel:
        return self

    def __exit__(self, *_) -> None:
        pass

    def answer(self, questions: Sequence[Asked], done: Done) -> None:
        chat = functools.partial(Chat, self._addresses, self._model, **self._how.served)

        def finished(asked: Asked, result: str | Drop | Failed) -> None:
            failed = isinstance(result, Failed)
            done(asked, Drop(f"row {asked.name}", result.reason, result.detail) if failed else result)

        ask_all(chat, questions, self._ask, finished)

    async def _ask(self, chat: Chat, asked: Asked) -> str | Drop:
        import asyncio

        from capcur_jax.models.inputs import BadInput

        limits = {"max_tokens": self._how.max_new_tokens, "temperature": 0.0}
        texts = [part for part in asked.parts if isinstance(part, str)]
        token = next((found[0] for text in texts if (found := CONTROL_TOKEN.search(text))), "")
        if token:
            detail = f"the text holds {token}, which a server takes for a token of its own; take it out"
            return Drop(f"row {asked.name}", "unusable prompt", detail)
        if asked.bare:
            return (await chat.complete("".join(map(str, asked.parts)), **limits)).text
        content: list[dict] = []
        try:
            for part in asked.parts:
                if isinstance(part, Path):
                    # In a thread: decoding a photo takes longer than many an answer.
                    content.append(await asyncio.to_thread(lambda path=part: image_part(load(path, self._how))))
                else:
                    content.append({"type": "text", "text": part})
        except BadInput as error:
            return _bad(asked, error)
        said = content if any(isinstance(part, Path) for part in asked.parts) else "".join(map(str, asked.parts))
        return (await chat.ask([{"role": "user", "content": said}], **limits)).text


# ---------------------------------------------------------------------- local


class LocalModel:
    """A checkpoint of a directory or of the Hub, on this process's devices (its weights are split over them)."""

    def __init__(self, spec: str, how: How):
        directory = download.checkpoint(spec, "--model")
        if not (directory / "config.json").is_file():
            raise InputError(
                f"--model {spec[:200]}: no checkpoint directory (config.json is not in it); give one, OWNER/NAME, or "
                "served:http://HOST:PORT,NAME"
            )
        self.name, self._directory, self._how = download.version(spec, directory).partition("@")[0], directory, how
        self.name = self.name or directory.resolve().name
        self.settings = {"model": self.name, "weights": fingerprint(directory)}
        self._model = self._processor = None

    def __enter__(self) -> LocalModel:
        import jax
        import jax.numpy as jnp

        from capcur_jax.devices import drivers, sharding
        from capcur_jax.models import huggingface
        from capcur_jax.models.inputs import Processor

        drivers.without_drivers_cpu()
        drivers.keep_programs()
        dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
        self._processor = Processor.from_directory(self._directory)
        mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
        self._model = huggingface.load(self._directory, mesh=mesh, dtype=dtype, param_dtype=dtype)
        return self

    def __exit__(self, *_) -> None:
        self._model = self._processor = None
        gc.collect()  # the next model needs the memory

    def answer(self, questions: Sequence[Asked], done: Done) -> None:
        """Largest first: what does not fit shows itself at once, and prompts of a batch are alike."""
        from capcur_jax.models.inputs import BadInput

        sizes = []
        for asked in questions:
            try:
                sizes.append((self._measure(asked), asked))
            except BadInput as error:
                done(asked, _bad(asked, error))
        sizes.sort(key=lambda one: (-sum(one[0].images), -one[0].tokens))
        if not sizes:
            return
        engine, sampling = self._engine([size for size, _ in sizes])
        images = any(size.images for size, _ in sizes)
        for batch in self._prepared([asked for _, asked in sizes]):
            ready = []
            for asked, prompt in batch:
                if isinstance(prompt, Drop):
                    done(asked, prompt)
                else:
                    ready.append((asked, prompt))
            if not ready:
                continue
            groups = engine.generate([prompt for _, prompt in ready], sampling, 1, 0, images)
            for (asked, _), (sample,) in zip(ready, groups, strict=True):
                done(asked, self._processor.decode(sample.tokens))
        engine.close()

    def _engine(self, sizes: Sequence[Any]) -> tuple[Any, Any]:
        """The engine and how it samples: one program decodes, and at most four read prompts."""
        from capcur_jax.devices import sharding
        from capcur_jax.models.batching import Buckets, rounded_up
        from capcur_jax.rollout.engine import Sampling
        from capcur_jax.rollout.local.engine import LocalEngine

        rows = sharding.row_shards(self._model.mesh)
        slots = rounded_up(min(self._how.batch, len(sizes)), rows)
        prefill, vision = slots // rows, self._processor.config.vision
        buckets = Buckets(()).holding(sizes, prefill, vision, self._model.text.dtype)
        engine = LocalEngine(self._model, self._processor, slots=slots, buckets=buckets, prefill=prefill)
        return engine, Sampling(self._how.max_new_tokens, temperature=0.0)

    def _prepared(self, questions: Sequence[Asked]) -> Iterator[list[tuple[Asked, Any]]]:
        """Batches of prompts (or why there is none), the next one prepared while the device has one."""
        starts = range(0, len(questions), self._how.batch)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

            def begin(start: int) -> list[tuple[Asked, Any]]:
                return [
                    (asked, pool.submit(self._build, asked)) for asked in questions[start : start + self._how.batch]
                ]

            following = begin(0)
            for start in starts:
                batch, following = following, begin(start + self._how.batch)
                yield [(asked, prompt.result()) for asked, prompt in batch]

    def _text(self, asked: Asked) -> str:
        if asked.bare:
            return self._processor.as_text("".join(map(str, asked.parts)))
        return self._processor.render([None if isinstance(part, Path) else part for part in asked.parts])

    def _measure(self, asked: Asked) -> Any:
        """The prompt's size; of images the header is read. Raises BadInput."""
        from capcur_jax.data.images import ImageStore
        from capcur_jax.models.batching import PromptSize
        from capcur_jax.models.inputs import BadImage, BadInput

        paths = [str(part) for part in asked.parts if isinstance(part, Path)]
        vision, patches = self._processor.config.vision, []
        tokens = len(self._processor.tokenize(self._text(asked), len(paths)))
        for path in paths:
            try:
                height, width = self._processor.resized(*_shrunk(ImageStore().size(path), self._how))
            except ValueError as error:
                raise error if isinstance(error, BadInput) else BadImage(f"{path}: {error}") from None
            patches.append(height * width // vision.patch_size**2)
        tokens += sum(count // vision.merge_size**2 - 1 for count in patches)
        published = self._processor.config.published
        context = {**published, **published.get("text_config", {})}.get("max_position_embeddings", 1 << 60)
        if tokens + self._how.max_new_tokens > context:
            raise BadInput(f"{tokens} prompt tokens exceed the checkpoint's {context} positions; lower --max_pixels")
        return PromptSize(tokens, tuple(patches))

    def _build(self, asked: Asked) -> Any:
        from capcur_jax.models.inputs import BadInput

        try:
            images = [load(part, self._how) for part in asked.parts if isinstance(part, Path)]
            return self._processor.prepare(self._text(asked), images)
        except BadInput as error:
            return _bad(asked, error)
        except ValueError as error:  # transformers' own words for an image that is too narrow
            return Drop(f"row {asked.name}", "broken image", str(error)[:300])


def parts_of(text: str, images: Sequence[str]) -> list[str | Path]:
    """A problem's text and images in their order; images come first where the text has no marks."""
    pieces = text.split(IMAGE_MARK)
    if len(pieces) == 1:
        return [*map(Path, images), text]
    parts: list[str | Path] = []
    for piece, image in zip(pieces, [*map(Path, images), None], strict=True):
        parts += [part for part in (piece, image) if part]
    return parts
