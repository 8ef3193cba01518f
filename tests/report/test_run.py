"""The report shows what the records say, whatever is missing, and lets no model output act in the browser."""

import base64
import html.parser
import io
import json
import math
import random
import re
import subprocess
import sys
import xml.etree.ElementTree

import jinja2
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from capcur_jax.records import jsonl
from capcur_jax.report import charts as charts_lib
from capcur_jax.report import page
from capcur_jax.report import run as report
from capcur_jax.report.__main__ import main

STAGES = ("perception", "text", "visual")
COLORS = ("red", "blue", "green", "yellow", "black", "gray", "brown", "teal")
KINDS = {
    "perception": ("color", "position", "shape", "size"),
    "text": ("buying", "sharing", "sum"),
    "visual": ("color codes", "corners", "digit sum"),
}
HOSTILE = (
    "</pre><script>alert(1)</script><img src=x onerror='alert(2)'>\u2028\u202e\x00\ud800 \" onload=\"alert(3) $x^{"
)


def draw_image(path, rng):
    color, sides = rng.choice(COLORS), rng.choice((3, 4, 32))
    image = PIL.Image.new("RGB", (64, 64), (rng.randrange(180, 256),) * 3)
    circle = (rng.randrange(18, 46), rng.randrange(18, 46), rng.randrange(8, 17))
    PIL.ImageDraw.Draw(image).regular_polygon(circle, sides, rotation=rng.randrange(90), fill=color)
    image.save(path)
    return color, {3: "triangle", 4: "rectangle", 32: "circle"}[sides]


def step_record(step, stage, stage_step, share, rng, compiles=False):
    accuracy = min(1.0, max(0.0, 0.5 + 0.4 * (1 - math.exp(-3 * share)) + rng.gauss(0, 0.06)))
    form = min(1.0, 0.94 + 0.05 * share + rng.gauss(0, 0.012))
    seconds = {"rollout": 0.52 + rng.gauss(0, 0.03), "reward": 0.012, "update": 0.6 + rng.gauss(0, 0.02), "sync": 0.004}
    if compiles:
        seconds["rollout"] += 14.0
        seconds["update"] += 21.0
    difference = 2e-6 * math.exp(rng.gauss(0, 0.3))
    return {
        "type": "step",
        "step": step,
        "stage": stage,
        "stage_step": stage_step,
        "objective": "grpo",
        "loss": 0.01 * share + rng.gauss(0, 0.02),
        "reward": 0.9 * accuracy + 0.1 * form,
        "accuracy": accuracy,
        "format": form,
        "response_length": 33 - 6 * share + rng.gauss(0, 1.5),
        "kl": 0.02 * share**1.5,
        "entropy": 0.55 - 0.3 * share + rng.gauss(0, 0.02),
        "clip_fraction": 0.002 * rng.random(),
        "grad_norm": float("nan") if step == 57 else math.exp(rng.gauss(-0.4, 0.35)),
        "token_padding": 0.2 + 0.02 * rng.random(),
        "patch_padding": 0.1,
        "equal_groups": min(1.0, 0.3 + 0.35 * share + rng.gauss(0, 0.08)),
        "truncated": 0.02 * rng.random(),
        "logprob_difference_mean": difference,
        "logprob_difference_max": 40 * difference,
        "tokens_per_second": 80 * 30 / sum(seconds.values()),
        "seconds": sum(seconds.values()) + 0.05,
        **{f"seconds_{phase}": value for phase, value in seconds.items()},
        "compilations": 6 if compiles else 0,
        "skipped_updates": int(step == 57),
    }


def rollout_record(workdir, step, stage, share, rng):
    images = []
    color, shape = rng.choice(COLORS), "circle"
    if stage != "text":
        path = workdir / "images" / f"{step}.png"
        path.parent.mkdir(exist_ok=True)
        color, shape = draw_image(path, rng)
        images = [path]
    a, b = rng.randrange(2, 9), rng.randrange(2, 9)
    problem, answer, thought = {
        "perception": ("What is the color of the shape?", color, f"The image shows a {shape}; it is"),
        "text": (f"A pen costs {a} coins. What do {b} pens cost?", str(a * b), f"{b} pens at {a} coins each make"),
        "visual": (f"Each corner costs {a} coins. What does the shape cost?", str(4 * a), f"A {shape}, {a} coins:"),
    }[stage]
    right = [rng.random() < 0.45 + 0.5 * share for _ in range(5)]
    rewards = [1.0 if ok else 0.1 for ok in right]
    mean, std = np.mean(rewards), np.std(rewards, ddof=1)
    samples = []
    for ok, reward in zip(right, rewards, strict=True):
        given = answer if ok else rng.choice(COLORS) if stage == "perception" else str(rng.randrange(4, 60))
        advantage = 0.0 if std == 0 else (reward - mean) / (std + 1e-6)
        samples.append(
            {
                "response": f"<think>{thought} {given}.</think> \\boxed{{{given}}}",
                "reward": reward,
                "accuracy": float(ok),
                "format": 1.0,
                "advantage": advantage,
                "tokens": rng.randrange(20, 40),
                "finish": "stop",
            }
        )
    record = {"step": step, "stage": stage, "id": f"{stage}-{step:05}", "problem": problem, "answer": answer}
    return {**record, "images": images, "samples": samples}


