"""The command that asks a model: what it sends, keeps, scores and writes, and that a killed one goes on."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from capcur_jax import evaluate
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import INSTRUCTION
from capcur_jax.data.rows import write_rows
from capcur_jax.evaluation import folders
from capcur_jax.evaluation.recorded import FAILED
from tests.conftest import random_image
from tests.rollout.scripted_server import Raw, ScriptedServer, completion, images, turn_text

ROOT = Path(__file__).parents[3]
ROWS = 24


@pytest.fixture
def problems(tmp_path):
    """A file of problems whose golds are in no question, four to an image."""
    for number in range(ROWS // 4):
        random_image(32, 32, seed=number).save(tmp_path / f"{number}.png")
    rows = [
        Problem(f"q{n}", f"Question {n}?", f"{7000 + n}", (str(tmp_path / f"{n // 4}.png"),), kind=f"k{n % 2}")
        for n in range(ROWS)
    ]
    write_rows(tmp_path / "own.jsonl", rows)
    return tmp_path / "own.jsonl"


def number(body):
    return int(turn_text(body).split("Question ")[1].split("?")[0])


def right(body):
    """Right answers to even questions."""
    at = number(body)
    return f"<think>Hm.</think> \\boxed{{{7000 + at if at % 2 == 0 else 'None'}}}"


def arguments(server, file, workdir, *more):
    return [
        f"--benchmarks={file}", f"--address={server.address}", "--model=m", f"--workdir={workdir}", "--concurrency=3",
        "--retries=1", *more,
    ]  # fmt: skip


def ask(server, file, workdir, *more, code=0):
    assert evaluate.main(arguments(server, file, workdir, *more)) == code


def scores(workdir):
    return json.loads((workdir / "scores.json").read_text())["benchmarks"]["own"]


def test_a_score_comes_with_its_interval_and_what_it_depends_on(problems, tmp_path, capsys):
    with ScriptedServer(right) as server:
        ask(server, problems, tmp_path / "w", "--instruction=system", "--max_new_tokens=77")
    assert len(server.requests) == ROWS
    for body in server.requests:
        assert body["messages"][0] == {"role": "system", "content": INSTRUCTION} and body["max_tokens"] == 77
        assert images(body) == [("image/png", (tmp_path / f"{number(body) // 4}.png").read_bytes())]
        assert "700" not in turn_text(body) and "answer" not in turn_text(body)
    found = scores(tmp_path / "w")
    for mode in ("official", "kit"):
        low, high = found[mode]["interval"]
        assert found[mode]["score"] == 50 and 0 < low < 50 < high < 100
        assert found[mode]["share"]["rule"] == 1 and found[mode]["kinds"] == {"k0": 100, "k1": 0}
    said = found["conditions"]
    assert (said["address"], said["model"], said["engine"]) == ([server.address], "m", "served")
    assert (said["max_new_tokens"], said["temperature"], said["top_p"]) == (77, 0.0, 1.0)
    assert (said["instruction"], said["instruction_text"], said["judge"]) == ("system", INSTRUCTION, "none")
    assert said["rows"] == said["asked"] == ROWS and not said["partial"] and len(said["digest"]) == 32
    assert {"commit", "jax"} <= set(said["versions"]) and said["image_encoding"] and said["read"]
    out = capsys.readouterr()
    last = json.loads(out.out.splitlines()[-1])
    assert last["benchmarks"] == {"own": {"rows": ROWS, "official": 50.0, "kit": 50.0}}
    assert "50.00" in out.err and "scores.json" in out.err


def test_the_table_is_the_kit_s_and_texts_survive(problems, tmp_path):
    texts = {0: "None", 1: "", 2: "nan", 3: 'a "quoted"\ttab\nline', 4: "NA", 5: " 5 ", 6: "7e3"}
    with ScriptedServer(lambda body: Raw(200, completion(texts.get(number(body), "x"), tokens=2))) as server:
        ask(server, problems, tmp_path / "w")
    file = tmp_path / "w" / "predictions" / "own.tsv"
    with file.open(encoding="utf-8", newline="") as lines:
        rows = {row["index"]: row for row in csv.DictReader(lines, delimiter="\t")}
    assert {n: rows[f"q{n}"]["prediction"] for n in texts} == texts and len(rows) == ROWS
    assert "image" not in rows["q0"] and {"question", "answer", "prediction", "thinking"} <= set(rows["q0"])
    assert file.read_text().splitlines()[0].startswith('"index"\t"')
    read = folders.read(tmp_path / "w").answered["own"]
    assert {n: read[f"q{n}"].reply.text for n in texts} == texts


def test_what_failed_is_wrong_and_asked_again_and_nothing_else_is(problems, tmp_path, capsys):
    seen, broken = set(), True

    def reply(body):
        at = number(body)
        first = at not in seen
        seen.add(at)
        flaws = {0: Raw(429, b"", {"Retry-After": "0.01"}), 2: Raw(500, b"no"), 4: Raw(0), 6: Raw(200, completion(""))}
        if at == 8 and broken:
            return Raw(500, b"never")
        return flaws[at] if first and at in flaws else right(body)

    with ScriptedServer(reply) as server:
        ask(server, problems, tmp_path / "w", "--concurrency=24")
        assert "1 rows have no reply" in capsys.readouterr().err
        found = scores(tmp_path / "w")
        assert found["official"]["right"] == ROWS // 2 - 1 and found["replies"]["failed"] == 1 / ROWS
        assert FAILED in (tmp_path / "w" / "predictions" / "own.tsv").read_text()
        before, broken = len(server.requests), False
        ask(server, problems, tmp_path / "w")
        assert [number(body) for body in server.requests[before:]] == [8]
    found = scores(tmp_path / "w")
    assert found["official"]["score"] == 50 and found["replies"]["failed"] == 0
    assert FAILED not in (tmp_path / "w" / "predictions" / "own.tsv").read_text()


def test_what_is_cut_and_unreadable_gets_no_credit_by_chance(problems, tmp_path):
    with ScriptedServer(lambda body: (f"It may be {7000 + number(body)}, or", "length")) as server:
        ask(server, problems, tmp_path / "w")
    found = scores(tmp_path / "w")
    assert found["official"]["score"] == found["kit"]["score"] == 0
    assert found["replies"]["cut"] == 1 and found["official"]["share"]["unreadable"] == 1


def test_a_limit_draws_rows_by_hash_and_says_so(problems, tmp_path, capsys):
    with ScriptedServer(right) as server:
        ask(server, problems, tmp_path / "w", "--limit=5")
        drawn = {number(body) for body in server.requests}
        assert len(drawn) == 5 and drawn != set(range(5)) and scores(tmp_path / "w")["conditions"]["partial"]
        assert "partial" in capsys.readouterr().err
        ask(server, problems, tmp_path / "w", "--limit=9")  # more rows contain fewer
        assert len(server.requests) == 9
        ask(server, problems, tmp_path / "w")
        assert len(server.requests) == ROWS and not scores(tmp_path / "w")["conditions"]["partial"]


def test_changed_settings_are_refused_by_name(problems, tmp_path, capsys):
    with ScriptedServer(right) as server:
        ask(server, problems, tmp_path / "w")
        ask(server, problems, tmp_path / "w", "--temperature=0.5", "--instruction=suffix", code=2)
        said = capsys.readouterr().err
        assert "temperature 0.0, now 0.5" in said and 'instruction "none", now "suffix"' in said and "--workdir" in said
        ask(server, problems, tmp_path / "w", "--read=box")  # what is read of a reply asks nothing again
    assert len(server.requests) == ROWS


MISTAKES = {
    "no model": (["--benchmarks=own.jsonl"], "--checkpoint=DIR, or --address=URL"),
    "both": (["--benchmarks=pope", "--checkpoint=a", "--address=http://a:1", "--model=m"], "--checkpoint=DIR, or"),
    "no name": (["--benchmarks=pope", "--address=http://a:1"], "--model"),
    "unknown": (["--benchmarks=popes", "--address=http://a:1", "--model=m"], "no benchmark 'popes'"),
    "missing": (["--benchmarks=pope,mmstar", "--address=http://a:1", "--model=m"], "POPE.tsv"),
    "missing too": (["--benchmarks=pope,mmstar", "--address=http://a:1", "--model=m"], "MMStar.tsv"),
    "no checkpoint": (["--benchmarks=pope", "--data=.", "--checkpoint=nowhere"], "pope"),
    "config": (["--benchmarks=pope", "--address=http://a:1", "--model=m", "--config=a.py"], "--config"),
    "top_p": (["--benchmarks=FILE", "--address=http://a:1", "--model=m", "--top_p=2"], "top_p"),
    "address": (["--benchmarks=FILE", "--address=nowhere", "--model=m"], "--address"),
    "judge": (["--benchmarks=FILE", "--address=http://a:1", "--model=m", "--judge=http://b:1"], "--judge_model"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_get_a_line_that_names_the_remedy(problems, tmp_path, capsys, kind):
    given, said = MISTAKES[kind]
    given = [argument.replace("FILE", str(problems)) for argument in given]
    assert evaluate.main([*given, f"--workdir={tmp_path / 'w'}"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_killed_command_goes_on_with_the_rest(problems, tmp_path):
    """kill -9 half-way: what is on the disk is not asked again, and nothing is lost."""
    counts, lock, half = {}, threading.Lock(), threading.Event()

    def reply(body):
        at = number(body)
        with lock:
            counts[at] = counts.get(at, 0) + 1
            if len(counts) >= ROWS // 2:
                half.set()
        time.sleep(0.05)
        return right(body)

    workdir = tmp_path / "w"
    journal = workdir / "replies" / "own.jsonl"
    with ScriptedServer(reply) as server:
        command = [sys.executable, "-m", "capcur_jax.evaluate", *arguments(server, problems, workdir)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        assert half.wait(120), process.communicate(timeout=10)[1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        known = journal.read_bytes().count(b"\n") - 1
        asked = dict(counts)
        assert ROWS // 2 - 4 <= known < ROWS
        ask(server, problems, workdir)
    again = {at for at, count in counts.items() if count > asked.get(at, 0) and at in asked}
    assert len(again) <= 3  # those that were under way
    assert sum(counts.values()) - sum(asked.values()) == ROWS - known
    assert scores(workdir)["official"]["score"] == 50


def test_a_checkpoint_s_command_goes_on_and_says_what_it_is(checkpoint, problems, tmp_path, capsys):
    given = [f"--benchmarks={problems}", f"--checkpoint={checkpoint}", f"--workdir={tmp_path / 'w'}"]
    assert evaluate.main([*given, "--max_new_tokens=4", "--instruction=suffix", "--limit=6"]) == 0
    found = scores(tmp_path / "w")
    said = found["conditions"]
    assert found["rows"] == 6 and said["engine"] == "local" and len(said["checkpoint"]) == 16
    assert said["model"] == str(checkpoint) and said["max_pixels"] and said["template"] and said["read"]
    assert found["replies"]["tokens"] <= 4
    before = (tmp_path / "w" / "replies" / "own.jsonl").read_bytes()
    assert evaluate.main([*given, "--max_new_tokens=4", "--instruction=suffix", "--limit=6"]) == 0
    assert (tmp_path / "w" / "replies" / "own.jsonl").read_bytes() == before
    assert evaluate.main([*given, "--max_new_tokens=5", "--instruction=suffix"]) == 2
    assert "max_new_tokens 4, now 5" in capsys.readouterr().err


@pytest.mark.skipif(not os.environ.get("CAPCUR_PUBLIC_DATA"), reason="CAPCUR_PUBLIC_DATA names no folder of real sets")
@pytest.mark.parametrize("name", ["mathvision", "wemath", "visonlyqa"])
def test_real_questions_go_out_with_their_images_and_without_their_answers(tmp_path, name):
    data = Path(os.environ["CAPCUR_PUBLIC_DATA"]) / name
    with ScriptedServer(lambda body: Raw(200, completion("\\boxed{B}", tokens=4))) as server:
        given = [f"--benchmarks={name}", f"--data={data}", f"--address={server.address}", "--model=m", "--limit=24"]
        assert evaluate.main([*given, f"--workdir={tmp_path / 'w'}", "--instruction=system"]) == 0
        assert evaluate.main([*given, f"--workdir={tmp_path / 'w'}", "--instruction=system"]) == 0
    assert len(server.requests) == 24
    read = folders.read(tmp_path / "w")
    (rows,) = read.answered.values()
    published = {file.read_bytes() for one in rows.values() for file in one.row.images}
    sent = [data for body in server.requests for _, data in images(body)]
    assert len(sent) >= 24 and set(sent) == published
    for body in server.requests:
        assert not {"answer", "solution", "gold", "reference"} & set(body)
        assert all(set(message) == {"role", "content"} for message in body["messages"])
    (entry,) = read.scores["benchmarks"].values()
    low, high = entry["kit"]["interval"]
    assert entry["rows"] == 24 and entry["conditions"]["partial"] and low <= entry["kit"]["score"] <= high
    assert entry["replies"]["tokens"] == 4
