"""Kinds of errors: four lines of a closed form, both counts, and what the judge saw."""

import argparse
import json

import pytest
from PIL import Image

from capcur_jax.errors import InputError
from capcur_jax.evaluation import errors, folders
from capcur_jax.evaluation.commands import errors as command
from capcur_jax.evaluation.errors import CLASSES, read
from capcur_jax.evaluation.judge import Judge, Model
from tests.evaluation.made import answered, folder
from tests.rollout.scripted_server import ScriptedServer, has_image, turn_text

RESPONSE = "I see 4 dots.\nSo 4 + 1 = 6."
GOOD = """The figure has 5 dots.
First wrong step: "I see 4  dots."
First error: perception
Errors present: perception, calculation
Confidence: high"""


def said(first="perception", present="perception", quote="I see 4 dots.", confidence="low"):
    return f"First wrong step: {quote}\nFirst error: {first}\nErrors present: {present}\nConfidence: {confidence}"


def test_four_lines_are_read():
    assert read(GOOD, RESPONSE, tuple(CLASSES)) == {
        "first": "perception", "present": ["perception", "calculation"], "quote": "I see 4  dots.", "quoted": True,
        "confidence": "high",
    }  # fmt: skip
    bold = said("Question misread", "question misread", "none", "Low.").replace(":", ":**").replace("\n", "\n**")
    found = read("**" + bold, RESPONSE, tuple(CLASSES))
    assert (found["first"], found["quote"], found["quoted"]) == ("question_misread", "", False)
    assert not read(said(quote="I see 9 dots."), RESPONSE, tuple(CLASSES))["quoted"]
    assert read(said("reasoning", "perception"), RESPONSE, tuple(CLASSES))["present"] == ["perception", "reasoning"]


@pytest.mark.parametrize("reply", [
    "", "perception", "It is a perception error.", said("seeing"), said(present="perception, seeing"),
    said(confidence="80 %"), said() + "\nI hope this helps.", "\n".join(reversed(said().splitlines())),
    said(present=""), said("perception or reasoning"),
])  # fmt: skip
def test_anything_else_is_unreadable(reply):
    assert read(reply, RESPONSE, tuple(CLASSES)) is None


def test_what_ended_by_itself_was_not_truncated():
    classes = [name for name in CLASSES if name != "truncated"]
    assert read(said("truncated", "truncated"), RESPONSE, classes) is None
    assert read(said("truncated", "truncated"), RESPONSE, tuple(CLASSES))["first"] == "truncated"


def classified(tmp_path, reply, rows, **kinds):
    with ScriptedServer(reply) as server:
        model = Model(server.address, "j", how={"retries": 0, "pause_s": 0.01})
        with Judge(model, tmp_path / "judge.jsonl") as judge:
            found = errors.classify(rows, judge, **kinds)
        return found, server.requests


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "dots.png")
    return tmp_path / "dots.png"


def test_the_judge_sees_image_question_gold_and_the_whole_response(tmp_path, picture):
    row = answered(1, False, text=RESPONSE, images=(picture,), finish="stop")
    (found,), (request,) = classified(tmp_path, lambda body: GOOD, [row])
    assert found["saw"] == "image" and found["by"] == "judge" and has_image(request)
    text = turn_text(request)
    for part in ("Question 1?", "A. a", "B. b", RESPONSE, *(CLASSES[name] for name in CLASSES if name != "truncated")):
        assert part in text
    assert "truncated" not in text and "cut off" not in text
    assert request["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png")


def test_facts_stand_in_for_the_image_and_their_absence_is_told(tmp_path, picture):
    rows = [answered(at, False, text=RESPONSE, images=(picture,), finish="length") for at in range(3)]
    facts = lambda one: "Five dots." if one.row.index == "1" else ""  # noqa: E731
    found, requests = classified(tmp_path, lambda body: GOOD, rows, show="facts", facts=facts)
    assert sorted(one["saw"] for one in found) == ["facts", "nothing", "nothing"]
    assert not any(map(has_image, requests)) and sum("Five dots." in turn_text(body) for body in requests) == 1
    assert all("cut off at its limit" in turn_text(body) for body in requests)


