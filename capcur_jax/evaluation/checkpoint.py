"""A checkpoint, asked about a benchmark's rows by this project's engines: the local one, or servers started."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capcur_jax import presets
from capcur_jax.errors import InputError
from capcur_jax.evaluation.asking import Asked, Done, Said
from capcur_jax.records.journal import fingerprint

RUN_SECTIONS = ("seed", "mesh", "model", "data", "prompt", "rollout", "reward", "optimizer", "evaluation")


def run_of(checkpoint: Path) -> Path | None:
    """The work directory of the run that exported a checkpoint, WORKDIR/checkpoints/NAME; None: it lies elsewhere."""
    workdir = checkpoint.resolve().parent.parent
    return (
        workdir if checkpoint.resolve().parent.name == "checkpoints" and (workdir / "config.json").is_file() else None
    )


def config_of_run(workdir: Path) -> ConfigDict:
    """What the run in `workdir` was told, as far as asking its model depends on it. Raises InputError."""
    file, config = workdir / "config.json", presets.defaults()
    try:
        stored = dict(json.loads(file.read_text(encoding="utf-8")))
        if "rollout" not in stored:
            raise ValueError("it has no `rollout`")
        for section in RUN_SECTIONS:
            if section in stored:
                _take(config, section, stored[section])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: no config of a run ({error}); name one, --config=FILE") from None
    config.rollout.sglang.colocate = False  # nothing is trained
    config.mesh.gpus = ()
    return config.lock()


def _take(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key to what a JSON file has: lists are tuples in a config. Keys of another version are left out."""
    if key not in config:
        return
    if isinstance(config[key], ConfigDict):
        for name, inner in value.items():
            if key == "sets" and name not in config[key]:
                config[key][name] = presets.problem_set()
            _take(config[key], name, inner)
    else:
        config[key] = _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def plain_config() -> ConfigDict:
    """For a checkpoint that no config was named for. Shapes follow from the questions."""
    import jax

    config, small = presets.defaults(), jax.default_backend() == "cpu"
    config.model.dtype = config.optimizer.parameters = "float32" if small else "bfloat16"
    config.rollout.update({"slots": 32, "prefill": 4})
    return config.lock()


class Checkpoint:
    """An `Answerer`. The model is loaded when the first question is asked: a command that has all replies loads none.

    Args:
      config: engine, mesh, model, pixel limits; its declared shapes are taken, and larger ones where questions need
        them.
      workdir: for the logs of servers.
    """

    def __init__(self, directory: Path, config: ConfigDict, sampling: Any, workdir: Path):
        from capcur_jax import policy
        from capcur_jax.evaluation import local
        from capcur_jax.models.inputs import Processor

        if not (directory / "config.json").is_file():
            raise InputError(f"--checkpoint {directory}: no checkpoint directory (config.json is not in it); give one")
        config = config.copy_and_resolve_references().unlock()
        config.checkpoint = str(directory)
        if policy.engine_kind(config).shares_devices(config):
            raise InputError("config.rollout.sglang.colocate: nothing is trained here; set it to False")
        policy.engine_kind(config).check(config)
        if missing := policy.engine_kind(config).missing(config):
            raise InputError("\n".join(["--checkpoint: its engine needs what is not there:", *missing]))
        self._directory, self._config, self._sampling, self._workdir = directory, config, sampling, workdir
        prompt = config.prompt
        self.processor = Processor.from_directory(directory, prompt.min_pixels, prompt.max_pixels)
        self._sizes: list[Any] = []
        self._images = False
        self._engine: Any = None
        self._builder: Any = None
        self._closing = contextlib.ExitStack()
        self.settings: dict[str, Any] = {
            "engine": config.rollout.engine,
            "checkpoint": fingerprint(directory),
            "dtype": policy.engine_kind(config).dtype(config),
            "seed": config.seed,
            **local.seen(self.processor),
        }

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception) -> None:
        self._closing.__exit__(*exception)

    def prepare(self, questions: Iterable[Asked]) -> None:
        """See `Answerer`: opens the model and its engine."""
        from flax import nnx

        from capcur_jax import policy
        from capcur_jax.data.prompts import PromptBuilder
        from capcur_jax.devices import sharding
        from capcur_jax.models.batching import PromptSize
        from capcur_jax.models.inputs import BadInput

        config = self._config
        mesh = sharding.make_mesh(config.mesh)
        model, opened = policy.open_model(config, self._directory, mesh, lambda line: print(line, file=sys.stderr))
        self._closing.enter_context(opened.images)
        self._builder = PromptBuilder(self.processor, "none", sys.maxsize, sys.maxsize, opened.images)
        sizes = set()
        for question in questions:
            with contextlib.suppress(BadInput):  # `answer` says so
                sizes.add(self._measure(question))
        self._images = any(size.images for size in sizes)
        sizes = sizes or {PromptSize(1)}
        vision, kinds = opened.processor.config.vision, config.model
        buckets = opened.buckets.holding(sizes, config.rollout.prefill, vision, kinds.dtype, kinds.attention)
        opened = opened._replace(buckets=buckets)
        self._engine = policy.open_engine(config, model, opened, self._workdir)
        self._closing.callback(self._engine.close)
        self._engine.update_weights(nnx.split(model)[1], 0)

    def _text(self, question: Asked) -> str:
        parts = [None if isinstance(part, Path) else part for part in question.parts]
        return self.processor.render(parts, question.system)

    def _measure(self, question: Asked) -> Any:
        """The prompt's size. Raises BadInput."""
        from capcur_jax.models.inputs import BadInput

        size = self._builder.prompt_size(self._text(question), question.images)
        published = self.processor.config.published
        context = {**published, **published.get("text_config", {})}.get("max_position_embeddings", sys.maxsize)
        limit = self._sampling.max_new_tokens
        if size.tokens + limit > context:
            raise BadInput(
                f"{size.tokens} prompt tokens and {limit} new ones exceed the checkpoint's {context} positions; lower "
                "--max_new_tokens or config.prompt.max_pixels"
            )
        return size

    def answer(self, questions: Sequence[Asked], wanted: Sequence[bool], done: Done) -> None:
        """See `Answerer`."""
        from capcur_jax import policy
        from capcur_jax.devices import distributed
        from capcur_jax.evaluation.local import answers
        from capcur_jax.models.inputs import BadInput

        bad: dict[str, str] = {}

        def build(question: Asked) -> Any:
            try:
                self._measure(question)
                return self._builder.prompt(self._text(question), question.images)
            except BadInput as error:
                bad[question.index] = str(error)[:300]
                return None

        asked = {question.index: question for question in questions}
        found = answers(
            questions, engine=self._engine, build=build, sampling=self._sampling, seed=self._config.seed,
            batch=policy.batch(self._config),
            images=self._images, wanted=wanted,
        )  # fmt: skip
        for _, mine in found:
            said = []
            for question, sample in mine:
                if sample is None:
                    why = bad.pop(question.index, "") or f"refused: {self._engine.health().refusal}"
                    said.append((question.index, Said("", failed=why)))
                else:
                    text = self.processor.response(sample.tokens)
                    said.append((question.index, Said(text, sample.finish, len(sample.tokens))))
            parts = distributed.gather(json.dumps(said).encode())
            done([(asked[index], Said(*one)) for part in parts for index, one in json.loads(part)])
