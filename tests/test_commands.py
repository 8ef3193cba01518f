"""The commands of the pages: each is read from its page, parsed by its own parser, and its config is built.

A few run as they stand. Whole runs are in test_main.py and test_resume.py. What needs an accelerator, a server or a
checkpoint says so in the text, and is held here as far as a parser and a config can tell.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from capcur_jax import ablations, evaluate, generate, presets
from capcur_jax.data import __main__ as data
from capcur_jax.errors import InputError
from capcur_jax.grid import rows
from capcur_jax.hub import push
from capcur_jax.plan import __main__ as plan
from capcur_jax.plan import topologies
from capcur_jax.records import command_line
from capcur_jax.report import __main__ as report
from tests.test_docs import PAGES, ROOT

ENVIRONMENT = r"(?:\w+=\S+ )*"
PYTHON = r"(?:\S*/)?python3?"
# Words by which a page says that a command needs more than two CPU cores.
NEEDS = re.compile(r"GPU|TPU|H200|H100|accelerator|checkpoint|server|devices|paper's run", re.IGNORECASE)
SMALL = {"laptop", "PRESET"}
# What a reader puts in the place of words that no parser takes.
STANDS_FOR = {"build NAME": "build gsm8k", "staged.py:PRESET": "staged.py:laptop", " ... ": " --benchmarks=pope "}


def commands(text: str) -> list[str]:
    """Those of a page: lines of its bash blocks, indented lines and code in its sentences."""
    found = [
        line.strip()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found += re.findall(r"^    ((?:python|pip|pytest) .*)$", sentences, re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", sentences)
    found += [code for code in spans if re.match(rf"{ENVIRONMENT}(?:{PYTHON}|\S*pip|\S*pytest) ", code)]
    # Tables of experiments have the end of a command alone.
    found += [
        f"python -m capcur_jax.main {'' if code.startswith('--') else '--config='}{code}"
        for code in spans
        if re.match(r"(--config=)?configs/\w+\.py", code)
    ]
    lines = [re.sub(r"\s+# .*", "", line) for line in found]
    return [one.strip() for line in lines for one in line.split(" && ") if one.strip()]


ALL = sorted({(page.name, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))})


def words(command: str) -> list[str]:
    """Its arguments, without the shell's own and what stands for more or for less."""
    text = re.sub(r"\$\([^)]*\)|\$\w+", "VALUE", command)
    for placeholder, value in STANDS_FOR.items():
        text = text.replace(placeholder, value)
    found = shlex.split(re.sub(r"\[[^\]]*\]", "", text) if " [" in text else text, comments=True)
    return [word for word in found if not re.fullmatch(r"[A-Z_]+=[^=]*|>\S+", word) or word.startswith("EXTRA=")]


def defined_flags(source: Path) -> set[str]:
    """The flags that a script defines, by absl, argparse or config_flags."""
    text = source.read_text(encoding="utf-8")
    found = re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", text) + re.findall(r"add_argument\(\s*\"--([\w-]+)\"", text)
    return {*found, *(["record"] if "import record" in text else [])}


def check_flags(source: Path, arguments: list[str]) -> None:
    for argument in arguments:
        if argument.startswith("--") and not argument.startswith("--config."):
            name = argument[2:].partition("=")[0]
            assert {name, name.removeprefix("no")} & defined_flags(source), f"{source.name} has no --{name}"


def config_of(arguments: list[str]) -> None:
    """Builds the config that a command line names, with all that it sets."""
    given = next((a.partition("=")[2] for a in arguments if a.startswith("--config=")), "")
    if given in ("", "charts.py"):  # a command without its arguments; a file that the page itself shows
        return
    presets.read(given, [a for a in arguments if a.startswith("--config.")])


def parse_module(module: str, arguments: list[str]) -> None:
    """By the module's own parser."""
    if not arguments or "--help" in arguments:
        return
    if module == "capcur_jax.main":
        check_flags(ROOT / "capcur_jax" / "main.py", arguments)
        config_of(arguments)
    elif module == "capcur_jax.plan":
        values = plan.options()
        plan._parse(values, ["plan", *arguments])
        topologies.parse(values.topology)
    elif module == "capcur_jax.ablations":
        options, overrides = ablations.parser().parse_known_args(arguments)
        assert options.preset in presets.PRESETS and all(one.startswith("--config.") for one in overrides)
        assert set(options.rows.split(",") if isinstance(options.rows, str) else options.rows) <= {*rows.ROWS, ""}
    elif module == "capcur_jax.generate":
        generate.parse(arguments)
    elif module == "capcur_jax.hub.push":
        push.parser().parse_args(arguments)
    elif module == "capcur_jax.report":
        assert report.main(arguments) in (0, 2)  # the folder isn't there; a mistyped argument exits
    else:
        of = {"capcur_jax.data": data.COMMANDS, "capcur_jax.evaluate": evaluate.COMMANDS}[module]
        package = {"capcur_jax.data": "curation", "capcur_jax.evaluate": "evaluation"}[module]
        if module == "capcur_jax.evaluate" and arguments[0].startswith("--"):
            arguments = arguments if arguments == ["--list"] else ["run", *arguments]
        if arguments == ["--list"] or arguments[0] not in of or len(arguments) == 1:
            assert arguments[0] in {"--list", *of}
            return
        parser = argparse.ArgumentParser()
        _, chosen = command_line.chosen_command(parser, of, f"capcur_jax.{package}.commands", arguments)
        if getattr(chosen, "config", None):
            presets.read(chosen.config, chosen.overrides)


