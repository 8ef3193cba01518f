"""Writes what the pages repeat: the figures of benchmarks/results/*.json, and the keys of a config.

    python docs/write.py

A block of a page is

    <!-- figures: VIEW of RESULT, RESULT -->     the macro VIEW of docs/figures.jinja, given the named results
    <!-- keys -->                                the table of config keys (docs/keys.py)

up to `<!-- end -->`; what stands between is replaced. Below figures stands where they come from. Where files that a
result measures have changed since its commit, it says "Older than its code". That needs the git history.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import keys  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "capcur_jax/assets/tiny_qwen3_vl/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
OLDER = " **Older than its code.**"
_BLOCK = re.compile(r"^(<!-- (?:figures: (\w+) of ([\w, ]+)|keys) -->\n).*?^<!-- end -->$", re.MULTILINE | re.DOTALL)


def faster(ours: float, theirs: float, digits: int = 1) -> str:
    """How comparisons are read, from the seconds of both sides: "2.5x faster"."""
    ratio, word = (theirs / ours, "faster") if ours <= theirs else (ours / theirs, "slower")
    return f"{ratio:.{digits}f}x {word}"


def results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """What benchmarks kept, by name. `older` says whether what was measured has changed since, None where it can't."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    for result in found.values():
        result["older"] = changed(ROOT, result["commit"], result["measures"])
    return found


def changed(repository: Path, commit: str, globs: list[str]) -> bool | None:
    """Whether files of these globs differ from that commit; None where the history lacks it."""

    def git(*arguments: str) -> int:
        return subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, check=False).returncode

    if git("cat-file", "-e", f"{commit}^{{commit}}"):
        return None
    return bool(globs) and bool(git("diff", "--quiet", commit, "--", *(f":(glob){glob}" for glob in globs)))


def standing(result: dict[str, Any]) -> str:
    """Where a figure comes from, in a line."""
    versions = {name: version for name, version in result["versions"].items() if name != "python"}
    where = ", ".join([result["machine"], *(f"{name} {version}" for name, version in versions.items())])
    verb = "Measured" if result["measures"] else "Learned"
    return f"{verb} {result['date']} at {result['commit']} ({where}).{OLDER if result['older'] else ''}"


def written(text: str, found: dict[str, dict[str, Any]]) -> str:
    """The page's text with its blocks as they have to be."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "docs"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["faster"] = lambda pair, digits=1: faster(*pair, digits)
    environment.filters["thousands"] = lambda number: f"{number:,.0f}"
    environment.filters["percent"] = lambda share, digits=1: f"{100 * share:.{digits}f} %"
    views = environment.get_template("figures.jinja").module

    def block(match: re.Match[str]) -> str:
        begin, view, names = match.groups()
        if view is None:
            return f"{begin}{keys.table()}<!-- end -->"
        used = [found[name.strip()] for name in names.split(",")]
        below = "  \n".join(dict.fromkeys(standing(result) for result in used))
        return f"{begin}{getattr(views, view)(*used).strip()}\n\n{below}\n<!-- end -->"

    return _BLOCK.sub(block, text)


def main() -> None:
    found = results()
    if unknown := sorted({result["commit"] for result in found.values() if result["older"] is None}):
        sys.exit(f"the git history lacks {', '.join(unknown)}: git fetch --unshallow")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := written(text, found)) != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
