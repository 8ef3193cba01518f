"""Sampled groups as people see them in TensorBoard and Weights & Biases: the image, and what was said about it.

A group is a line of rollouts.jsonl: its images by their paths from the work directory, its samples with their rewards.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from capcur_jax.records.text import visible

SIDE = 320  # pixels of an image's longer side
COLUMNS = (
    "step",
    "stage",
    "id",
    "image",
    "question",
    "answer",
    "response",
    "reward",
    "accuracy",
    "advantage",
    "tokens",
)

Group = Mapping[str, Any]


def picture(group: Group, workdir: Path) -> PIL.Image.Image | None:
    """The group's images beside each other, each shrunk to at most `SIDE`; None: it has none that can be read."""
    images = []
    for name in group["images"]:
        try:
            with PIL.Image.open(workdir / name) as file:
                image = file.convert("RGB")
        except (OSError, ValueError, PIL.Image.DecompressionBombError):
            continue
        image.thumbnail((SIDE, SIDE))
        images.append(image)
    if not images:
        return None
    whole = PIL.Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width
    return whole


def encoded(image: PIL.Image.Image) -> bytes:
    """As a file: JPEG where it is large enough to be a photo, else PNG."""
    buffer = io.BytesIO()
    photo = max(image.size) > 128
    image.save(buffer, "JPEG" if photo else "PNG", **({"quality": 80} if photo else {"optimize": True}))
    return buffer.getvalue()


def described(group: Group) -> str:
    """Question, answer and responses in Markdown; all texts are literal."""
    parts = [f"**{visible(group['stage'])}**, step {group['step']}", _literal(group["problem"])]
    parts += ["expected:", _literal(group["answer"])] if group["answer"] else []
    for sample in group["samples"]:
        parts.append(
            f"**reward {sample['reward']:.3g}**, accuracy {sample['accuracy']:.3g}, advantage "
            f"{sample['advantage']:+.2f}, {sample['tokens']} tokens, {sample['finish']}:"
        )
        parts.append(_literal(sample["response"]))
    return "\n\n".join(parts)


def rows(groups: Sequence[Group], pictures: Sequence[Any]) -> list[list[Any]]:
    """A row for each response, under `COLUMNS`. `pictures`: what stands for each group's image."""
    return [
        [
            group["step"], group["stage"], group["id"], shown, group["problem"], group["answer"], sample["response"],
            sample["reward"], sample["accuracy"], sample["advantage"], sample["tokens"],
        ]
        for group, shown in zip(groups, pictures, strict=True)
        for sample in group["samples"]
    ]  # fmt: skip


def _literal(text: str) -> str:
    """An indented block, in which Markdown and HTML mean nothing."""
    return "\n".join(f"    {line}" for line in visible(text).splitlines()) or "    "