def write_run(workdir, steps=300, seed=0):
    """The records of a staged run that looks like a real one: three stages, evaluations, rollouts, all files."""
    rng = random.Random(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    accuracy = {
        "perception": [0.512, 0.731, 0.724, 0.718],
        "text": [0.463, 0.458, 0.902, 0.896],
        "visual": [0.478, 0.561, 0.604, 0.873],
    }
    moments = ("base", *STAGES)

    def evaluate(writer, index, step):
        for capability, values in accuracy.items():
            kinds = {kind: min(1.0, values[index] + rng.gauss(0, 0.05)) for kind in KINDS[capability]}
            record = {"type": "evaluation", "step": step, "after": moments[index], "capability": capability}
            record |= {"accuracy": values[index], "format": 0.98, "response_length": 31.0 - index, "questions": 1000}
            record["standard_error"] = 0.0213
            writer.write({**record, "by_kind": kinds})

    with jsonl.JsonLines(workdir / "metrics.jsonl") as log, jsonl.JsonLines(workdir / "rollouts.jsonl") as rollouts:
        evaluate(log, 0, 0)
        length = steps // len(STAGES)
        for index, stage in enumerate(STAGES):
            for stage_step in range(1, length + 1):
                step, share = index * length + stage_step, stage_step / length
                log.write(step_record(step, stage, stage_step, share, rng, compiles=stage_step == 1))
                if stage_step <= 3 or stage_step % 10 == 0 or stage_step > length - 3:
                    rollouts.write(rollout_record(workdir, step, stage, share, rng))
            evaluate(log, index + 1, (index + 1) * length)
    keys = ("base", *(f"after_{stage}" for stage in STAGES), "final")
    summary = {
        "accuracy": {name: dict(zip(keys, [*v, v[-1]], strict=True)) for name, v in accuracy.items()},
        "blind": {"perception": 0.274, "visual": 0.281},
        "seconds": 792.4,
        "step_seconds_median": 1.19,
        "compilations_after_warmup": 0,
        "status": "finished",
        "logprob_difference_mean": 2.1e-6,
        "format_reward_final": 0.988,
        "steps": steps,
        "parameters": 3280128,
        "checkpoint": str(workdir / "final"),
        "skipped": {"rows": 2, "images": 0},
    }
    jsonl.write_json_atomic(workdir / "summary.json", summary)
    config = {"seed": 0, "stages": [{"name": name, "steps": length} for name in STAGES], "optimizer": {"rate": 1e-4}}
    config["evaluation"] = {"temperature": 0.6, "top_p": 0.95}
    jsonl.write_json_atomic(workdir / "config.json", config)
    jsonl.write_json_atomic(workdir / "versions.json", {"python": "3.11.7", "jax": "0.10.2", "commit": "0" * 40})
    return workdir


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def assert_inert(page):
    """No script, no handler, nothing loaded from anywhere."""
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith(("data:image/", "#")), (tag, name, value[:80])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = write_run(tmp_path_factory.mktemp("runs") / "2026-11-22_staged", steps=300)
    return workdir, report.write_report(workdir)


def test_full_run(run):
    workdir, path = run
    assert path == workdir / "report.html" and path.stat().st_size < 3_000_000
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert_inert(page)
    for panel in charts_lib.PANELS:
        assert (panel.title in page.text) == (panel.keys != ("token_accuracy",)), panel.title
    for part in ("Time of a step", "finished", "13 min 12 s", "2.1e-06", "2 rows", "3,280,128", "+39.5", "digit sum"):
        assert part in page.text
    assert "Early in perception" in page.text and "Late in visual" in page.text
    assert page.tags.count("img") == 12 and page.tags.count("article") == 18
    assert "#0a000" not in source and "#0b000" not in source, "every color of a chart follows the page"
    for svg in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)