def test_empty_responses_are_unreadable_without_a_judge_and_broken_images_are_counted(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    rows = [answered(1, False, text=" "), answered(2, False, text=RESPONSE, images=(broken,))]
    found, requests = classified(tmp_path, lambda body: GOOD, rows)
    assert found[0]["first"] == "unreadable" and found[0]["by"] == "rule" and found[1] is None and not requests


def test_both_counts_and_their_intervals(tmp_path):
    rows = [answered(at, False, text=f"{at} {RESPONSE}", cluster=f"i{at // 2}") for at in range(20)]
    replies = (
        [said("perception", "perception, reasoning")] * 12
        + [said("reasoning", "reasoning, perception")] * 6
        + ["hm"] * 2
    )

    def reply(body):
        number = (
            int(turn_text(body).split("Wrong response\n==========\n")[1].split()[0])
            if len(body["messages"]) == 1
            else 19
        )
        return replies[number]

    found, _ = classified(tmp_path, reply, rows)
    whole = errors.summary(rows, found, of=50)
    assert (whole["wrong"], whole["drawn"], whole["classified"], whole["undecided"]) == (50, 20, 18, 2)
    assert whole["first"]["perception"]["rows"] == 12 and whole["anywhere"]["perception"]["rows"] == 18
    share, low, high = whole["first"]["perception"]["share"]
    assert share == pytest.approx(12 / 18) and 0 < low < share < high < 1
    assert sum(one["rows"] for one in whole["first"].values()) == 18
    assert errors.summary([], [])["first"]["perception"] == {"rows": 0, "share": None}


def test_right_answers_and_failed_requests_are_no_errors():
    rows = {str(at): one for at, one in enumerate([
        answered(0, True), answered(1, False), answered(2, False, failed="no server"), answered(3, 0.3),
    ])}  # fmt: skip
    assert [one.row.index for one in errors.wrong(rows, "official")] == ["1"]
    many = [answered(at, False) for at in range(50)]
    some = errors.drawn(many, 10)
    assert (
        len(some) == 10
        and some == errors.drawn(many[::-1], 10)[::-1]
        and set(one.row.index for one in errors.drawn(many, 5)) < {one.row.index for one in some}
    )


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*map(str, words)]))


def test_the_command(tmp_path, capsys, picture):
    rows = [answered(at, at % 2, text=f"{at} {RESPONSE}", images=(picture,)) for at in range(10)]
    path = folder(tmp_path / "run", {"x": rows, "y": rows[:3]})
    with ScriptedServer(lambda body: GOOD) as server:
        words = ["--judge", server.address, "--judge_model", "judge-1", "--benchmarks", "x", "--limit", "4"]
        result = run(path, *words)
        again = run(path, *words)
        assert len(server.requests) == 4
    assert result["classified"] == 4 and result["perception"]["first"]["share"][0] == 1 and result["paper"] == 86.9
    assert again["judge"]["spent"]["calls"] == 0 and again["classified"] == 4
    kept = json.loads((path / "errors.json").read_text())
    assert kept["definition"] == CLASSES and kept["judge"]["prompts"] == errors.VERSION
    assert kept["all"]["wrong"] == 5 and len(kept["rows"]["x"]) == 4
    printed = capsys.readouterr().err
    assert "86.9" in printed and "judge-1" in printed and "question_misread" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert folders.read(path).answered["x"]["1"].reply.text == rows[1].reply.text


def test_without_a_judge_the_counterfactual_speaks(tmp_path, capsys):
    path = folder(tmp_path / "run" / "evaluation" / "final", {"x": [answered(1, True)]})
    with pytest.raises(InputError, match="counterfactual"):
        run(tmp_path / "run")
    share = [0.25, 0.2, 0.3]
    names = ("wrong_right", "wrong_wrong", "right_wrong", "right_right", "again", "limited")
    found = {"questions": 200, "samples": 4, **dict.fromkeys(names, share), "limited_of_wrong": None}
    kept = {"temperature": 1.0, "sets": {"visual": {"left_out": {"without image": 3}, "text": found}}}
    (path / "counterfactual.json").write_text(json.dumps(kept))
    assert run(tmp_path / "run")["counterfactual"]["visual"]["text"]["questions"] == 200
    printed = capsys.readouterr().err
    assert "visual" in printed and "25.0" in printed and max(map(len, printed.splitlines())) <= 80
    with pytest.raises(InputError, match="it has x"):
        run(tmp_path / "run", "--judge=http://127.0.0.1:1", "--judge_model=m", "--benchmarks=z")
