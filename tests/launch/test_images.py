"""The images' recipes without a builder: their lines run one after the other, in folders that stand for the image's.

What a line can't do here it does as far as it can: the system's packages are looked up but not installed, and the
servers' image gets its environments without what they depend on (gigabytes; test_sglang_cpu.py installs the server).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_main import ROOT

LAUNCH = ROOT / "launch"
FOLDERS = re.compile(r"(?<![\w./])/(opt|capcur)\b")  # of an image
# System packages: looked up, and nothing else of the system is changed.
ELSEWHERE = (
    ("apt-get update", "true"),
    ("apt-get install", "apt-get install --simulate"),
    ("rm -rf /var/lib/apt/lists/*", "true"),
    ("--no-cache-dir", "--no-compile"),  # what has been fetched before need not be fetched again
)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each with what follows it, lines that go on put together."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    for line in filter(None, lines.splitlines()):
        yield tuple(line.split(maxsplit=1))


class Image:
    """A folder that an image's files lie in."""

    def __init__(self, folder: Path, **environment: str):
        self.folder, self.here, self.ran = folder, folder, []
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        self.environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}

    def inside(self, text: str) -> str:
        """With the image's folders as they are called here."""
        return FOLDERS.sub(lambda found: f"{self.folder}/{found[1]}", text)

    def build(self, recipe: Path, **arguments: str) -> None:
        """Follows the recipe; `arguments` are of the build."""
        for name, rest in instructions(recipe.read_text()):
            if name == "WORKDIR":
                self.here = Path(self.inside(rest))
                self.here.mkdir(parents=True)
            elif name == "ARG":
                key, _, value = rest.partition("=")
                self.environment[key] = arguments.get(key, value)
            elif name == "ENV":
                for key, value in (pair.split("=", 1) for pair in rest.split()):
                    self.environment[key] = self.inside(value).replace("$PATH", self.environment["PATH"])
            elif name == "COPY":
                *sources, target = rest.split()
                for source in sources:
                    self.copy(ROOT / source, self.here / target)
            elif name == "RUN":
                self.run(rest)
            else:
                assert name in ("FROM", "CMD"), name

    def copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy(source, target / source.name)

    def run(self, line: str) -> None:
        for there, here in ELSEWHERE:
            line = line.replace(there, here)
        done = subprocess.run(
            ["sh", "-ec", self.inside(line)], cwd=self.here, env=self.environment, capture_output=True, text=True,
            timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        self.ran.append(line)


def asks(image: Image, recipe: Path) -> subprocess.CompletedProcess:
    """What a container does that is given no command."""
    (line,) = [rest for name, rest in instructions(recipe.read_text()) if name == "CMD"]
    command = re.findall(r'"(.+?)"', line)
    return subprocess.run(
        ["sh", "-c", " ".join(command)], cwd=image.here, env=image.environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_the_trainer_s_image_builds_and_answers(tmp_path):
    image = Image(tmp_path)
    image.build(LAUNCH / "Dockerfile", EXTRA="")
    assert len(image.ran) == 2 and "pip install" in image.ran[0] and "--dry_run" in image.ran[1]
    done = asks(image, LAUNCH / "Dockerfile")
    assert "--config" in done.stdout, done.stderr[-2000:]
    found = subprocess.run(
        [tmp_path / "opt/capcur/bin/python", "-c", "import capcur_jax; print(capcur_jax.__file__)"],
        cwd=tmp_path, env=image.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(found.stdout.strip()).is_relative_to(tmp_path / "capcur")  # the image's own code


def test_the_servers_image_makes_both_environments(tmp_path):
    if not list(Path("/var/lib/apt/lists").glob("*Packages*")):
        pytest.skip("apt-get knows no packages here")
    image = Image(tmp_path, PIP_NO_DEPS="1")
    image.build(LAUNCH / "Dockerfile.sglang")
    assert len(image.ran) == 2
    for name in ("sglang", "capcur"):
        shown = subprocess.run(
            [tmp_path / f"opt/{name}/bin/pip", "show", "capcur_jax"], capture_output=True, text=True, check=True
        )
        assert f"Editable project location: {tmp_path}/capcur" in shown.stdout