def test_each_objective_has_its_loss_in_one_place_and_unit():
    base = {"seconds": 1.0, "entropy": 1.0, "grad_norm": 1.0}
    names = ["sft", "grpo", "one that nobody knows yet"]
    steps = [{**base, "step": n, "stage": names[n // 3], "objective": names[n // 3], "loss": 1.0} for n in range(9)]
    charts, _ = charts_lib.curves(steps, charts_lib.stages_of(steps))
    titles = [re.findall(r"<text[^>]*>([^<]*)</text>", chart)[-1] for chart in charts]
    losses = [f"{name.upper()} loss" for name in sorted(names)]
    assert titles[:-1] == ["Entropy", *losses, "Gradient norm"] and "Time of a step" in charts[-1]
    assert ["mean of the step" in chart for chart in charts] == [False, True, True, True, False, False]


def test_same_records_same_file(run):
    workdir, path = run
    before = path.read_bytes()
    assert report.write_report(workdir).read_bytes() == before


def test_hostile_text_does_nothing(tmp_path):
    workdir = tmp_path / "run<script>"
    workdir.mkdir()
    step = {**step_record(1, HOSTILE, 1, 0.5, random.Random(0)), "seconds": 1.0}
    evaluation = {"type": "evaluation", "step": 0, "after": HOSTILE, "capability": HOSTILE, "accuracy": 0.5}
    with jsonl.JsonLines(workdir / "metrics.jsonl") as log:
        log.write(step)
        log.write({**evaluation, "by_kind": {HOSTILE: 0.5}, "questions": 10})
    sample = {"response": HOSTILE, "reward": 1.0, "advantage": 1.0, "tokens": 3, "finish": HOSTILE}
    rollout = {"step": 1, "stage": HOSTILE, "id": HOSTILE, "problem": HOSTILE, "answer": HOSTILE}
    with jsonl.JsonLines(workdir / "rollouts.jsonl") as log:
        log.write({**rollout, "images": [HOSTILE], "samples": [sample]})
    for name in ("config", "versions", "summary"):
        jsonl.write_json_atomic(workdir / f"{name}.json", {"status": HOSTILE, HOSTILE: [HOSTILE]})
    source = report.write_report(workdir).read_text(encoding="utf-8")
    page = Page(source)
    assert_inert(page)
    assert "<script>alert(1)</script>" in page.text, "shown as text"
    assert "\\u2028\\u202e\\u0000\\ud800" in page.text, "invisible characters are shown as escapes"
    assert not set(source) & set("\u2028\u202e\x00")
    assert "default-src 'none'" in source


def test_metrics_only_and_interrupted_with_a_cut_line(run, tmp_path):
    lines = (run[0] / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:140]) + '\n{"type": "st')
    page = Page(report.write_report(tmp_path).read_text(encoding="utf-8"))
    assert "no summary yet" in page.text and "Reward" in page.text
    assert "after perception" in page.text and "73.1%" in page.text, "accuracies come from the evaluation records"
    assert "Sampled responses" not in page.text and "How it was made" not in page.text


def test_run_that_only_began(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "No step is recorded yet" in text and "No evaluation is recorded" in text


def test_sft_only_and_one_step(tmp_path):
    record = {"type": "step", "step": 1, "stage": "sft", "objective": "sft", "loss": 2.5, "token_accuracy": 0.3}
    with jsonl.JsonLines(tmp_path / "metrics.jsonl") as log:
        log.write({**record, "grad_norm": 1.0, "seconds": 0.2})
    page = Page(report.write_report(tmp_path).read_text(encoding="utf-8"))
    assert "SFT loss" in page.text and "Token accuracy" in page.text and "whole step" in page.text
    assert "GRPO loss" not in page.text and "Entropy" not in page.text


def test_resumed_run_counts_a_repeated_step_once(tmp_path):
    rng = random.Random(0)
    with jsonl.JsonLines(tmp_path / "metrics.jsonl") as log:
        for step in (1, 2, 3, 2, 3, 4):
            log.write(step_record(step, "text", step, 0.5, rng))
    assert re.search(r"<b>4</b>steps", report.write_report(tmp_path).read_text(encoding="utf-8"))


def test_images_missing_broken_large_and_transparent(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), np.uint8)).save(
        tmp_path / "large.png"
    )
    PIL.Image.new("LA", (40, 20)).save(tmp_path / "small.png")
    names = ("gone.png", "broken.png", "large.png", "small.png", "gone.png", "gone.png")
    (tmp_path / "metrics.jsonl").write_text("")
    with jsonl.JsonLines(tmp_path / "rollouts.jsonl") as log:
        log.write({"step": 1, "stage": "s", "images": [tmp_path / name for name in names], "samples": []})
    path = report.write_report(tmp_path)
    page = Page(path.read_text(encoding="utf-8"))
    assert "image missing" in page.text and "image unreadable" in page.text and "2 more images" in page.text
    assert page.tags.count("img") == 2 and "1200 x 900 pixels" in str(page.attributes)
    assert path.stat().st_size < 200_000
    sources = [value.partition(",") for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    sizes = [PIL.Image.open(io.BytesIO(base64.b64decode(data))).size for _, _, data in sources]
    assert sizes == [(320, 240), (40, 20)], "pictures are whole"


def test_whatever_a_template_shows_is_safe(tmp_path, monkeypatch):
    """No template has to remember it: plain output, attributes, macros, and what is included."""
    (tmp_path / "a.html").write_text(
        "{% macro m(x) %}<i>{{ x }}</i>{% endmacro %}"
        "{{ x }}<b title='{{ x }}'>{{ m(x) }}</b>{{ nothing }}{% include 'b' %}"
    )
    (tmp_path / "b").write_text("{{ x }}")
    monkeypatch.setattr(page._TEMPLATES, "loader", jinja2.FileSystemLoader(tmp_path))
    monkeypatch.setattr(page._TEMPLATES, "cache", None)
    made = Page(page.render("a.html", x=HOSTILE, nothing=None))
    shown = HOSTILE.replace("\u2028\u202e\x00\ud800", r"\u2028\u202e\u0000\ud800")
    assert made.tags == ["b", "i"] and made.attributes == [("b", "title", shown)] and "".join(made.texts) == 3 * shown
    with pytest.raises(jinja2.UndefinedError):
        page.render("a.html", x="")


def test_long_response_keeps_its_end():
    shown = page.text("x" * 50_000 + "\\boxed{4}")
    assert len(shown) < page.MAX_CHARACTERS + 100 and shown.endswith("boxed{4}")
    assert "47,009 characters left out" in shown


def test_running_mean_leaves_out_what_is_no_number():
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    np.testing.assert_allclose(charts_lib.running_mean(values, 3), [1.5, 1.5, 3.0, 4.5, 4.5])
    assert np.isnan(charts_lib.running_mean(np.array([np.nan]), 5)).all()
    np.testing.assert_allclose(charts_lib.running_mean(np.arange(3.0), 99), np.ones(3))


def test_single_extreme_values_do_not_flatten_a_chart(tmp_path):
    rng = random.Random(0)
    steps = [step_record(step, "text", step, 0.5, rng) for step in range(1, 101)]
    steps[0]["seconds"] = steps[0]["grad_norm"] = 5000.0
    charts, _ = charts_lib.curves(steps, charts_lib.stages_of(steps))
    assert sum("1 beyond the axis, to 5000" in chart for chart in charts) == 2


def test_constant_zero_and_missing_numbers_make_charts():
    record = {**step_record(1, "text", 1, 0.5, random.Random(0)), "kl": 0.0, "entropy": None}
    steps = [{**record, "step": n, "logprob_difference_mean": 0.0, "logprob_difference_max": 0.0} for n in range(1, 6)]
    charts, _ = charts_lib.curves(steps, charts_lib.stages_of(steps))
    assert any("KL" in chart for chart in charts) and not any("Entropy" in chart for chart in charts)


def test_stages_of_steps():
    order = (("a", 1), ("a", 2), ("b", 1), ("a", 1), ("a", 2))
    steps = [{"step": step, "stage": name, "stage_step": inside} for step, (name, inside) in enumerate(order, 1)]
    assert charts_lib.stages_of(steps) == [("a", 1, 2), ("b", 3, 3), ("a", 4, 5)]
    again = [*steps, {"step": 6, "stage": "a", "stage_step": 1}]
    assert charts_lib.stages_of(again)[-1] == ("a", 6, 6), "a stage may follow one of the same name"


def test_very_long_run_is_thinned():
    x = np.arange(10_000.0)
    thinned, mean = charts_lib._thin(x, np.full(10_000, 2.0))
    assert len(thinned) <= charts_lib.MAX_POINTS and set(mean) == {2.0}
    assert thinned[0] > 0 and thinned[-1] < 9_999


def test_command_line(run, tmp_path, capsys):
    assert main([str(run[0])]) == 0
    assert capsys.readouterr().out.strip() == str(run[1])
    assert main([str(tmp_path)]) == 2
    assert "holds no metrics.jsonl: give the work directory" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "config.json").write_text("{")
    assert main([str(tmp_path)]) == 2
    assert "config.json: not JSON" in capsys.readouterr().err


