"""What `check` counts: each fault found where it is, nothing found where there is none, and no row that ends it."""

import base64
import io
import json
import os
import random
import subprocess
import sys

import pytest
from PIL import Image

from capcur_jax.curation.checking import check, unanswerable
from capcur_jax.data.problem import Problem
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import BadInput
from tests.conftest import random_image
from tests.curation.command import run, write


def measured(problem):
    """A word a token."""
    if "<|image_pad|>" in problem.problem:
        raise BadInput("a vision token")
    return PromptSize(len(problem.problem.split()), ())


@pytest.fixture
def folder(tmp_path):
    random_image(40, 30).save(tmp_path / "a.png")
    random_image(40, 30).save(tmp_path / "same_pixels.bmp")
    random_image(200, 100, seed=1).save(tmp_path / "b.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.png").read_bytes()[:400])
    return tmp_path


# ---------------------------------------------------------------------- each fault


def test_a_sound_file_has_no_fault(folder):
    rows = [
        {"id": "1", "problem": "What color?\nA. red\nB. blue", "answer": "B", "images": ["a.png"], "source": "mine",
         "capability": "perception", "kind": "color", "pass_rate": 0.25},
        {"id": "2", "problem": "What is 3 x 4?", "answer": "12", "capability": "text", "pass_rate": 1},
        {"id": "3", "problem": "What color?", "answer": "blue", "images": ["b.png"], "capability": "perception"},
    ]  # fmt: skip
    result = check([write(folder / "good.jsonl", rows)], measured, max_tokens=10)
    assert (result["rows"], result["kept"], result["usable"], result["dropped"]) == (3, 3, 3, {})
    assert result["counts"]["capability"] == {"perception": 2, "text": 1}
    assert result["counts"]["source"] == {"(none)": 2, "mine": 1}
    assert result["counts"]["answer_type"] == {"letter": 1, "number": 1, "word": 1}
    assert result["counts"]["images"] == {"1": 2, "0": 1}
    assert all(found["rows"] == 0 for found in result["duplicates"].values())
    for sort in ("broken_images", "unusable_prompts", "overlong_prompts", "unanswerable"):
        assert result[sort]["rows"] == 0
    assert result["prompt_tokens"]["max"] == 6 and sum(result["prompt_tokens"]["histogram"]["counts"]) == 3
    sides = result["images"]["longer_side"]
    assert (sides["min"], sides["max"]) == (40, 200)
    assert sides["histogram"]["edges"][0] <= 40 and sides["histogram"]["edges"][-1] > 200
    rate = result["pass_rate"]
    assert (rate["count"], rate["all_right"], rate["all_wrong"], rate["mean"]) == (2, 1, 0, 0.625)
    assert rate["histogram"]["counts"] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 1]


def test_broken_images_are_found_by_decoding_them_whole(folder):
    rows = [{"id": "1", "problem": "What?", "answer": "a", "images": ["cut.png"]},
            {"id": "2", "problem": "Where?", "answer": "a", "images": ["cut.png", "missing.png"]},
            {"id": "3", "problem": "Who?", "answer": "a", "images": ["b.png"]}]  # fmt: skip
    with Image.open(folder / "cut.png") as image:
        assert image.size == (200, 100)  # its header is sound
    result = check([write(folder / "rows.jsonl", rows)], measured, max_tokens=10)
    broken = result["broken_images"]
    assert (broken["images"], broken["rows"], result["usable"]) == (2, 2, 1)
    assert [os.path.basename(found["image"]) for found in broken["paths"]] == ["cut.png", "missing.png"]
    assert "id 1" in broken["examples"][0]["where"] and "cut.png" in broken["examples"][0]["detail"]


def test_a_pipe_is_no_image_and_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    rows = [{"id": "1", "problem": "What?", "answer": "a", "images": ["pipe.png"]}]
    assert check([write(folder / "rows.jsonl", rows)], measured, max_tokens=10)["broken_images"]["images"] == 1


