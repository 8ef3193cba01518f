"""Prompts and sampling -> the body of SGLang's /generate, and its answers -> samples. No network in here.

The server gets an image as a PNG that is already of the grid's size, and one placeholder for it, which it expands: a
Qwen2.5-VL request with expanded ones hangs for ever. Its `prompt_tokens` say whether it saw what we did.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from capcur_jax.errors import RolloutError
from capcur_jax.models.inputs import Processor, Prompt, coordinates, pixels
from capcur_jax.rollout.engine import Sample, Sampling, Span

# JSON has no -inf. Added to a float32 logit this leaves a probability of exactly 0, as our own sampler's -inf does.
BANNED = -1e9


class BadAnswer(ValueError):
    """A server's answer that can't be trained on; another server may give a better one."""


class ForeignWeights(BadAnswer):
    """Made by weights that we didn't send, or not for now: somebody else started or updated that server."""


class WrongPrompt(RolloutError):
    """The server counted other prompt tokens than we did: it saw another prompt, and so would every further try."""


# ---------------------------------------------------------------------- what is sent


def contract(prompt: Prompt, image_token: int, merge: int) -> list[int]:
    """Token ids with one placeholder for each image. Raises ValueError where they don't fit the grids."""
    kept = np.ones(len(prompt.tokens), bool)
    at = 0
    for time, height, width in prompt.grids:
        places = np.flatnonzero(prompt.tokens[at:] == image_token)
        count = time * height * width // merge**2
        start = at + int(places[0]) if len(places) else len(prompt.tokens)
        if not len(places) or (prompt.tokens[start : start + count] != image_token).any() or start + count > len(kept):
            raise ValueError(f"the prompt has no {count} image tokens for the grid {(time, height, width)}")
        kept[start + 1 : start + count] = False
        at = start + count
    if (prompt.tokens[at:] == image_token).any():
        raise ValueError(f"the prompt has more image tokens than its grids {prompt.grids} ask for")
    return prompt.tokens[kept].tolist()


def images(prompt: Prompt, processor: Processor) -> list[Image.Image]:
    """The images that the prompt's patches were made from, at the grid's size, every pixel as it was."""
    vision, found, at = processor.config.vision, [], 0
    for grid in prompt.grids:
        places = coordinates(grid, vision)
        found.append(Image.fromarray(pixels(prompt.patches[at : at + len(places)], places, vision)))
        at += len(places)
    return found


def png(image: Image.Image) -> str:
    """Base64 of a PNG; quick rather than small, since it goes over a local network at most."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def parameters(sampling: Sampling, processor: Processor) -> dict[str, Any]:
    """SGLang's sampling_params: everything that a default of the server or of the checkpoint could change."""
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,  # 0: greedy, reported at temperature 1 like ours
        "top_p": sampling.top_p if sampling.temperature else 1.0,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "stop_token_ids": list(processor.end_tokens),
        "ignore_eos": False,
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "logit_bias": {str(token): BANNED for token in processor.banned_tokens},
    }


def payload(
    prompt: Prompt,
    processor: Processor,
    sampling: Sampling,
    n: int,
    rid: str,
    pictures: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> dict[str, Any]:
    """The body of POST /generate.

    Args:
        rid: the request's name, to abort it by.
        pictures: the prompt's images by `png`.
        seeds: one for each sample, for a server that samples deterministically: there equal seeds give equal
            responses, and `n` alone has one for all. Without them one request asks for all n, and the prompt, its
            images included, is prepared and prefilled once.
    """
    ids = contract(prompt, processor.config.image_token, processor.config.vision.merge_size)
    body: dict[str, Any] = {"return_logprob": True, "rid": rid, "stream": False}
    base = parameters(sampling, processor)
    if not seeds:
        body |= {"input_ids": ids, "sampling_params": {"n": n, **base}}
        shown = [list(pictures)] if n > 1 else list(pictures)  # with n > 1 the server reads a batch of one prompt
    else:
        body["input_ids"] = [ids] * n
        body["rid"] = [f"{rid}_{number}" for number in range(n)]
        body["sampling_params"] = [{**base, "sampling_seed": seed} for seed in seeds]
        shown = [list(pictures)] * n
    return body | ({"image_data": shown} if pictures else {})


# ---------------------------------------------------------------------- what comes back


def samples(answer: Any, prompt: Prompt, processor: Processor, sampling: Sampling, n: int) -> list[Sample]:
    """The samples of an answer to `payload(..., n)`: at most n, fewer where the server has aborted some.

    Raises:
        WrongPrompt: the server's prompt isn't ours.
        BadAnswer: anything else that isn't what was asked for; nothing of such an answer is used.
    """
    answers = answer if isinstance(answer, list) else [answer]
    if len(answers) != n:
        raise BadAnswer(f"{len(answers)} responses instead of {n}")
    try:
        found = [_sample(one, prompt, processor, sampling) for one in answers]
    except (KeyError, TypeError, IndexError, OverflowError) as error:
        raise BadAnswer(f"a response without what SGLang 0.5.23 gives ({error!r})") from None
    return [one for one in found if one is not None]


def _sample(answer: Mapping[str, Any], prompt: Prompt, processor: Processor, sampling: Sampling) -> Sample | None:
    meta = answer["meta_info"]
    finish = meta["finish_reason"]["type"]
    if finish == "abort":
        return None
    if meta["prompt_tokens"] != len(prompt):
        raise WrongPrompt(
            f"the SGLang server counts {meta['prompt_tokens']} tokens in a prompt that has {len(prompt)}, with images "
            f"of {prompt.grids} patches: it resizes images or has another tokenizer, so its samples can't be trained "
            "on. Serve the very checkpoint that the run started from, with a preprocessor_config.json whose bounds "
            "let images pass as they are (a server that the run starts itself has both)"
        )
    tokens = np.asarray(answer["output_ids"], np.int64)
    reported = meta["output_token_logprobs"]
    if len(reported) != len(tokens) or [int(one[1]) for one in reported] != tokens.tolist():
        raise BadAnswer(f"{len(tokens)} token ids and {len(reported)} log-probs that don't belong together")
    if not 0 < len(tokens) <= sampling.max_new_tokens:
        raise BadAnswer(f"{len(tokens)} tokens, asked for 1 to {sampling.max_new_tokens}")
    vocabulary = processor.config.text.vocabulary
    if tokens.min() < 0 or tokens.max() >= vocabulary or np.isin(tokens, processor.banned_tokens).any():
        raise BadAnswer(f"a token that may not be sampled (vocabulary {vocabulary}, banned {processor.banned_tokens})")
    logprobs = np.asarray([one[0] for one in reported], np.float32)
    if not np.isfinite(logprobs).all() or logprobs.max() > 1e-3:
        raise BadAnswer("a log-prob that is no finite number up to 0")
    ends = np.isin(tokens, processor.end_tokens)
    if ends[:-1].any() or ends[-1] != (finish == "stop") or finish not in ("stop", "length"):
        raise BadAnswer(f"finish reason {finish!r} with {int(ends.sum())} end tokens, the last token {tokens[-1]}")
    return Sample(tokens.astype(np.int32), logprobs, finish, _spans(meta, len(tokens)))


def _spans(meta: Mapping[str, Any], length: int) -> tuple[Span, ...]:
    given = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": length}]
    try:
        spans = tuple(Span(int(one["version"]), one["start"], one["end"]) for one in given)
    except ValueError:
        raise ForeignWeights(f"made by weights that we didn't send, version {given[0]['version']!r}") from None
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != length:
        raise BadAnswer(f"weight versions {given} that don't cover {length} tokens")
    return spans