def extras() -> set[str]:
    found: dict = {}

    def kept(**settings) -> None:
        found.update(settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", kept)
        exec(
            compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec"),
            {"__file__": str(ROOT / "setup.py")},
        )
    return set(found["extras_require"])


def check(command: str) -> None:
    """Raises or exits where a command can't be what a reader types."""
    if re.match(rf"\w+=\$\({PYTHON} -c|for \w+ in [^;]+; do$|done$", command):
        return
    first, *rest = words(command)
    tool = Path(first).name
    if tool in ("python", "python3"):
        if rest[0] == "-m" and rest[1].startswith("capcur_jax"):
            parse_module(rest[1], rest[2:])
        elif rest[0] == "-m":
            assert rest[1] in ("pytest", "venv")
            check_paths(rest[2:] if rest[1] == "pytest" else [])
        else:
            assert (ROOT / rest[0]).is_file(), rest[0]
            check_flags(ROOT / rest[0], rest[1:])
            config_of(rest[1:]) if "--config" in " ".join(rest) else None
    elif tool == "pip":
        assert rest[0] == "install"
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert extra in extras(), extra
    elif tool == "pytest":
        check_paths(rest)
    elif tool in ("sbatch", "local.sh", "sglang_servers.sh"):
        script = next(word for word in [first, *rest] if word.startswith("launch/"))
        assert (ROOT / script).is_file(), script
        arguments = [*rest[rest.index(script) + 1 :]] if script in rest else rest
        run = [word for word in arguments if word.startswith("--") and not word.startswith("--register=")]
        parse_module("capcur_jax.main", run)
    elif tool == "docker":
        assert rest[0] == "build" and (ROOT / rest[rest.index("-f") + 1]).is_file()
        assert {word.removeprefix("EXTRA=") for word in rest if word.startswith("EXTRA=")} <= extras()
    elif tool in ("ruff", "pyrefly"):
        assert rest[0] in ("check", "format")
    elif tool == "jupyter":
        assert rest[0] == "lab" and (ROOT / rest[1]).is_dir()
    else:
        raise AssertionError(f"nothing here knows the command {tool}: give it a check")


def check_paths(arguments: list[str]) -> None:
    for argument in arguments:
        assert not argument.startswith("tests") or (ROOT / argument).exists(), argument


def test_options_have_underscores_as_config_keys_have():
    for room in ("capcur_jax", "benchmarks", "docs", "launch"):
        for source in (ROOT / room).rglob("*.py"):
            given = re.findall(r"\badd(?:_argument)?\(\s*\"--([\w-]+)\"", source.read_text(encoding="utf-8"))
            assert not [name for name in given if "-" in name], source


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page}: {command[:60]}" for page, command in ALL])
def test_a_command_is_one(page, command, tmp_path, monkeypatch):
    """Its flags, files and keys are there, and its config is one."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "capcur_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    check(command)


@pytest.mark.parametrize("command", [
    "python -m capcur_jax.main --config=configs/nowhere.py",
    "python -m capcur_jax.main --config=configs/staged.py --wordir=x",
    "python -m capcur_jax.main --config=configs/staged.py --config.sed=1", "python -m capcur_jax.data chekc FILE",
    "python -m capcur_jax.data check FILE --stric", "python -m capcur_jax.generate --promt=x",
    "python -m capcur_jax.plan --config=configs/staged.py --topology=gpu:9", "python benchmarks/rollout.py --round=3",
    "pip install -e '.[everything]'", "python -m pytest tests/nowhere", "sbatch launch/nowhere.sbatch",
    "launch/local.sh 2 --config=configs/nowhere.py", "docker build -f launch/Dockerfile --build-arg EXTRA=cpu .",
])  # fmt: skip
def test_a_wrong_command_is_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, InputError, SystemExit)):
        check(command)


def test_what_needs_more_than_a_laptop_says_so():
    """A line, its block's page title, or the sentences around it name what is needed."""
    unsaid = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"configs/\w+\.py:(\w+)", text):
            around = text[max(0, match.start() - 1500) : match.end() + 1500]
            if match[1] not in SMALL and not NEEDS.search(around.replace("--config.checkpoint", "")):
                unsaid.append(f"{page.name}: {match[0]}")
    assert not unsaid


MAIN = {"ablations": ablations.main, "data": data.main, "evaluate": evaluate.main}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command of the pages with the arguments that stand there, in an empty folder. Returns its last line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def run(command: str) -> list[str]:
        assert any(command == one for _, one in ALL), "no page has it"
        _, _, module, *arguments = words(command)
        assert MAIN[module.rpartition(".")[2]](arguments) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_the_list_of_benchmarks_as_it_stands(run):
    assert any("mathvista" in line for line in run("python -m capcur_jax.evaluate --list"))


def test_a_dry_grid_as_it_stands(run):
    lines = run("python -m capcur_jax.ablations --preset=qwen3_vl_8b --dry_run")
    assert {line.split("\t")[0] for line in lines} == set(rows.ROWS) - {"base"}


def test_data_on_a_file_as_it_stands(run, tmp_path):
    given = [{"problem": "1 + 1 = ?", "answer": 2}, {"problem": "2 + 5 = ?", "answer": "7"}]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    assert json.loads(run(".venv/bin/python -m capcur_jax.data check gsm8k.jsonl")[-1])["kept"] == 2


@pytest.mark.e2e
def test_a_question_as_it_stands(tmp_path):
    """The two lines of the quickstart that ask the shipped checkpoint about an image."""
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if block.startswith("IMAGE="))
    line = block.replace(".venv/bin/python", sys.executable)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"}
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "boxed" in done.stdout, done.stderr[-2000:]