def test_duplicates_are_equal_questions_about_equal_pixels(folder):
    one = write(folder / "one.jsonl", [
        {"id": "1", "problem": "What  color?", "answer": "red", "images": ["a.png"]},
        {"id": "2", "problem": "<image>what color", "answer": "Red", "images": ["same_pixels.bmp"]},  # the same
        {"id": "3", "problem": "What color?", "answer": "red", "images": ["b.png"]},
        {"id": "4", "problem": "What size?", "answer": "red", "images": ["a.png"]},
        {"id": "5", "problem": "What color?", "answer": "red"},
    ])  # fmt: skip
    two = write(folder / "two.jsonl", [
        {"id": "3", "problem": "Which?", "answer": "red"},  # the id of another file
        {"id": "6", "problem": "What color?", "answer": "blue", "images": ["a.png"]},  # another answer
        {"id": "5", "problem": "What color?", "answer": "red"},  # the same row in both files
    ])  # fmt: skip
    found = check([one, two], measured, max_tokens=10)["duplicates"]
    assert {name: sort["rows"] for name, sort in found.items()} == {
        "same_id": 2, "same_question": 2, "conflicting_answers": 1,
    }  # fmt: skip
    assert "id 2" in found["same_question"]["examples"][0]["where"]
    assert "two.jsonl, id 6" in found["conflicting_answers"]["examples"][0]["where"]


def test_prompts_over_the_limit_and_prompts_that_no_model_takes(folder):
    rows = [{"id": "1", "problem": "one two three", "answer": "1"},
            {"id": "2", "problem": "one two three four", "answer": "1"},
            {"id": "3", "problem": "<|image_pad|>", "answer": "1"}]  # fmt: skip
    result = check([write(folder / "rows.jsonl", rows)], measured, max_tokens=3)
    assert (result["overlong_prompts"]["rows"], result["unusable_prompts"]["rows"], result["usable"]) == (1, 1, 1)
    assert "4 tokens, the limit is 3" in result["overlong_prompts"]["examples"][0]["detail"]


OPTIONS = "Which?\nA. cube\nB. ball\nC. cone"


@pytest.mark.parametrize(
    ("answer", "problem", "answer_type", "reason"),
    [
        ("x" * 513, "?", "", "answer too long"),
        ("$$", "?", "", "empty answer"),
        ("...", "?", "", "empty answer"),
        ("1}, {2", "?", "", "answer can't be boxed"),
        ("{1, 2", "?", "", "answer can't be boxed"),
        ("cube", "?", "letter", "bad answer_type"),
        ("D", OPTIONS, "letter", "letter not among the options"),
        ("(D)", "Which? (A) cube (B) ball", "", "letter not among the options"),
        ("e", "Which? a) cube b) ball", "letter", "letter not among the options"),
        ("A, D", OPTIONS, "letter", "letter not among the options"),
    ],
)
def test_answers_that_no_response_could_give(answer, problem, answer_type, reason):
    assert unanswerable(Problem("1", problem, answer, answer_type=answer_type)).reason == reason


@pytest.mark.parametrize(
    ("answer", "problem", "answer_type"),
    [
        ("B", OPTIONS, "letter"), ("(c)", OPTIONS, "letter"), ("A, C", OPTIONS, "letter"), ("ball", OPTIONS, "word"),
        ("x", OPTIONS, "word"), ("D", "What letter is shown?", "letter"), ("E", "Point (D) lies on", "letter"),
        ("S", "Which point? A. P B. Q C. R D. S", "word"), ("12", "?", "number"), ("5 cm", "?", "number"),
        ("\\frac{1}{2}", "?", "expression"), ("\\{1, 2\\}", "?", "expression"), ("{1, 2}", "?", "expression"),
        ("x" * 512, "?", "word"), ("50%", "?", "number"), ("(-\\infty, 3]", "?", "expression"), ("是", "?", "word"),
    ],
)  # fmt: skip
def test_answers_that_can_be_given(answer, problem, answer_type):
    assert unanswerable(Problem("1", problem, answer, answer_type=answer_type)) is None


def test_a_caption_to_learn_needs_no_answer():
    assert unanswerable(Problem("1", "Describe.", "", response="A cube.")) is None


# ---------------------------------------------------------------------- the command