def test_needs_no_jax(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(step_record(1, "text", 1, 0.5, random.Random(0))).replace("NaN", "0")
    )
    code = (
        "import sys; from capcur_jax.report.__main__ import main; main(sys.argv[1:]); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_what_was_left_out_stands_beside_each_accuracy_and_a_late_verdict_at_its_sample(tmp_path):
    base = {"type": "evaluation", "step": 0, "after": "base", "capability": "text", "accuracy": 0.5, "questions": 800}
    with jsonl.JsonLines(tmp_path / "metrics.jsonl") as log:
        log.write(base | {"accuracy_answered": 0.625, "left_out": 200})
        log.write(base | {"after": "text", "accuracy": 0.75, "accuracy_answered": 0.75, "left_out": 0})
    sample = {"response": "r", "reward": 0.0, "accuracy": 0.0, "format": 0.0, "advantage": 0.0, "tokens": 3}
    with jsonl.JsonLines(tmp_path / "rollouts.jsonl") as log:
        log.write({"step": 1, "stage": "text", "id": "a", "problem": "p", "answer": "5", "images": []}
                  | {"samples": [sample | {"timed_out": True}, sample | {"timed_out": False}]})  # fmt: skip
    text = Page(report.write_report(tmp_path).read_text(encoding="utf-8")).text
    assert text.count("(62.5% without 200 left out)") == 1 and "count as wrong" in text
    assert text.count("timed out") == 1
    assert "standard error" not in text  # of records that have none


def test_how_answers_were_drawn_and_how_sure_a_figure_is(run, tmp_path):
    text = " ".join(run[1].read_text(encoding="utf-8").split())
    assert "Answers sampled at temperature 0.6 and top-p 0.95 to held-out questions" in text
    assert "at most 2.1 points; questions about the same image count as one" in text
    for drawn, said in (
        ({"temperature": 0.0, "top_p": 1.0}, "Greedy answers"),
        ({"temperature": 1}, "temperature 1 to"),
    ):
        workdir = write_run(tmp_path / f"{drawn['temperature']}", steps=3)
        jsonl.write_json_atomic(workdir / "config.json", {"evaluation": drawn})
        assert said in report.write_report(workdir).read_text(encoding="utf-8")


def test_a_run_of_which_only_the_base_is_known_has_gained_nothing_yet(tmp_path):
    base = {"type": "evaluation", "step": 0, "after": "base", "capability": "text", "accuracy": 0.5, "questions": 800}
    with jsonl.JsonLines(tmp_path / "metrics.jsonl") as log:
        log.write(base | {"by_kind": {"add": 0.25}})
    for summary in ({}, {"status": "interrupted", "accuracy": {"text": {"base": 0.5}}}):
        jsonl.write_json_atomic(tmp_path / "summary.json", summary)
        text = Page(report.write_report(tmp_path).read_text(encoding="utf-8")).text
        assert "50.0%" in text and "25.0%" in text
        assert "+0.0" not in text and "change" not in text and "final" not in text


def test_where_the_instruction_stood(tmp_path):
    workdir = write_run(tmp_path, steps=3)
    for base, trained, said in (
        ("suffix", "suffix", "Asked with the instruction after the question."),
        (
            "none",
            "system",
            "The base was asked with no instruction, trained models with the instruction as a system turn",
        ),
    ):
        drawn = {"temperature": 0.0, "top_p": 1.0, "instruction": trained, "base_instruction": base}
        jsonl.write_json_atomic(workdir / "config.json", {"evaluation": drawn})
        assert said in report.write_report(workdir).read_text(encoding="utf-8")


def test_alarms_are_listed(tmp_path):
    workdir = write_run(tmp_path, steps=3)
    assert "Alarms" not in report.write_report(workdir).read_text(encoding="utf-8")
    with jsonl.JsonLines(workdir / "metrics.jsonl") as log:
        log.write({"type": "step", "step": 4, "stage": "visual", "alarms": {"entropy_zero": "entropy <0.001> nats"}})
    page = report.write_report(workdir).read_text(encoding="utf-8")
    assert "<td>entropy_zero</td><td>entropy &lt;0.001&gt; nats</td>" in page and "docs/training.md" in page
