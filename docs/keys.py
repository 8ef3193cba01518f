"""The table of docs/configs.md: the keys of a config with default, bounds and meaning.

Meanings are the comments of presets.py and of the servers' settings: above a key, or behind it on its line.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capcur_jax import bounds, presets

PACKAGE = Path(presets.__file__).parent
# By section: the function of presets.py whose first dictionary has its keys.
FUNCTIONS = {"": "defaults", "stages.NAME": "stage", "data.sets.NAME": "problem_set"}
SHOWN = {"laptop": "laptop", "8B": "qwen3_vl_8b"}  # presets whose values stand beside the defaults

Notes = dict[int, tuple[str, bool]]  # by line: a comment, and whether it has the line for itself


def table() -> str:
    """The sections, one table each, as Markdown."""
    meant, rows = meanings(), values()
    sections: dict[str, list[str]] = {}
    for key in sorted(rows, key=list(meant).index):  # as presets.py has them
        section, _, name = key.rpartition(".")
        limits = bounds.BOUNDS.get(bounds.general(key), "")
        cells = [f"`{name}`", rows[key], limits, meant[key].replace("|", "\\|").replace("<", "&lt;")]
        sections.setdefault(section, []).append(f"| {' | '.join(cells)} |")
    lines = []
    for section, cells in sections.items():
        lines += [f"### {section or 'A run'}", ""]
        if text := meant.get(section):
            lines += [f"{text[0].upper()}{text[1:].rstrip('.')}.", ""]
        lines += ["| key | default | bounds | meaning |", "|---|---|---|---|", *cells, ""]
    return "\n".join(lines)


def values() -> dict[str, str]:
    """Every key with its default, and what the presets of `SHOWN` have instead, where they have another."""
    defaults = dict(leaves(presets.defaults()))
    given = dict.fromkeys(("data", "steps", "prompts", "learning_rate"), ...)  # which each preset gives its stages
    stage = presets.stage((), 0, 0, 0.0) | given
    one_set = {f"data.sets.NAME.{name}": value for name, value in presets.defaults().data.sets.text.items()}
    others = {shown: dict(leaves(presets.get(preset))) for shown, preset in SHOWN.items()}
    found = {}
    for key, value in [*defaults.items(), *one_set.items(), *leaves(stage, "stages.NAME.")]:
        cells = ["the preset's" if value is ... else written(value)]
        for shown, other in others.items():
            if key in other and other[key] != value and key != "create":
                cells.append(f"{shown} {written(other[key])}")
        found[key] = "; ".join(cells)
    return found


def leaves(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with their values; neither single stages nor single sets."""
    for name, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)) and (value or name == "stages") and name != "create":
            if f"{prefix}{name}" not in ("stages", "data.sets"):
                yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", {} if isinstance(value, ConfigDict) else value


def written(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 8:
        return f"`({', '.join(map(repr, value[:2]))}, ..., {value[-1]!r})`"
    return "the checkpoint of the package" if value == presets.TINY_CHECKPOINT else f"`{value!r}`"


def meanings() -> dict[str, str]:
    """By key or section: what its comment says."""
    source = (PACKAGE / "presets.py").read_text(encoding="utf-8")
    notes, found = comments(source), {}

    def walk(node: ast.Dict, prefix: str) -> None:
        for name, value in zip(node.keys, node.values, strict=True):
            assert isinstance(name, ast.Constant)
            key, inner = f"{prefix}{name.value}", isinstance(value, ast.Dict) and bool(value.keys)
            found[key] = said(name.lineno, name.lineno if inner else value.end_lineno or name.lineno, notes)
            if isinstance(value, ast.Dict):
                walk(value, f"{key}.")

    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    for section, function in FUNCTIONS.items():
        literal = next(node for node in ast.walk(functions[function]) if isinstance(node, ast.Dict))
        walk(literal, f"{section}." if section else "")
    source = (PACKAGE / "rollout" / "sglang" / "settings.py").read_text(encoding="utf-8")
    notes = comments(source)
    settings = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for node in settings.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[f"rollout.sglang.{node.target.id}"] = said(node.lineno, node.end_lineno or node.lineno, notes)
    return found


def comments(source: str) -> Notes:
    """Those of a module."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: (token.string.removeprefix("#").strip(), not token.line[: token.start[1]].strip())
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def said(first: int, last: int, notes: Notes) -> str:
    """The comment above a key that stands on these lines, then the one behind it."""
    lines, at = [], first - 1
    while at in notes and notes[at][1]:
        lines.insert(0, notes[at][0])
        at -= 1
    behind = [notes[line][0] for line in dict.fromkeys((first, last)) if line in notes and not notes[line][1]]
    return " ".join(lines + behind)