def test_the_command_counts_tokens_of_text_and_images_with_the_default_checkpoint(folder, capsys):
    rows = [{"id": "1", "problem": "What color?", "answer": "red"},
            {"id": "2", "problem": "What color?", "answer": "red", "images": ["a.png"]},
            {"id": "3", "problem": "What color?", "answer": "red", "images": ["b.png"]}]  # fmt: skip
    file = write(folder / "rows.jsonl", rows)
    code, small, err = run(capsys, "check", file, "--max_pixels", 4096)
    assert code == 0 and "Prompt tokens" in err and small["checkpoint"].endswith("tiny_qwen3_vl")
    code, large, err = run(capsys, "check", file, "--min_pixels", 40000, "--max_pixels", 80000, "--json")
    assert code == 0 and "Prompt tokens" not in err
    assert small["prompt_tokens"]["min"] == large["prompt_tokens"]["min"]  # the text alone
    assert small["prompt_tokens"]["min"] < small["prompt_tokens"]["max"] < large["prompt_tokens"]["max"]
    limit = int(small["prompt_tokens"]["max"])
    code, result, _ = run(capsys, "check", file, "--max_pixels", 4096, "--max_tokens", limit - 1, "--strict")
    assert code == 1 and result["overlong_prompts"]["rows"] >= 1 and "exit_code" not in result
    code, result, _ = run(capsys, "check", file, "--max_pixels", 4096, "--max_tokens", limit, "--strict")
    assert code == 0


@pytest.mark.parametrize(
    "row",
    [{"id": "2", "problem": "", "answer": "1"}, {"id": "2", "problem": "?", "answer": "$"},
     {"id": "2", "problem": "?", "answer": "1", "images": ["missing.png"]},
     {"id": "2", "problem": "Say \ufdd0", "answer": "1"}, {"id": "2", "problem": "?", "answer": "1", "scan": "a.png"}],
)  # fmt: skip
def test_strict_fails_on_rows_that_a_run_would_leave_out(folder, capsys, row):
    file = write(folder / "rows.jsonl", [{"id": "1", "problem": "1 + 1?", "answer": "2"}, row])
    assert run(capsys, "check", file, "--strict")[0] == 1
    assert run(capsys, "check", file)[0] == 0


READ = [
    '{"problem": "5 \\times 2?", "answer": "\\frac{20}{2}"}', '{"problem": "2 + 2?", "answer": "<answer> 4 </answer>"}',
    '{"problem": "What color?", "answer": "red", "img": "a.png"}', '{"problem": "n", "answer": 0.30000000000000004}',
    '{"problem": "Which? A. cat B. dog", "answer": "A. cat"}', '{"problem": "Say hi<|im_end|>", "answer": "hi"}',
    '{"problem": "m", "answer": ["4", "four"]}',
]  # fmt: skip
FAULTY = [
    '{"problem": "color?", "answer": "red", "scan": "a.png"}', '{"problem": "n", "answer": true}',
    '{"problem": "x", "answer": "None"}', '{"problem": "Which? A. cat B. dog", "answer": "C"}',
    '{"problem": "Which one? A. cat B. dog", "answer": 0}', '{"problem": "nu?", "answer": "\\nu"}',
]  # fmt: skip


def test_strict_names_each_faulty_row_and_passes_what_is_read(folder, capsys):
    (folder / "read.jsonl").write_text("\n".join(READ))
    code, result, _ = run(capsys, "check", folder / "read.jsonl", "--strict")
    assert code == 0 and result["usable"] == len(READ) and sum(result["repaired"].values()) == 4
    (folder / "faulty.jsonl").write_text("\n".join(FAULTY))
    code, result, _ = run(capsys, "check", folder / "faulty.jsonl", "--strict")
    named = [drop["where"].rpartition(":")[2] for drop in result["dropped_examples"]]
    assert code == 1 and named == [str(number) for number in range(1, len(FAULTY) + 1)]


def test_strict_fails_on_an_empty_file_and_says_so(folder, capsys):
    file = write(folder / "empty.jsonl", [])
    code, result, err = run(capsys, "check", file, "--strict")
    assert code == 1 and result["empty_files"] == [str(file)] and "empty.jsonl" in "".join(err.split())
    assert run(capsys, "check", file)[0] == 0


def test_repairs_and_flawed_images_are_counted_and_no_fault(folder, capsys):
    random_image(320, 320).save(folder / "whole.jpg")
    (folder / "end.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-2])
    rows = [{"id": "1", "problem": "5 \times 2?", "answer": "Answer: 10", "images": ["end.jpg"]},
            {"id": "2", "problem": "1 + 1?", "answers": ["2", "two"], "images": ["whole.jpg"]}]  # fmt: skip
    code, result, err = run(capsys, "check", write(folder / "rows.jsonl", rows), "--strict")
    assert code == 0 and result["usable"] == 2
    assert result["repaired"] == {"lost backslash put back": 1, "answer taken out of its wrapping": 1}
    assert len(result["repaired_examples"]) == 2 and result["repaired_examples"][0]["where"] == "id 1"
    assert result["flawed_images"]["rows"] == 1 and "end.jpg" in result["flawed_images"]["examples"][0]["detail"]
    assert "Repaired" in err and "flawed images" in err


def test_pictures_in_the_rows_are_checked_and_none_is_left(folder, capsys, monkeypatch):
    monkeypatch.delenv("CAPCUR_IMAGES", raising=False)
    good = base64.b64encode((folder / "a.png").read_bytes()).decode()
    cut = base64.b64encode((folder / "cut.png").read_bytes()).decode()
    rows = [{"id": "1", "problem": "What?", "answer": "a", "image": good},
            {"id": "2", "problem": "Where?", "answer": "a", "image": cut}]  # fmt: skip
    file, before = write(folder / "rows.jsonl", rows), sorted(os.listdir(folder))
    code, result, err = run(capsys, "check", file, "--strict")
    assert code == 1 and result["usable"] == 1 and result["broken_images"]["rows"] == 1
    assert sorted(os.listdir(folder)) == sorted({*before, "rows.jsonl"})
    assert cut[:40] not in err + json.dumps(result)


def test_a_missing_file_is_named(tmp_path, capsys):
    code, result, err = run(capsys, "check", tmp_path / "nowhere.jsonl")
    assert code == 2 and result is None and "nowhere.jsonl" in err and "Traceback" not in err


def test_none_of_it_needs_jax():
    modules = ", ".join(
        f"capcur_jax.curation.{name}" for name in ("checking", "splitting", "contamination", "card_pages")
    )
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif("CAPCUR_SHARED_DATA" not in os.environ, reason="needs a folder of public data sets")
@pytest.mark.parametrize("name", ["mathvision", "visonlyqa", "gsm8k"])
def test_public_sets_are_sound(name, tmp_path, capsys):
    file, source = tmp_path / f"{name}.jsonl", os.path.join(os.environ["CAPCUR_SHARED_DATA"], name)
    assert run(capsys, "build", name, "--input", source, "--output", file)[0] == 0
    code, result, _ = run(capsys, "check", file, "--max_tokens", 4096, "--strict")
    assert code == 0 and result["usable"] == result["rows"] > 100
    assert result["duplicates"]["conflicting_answers"]["rows"] == 0


# ---------------------------------------------------------------------- bad input


SEED = 20260
ODD = [
    None, True, 0, -1, 1e308, 10**400, float("nan"), float("inf"), "", " ", "\x00", "\ud800", "<image>", "<image>" * 9,
    "\u202e\u0000\u200b", "a" * 5000, "{" * 400, "\\boxed{" * 50, "$" * 99, "9^{9^{9^9}}", [], [[]], {},
    {"a": {"b": []}},
    ["a.png", None], ["cut.png"], ["."], ["/dev/zero"], ["../" * 200], ["x" * 5000], ["a\x00b"],
    ["data:image/png;base64,AA"],
    ["http://example.com/a.png"], "a.png", ["a.png", "b.png"], {"bytes": "AA"}, [{"bytes": None, "path": "a.png"}],
    [{"path": 3}], "A", "Z", "٣", "½", "<|image_pad|>", "<|vision_start|><|video_pad|>", "<|im_end|>", "NaN",
    "-0", [1, 2], ["letter"], "1}, {2",
]  # fmt: skip
KEYS = ("id", "problem", "answer", "images", "capability", "kind", "response", "answer_type", "source", "pass_rate",
        "pass_rate_by", "predictions", "correctness", "metadata", "other")  # fmt: skip


def mutated(draw):
    """One line of a problem file that something happened to."""
    row = {"id": str(draw.random()), "problem": "What color?\nA. red B. blue", "answer": "A", "images": ["a.png"],
           "pass_rate": 0.5, "metadata": {"image_id": 7}}  # fmt: skip
    if draw.random() < 0.4:  # odd, but text where text belongs
        row[draw.choice(("problem", "answer", "kind"))] = draw.choice([odd for odd in ODD if isinstance(odd, str)])
    else:
        for _ in range(draw.choice((1, 1, 2, 3))):
            row[draw.choice(KEYS)] = draw.choice(ODD)
    if draw.random() < 0.2:
        row.pop(draw.choice(list(row)))
    if draw.random() < 0.05:
        depth = draw.choice((10, 40, 3000, 100_000))
        line = f'{json.dumps(row)[:-1]}, "other": {"[" * depth}{"]" * depth}}}'
    else:
        line = json.dumps(row, ensure_ascii=draw.random() < 0.5)
    data = bytearray(line.encode("utf-8", "surrogatepass"))
    what = draw.random()
    if what < 0.05:
        del data[draw.randrange(len(data)) :]
    elif what < 0.12:
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif what < 0.15:
        data = bytearray(json.dumps(draw.choice(ODD[:30])).encode())
    elif what < 0.17:
        data = bytearray(base64.b64encode(draw.randbytes(300)))
    return bytes(data).replace(b"\n", b" ")


def broken_images(folder, draw):
    """Images of all formats with some bytes changed, cut, or of a size that they have not."""
    for number in range(60):
        buffer = io.BytesIO()
        kind = draw.choice(("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"))
        random_image(draw.randint(1, 60), draw.randint(1, 60), seed=number).save(buffer, kind)
        data = bytearray(buffer.getvalue())
        for _ in range(draw.randint(0, 12)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (folder / f"mutated{number}.png").write_bytes(data[: draw.choice((len(data), len(data) // 2, 30, 0))])


def test_a_thousand_mutated_rows_are_kept_or_counted_and_none_ends_the_check(folder, capsys):
    draw = random.Random(SEED)
    broken_images(folder, draw)
    lines = [mutated(draw) for _ in range(1000)]
    for number in range(60):
        row = {"id": f"image {number}", "problem": "?", "answer": "1", "images": [f"mutated{number}.png"]}
        lines.append(json.dumps(row).encode())
    lines = [line for line in lines if line.strip()]
    (folder / "fuzz.jsonl").write_bytes(b"\n".join(lines))
    code, result, err = run(capsys, "check", folder / "fuzz.jsonl", "--examples", 1000)
    assert code == 0
    assert result["rows"] == len(lines) == result["kept"] + sum(result["dropped"].values())
    assert len(result["dropped"]) > 8 and 300 < result["kept"] < len(lines) - 300
    assert 0 < result["usable"] < result["kept"] and result["unanswerable"]["rows"] == 0
    assert {"answer can't be boxed", "empty answer", "answer too long"} <= set(result["dropped"])
    assert result["broken_images"]["images"] > 10
    assert len(result["dropped_examples"]) == sum(result["dropped"].values())
    for drop in result["dropped_examples"]:
        assert "fuzz.jsonl:" in drop["where"] and drop["where"].rpartition(":")[2].isdigit()
        assert drop["reason"] and len(drop["detail"]) < 400
        if drop["reason"].startswith(("bad ", "no ")):
            assert drop["reason"].split(" ")[1] in drop["detail"]  # the field
    assert max(map(len, err.splitlines())) < 400
    # Nothing but text that can be read gets to a terminal.
    assert not any(character in err for character in "\x00\x1b\u202e\u200b")
