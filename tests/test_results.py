"""What a run shows and leaves, from records that are made up: no model, no engine."""

import contextlib
import json
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from capcur_jax import presets, results, schedule
from capcur_jax.checkpoints.checkpointing import Progress
from capcur_jax.data.problem import Problem
from capcur_jax.records.jsonl import JsonLines
from capcur_jax.rollout.engine import sampling_of
from capcur_jax.rollout.groups import Rollout
from tests.rollout.test_groups import group as graded

SETS = ("perception", "text")


def step(number, objective="grpo", **values):
    record = {
        "type": "step", "step": number, "stage": "text", "objective": objective, "seconds": float(number**2),
        "compilations": number % 2, "skipped_updates": number, "loss": 0.5,
    }  # fmt: skip
    return record | ({"logprob_difference_mean": 0.25} if objective == "grpo" else {}) | values


def evaluations(after, accuracies, form=0.5):
    kind = {"type": "evaluation", "step": 0, "after": after, "format": form, "by_kind": {}, "left_out": 2}
    return [
        {**kind, "capability": name, "accuracy": value, "accuracy_answered": round(1.2 * value, 9)}
        for name, value in zip(SETS, accuracies, strict=True)
    ]


class Run:
    """The parts of a Run that results.py asks for; `shown` is what its display was told."""

    def __init__(self, workdir, owner=True, **changes):
        self.config = presets.get("laptop", order=("text",))
        self.config.update_from_flattened_dict(
            {"evaluation.sets": SETS, "evaluation.questions": 2, "rollout.group": 3, **changes}
        )
        self.workdir, self.owner, self.stages = workdir, owner, schedule.stages(self.config)
        self.progress = Progress(step=9, stage_step=4, version=18, best=0.75)
        self.shown, self.closed, self.written, self.evaluated, self.pending = [], [], [], [], []
        names = ("plan", "table", "warn", "final")
        self.display = types.SimpleNamespace(**{n: lambda *a, n=n: self.shown.append((n, *a)) for n in names})
        self.checkpoints = types.SimpleNamespace(close=lambda: self.closed.append("checkpoints"))
        self.recorder = types.SimpleNamespace(
            steps=[step(n) for n in (1, 2, 4)], validations=[], skipped=4,
            evaluations=[*evaluations("base", (0.25, 0.5), 0.0), *evaluations("text", (0.5, 0.75))],
            write=self.written.append, evaluation=lambda *given: self.evaluated.append(given),
            complete=lambda: self.recorder.steps.extend(self.pending),
        )  # fmt: skip
        long = Problem("long", "word", "1")
        builder = types.SimpleNamespace(
            counts={"images": 2, "prompts": 1}, skipped={long: "too long"}, placement="suffix",
            render=lambda problem: f"user: {problem.problem}\n",
        )  # fmt: skip
        processor = types.SimpleNamespace(opened="<think>\n")
        store = types.SimpleNamespace(counters=lambda: {"flawed": 1})
        self.policy = types.SimpleNamespace(
            builder=builder, processor=processor, source=Path("checkpoint"), lora=None, images=store
        )  # fmt: skip
        images = {"perception": ("a.png",), "text": ()}
        self.sets = types.SimpleNamespace(
            skipped_rows={("text", "train"): ["text:3: no answer", "text:5: no answer"], ("text", "test"): ["x"]},
            repaired_rows={("text", "train"): [Problem("7", "2+2?", "4", repaired=("float noise taken off",))]},
            selected=lambda data, curriculum: [["p"] * 3, ["p"] * 4],
            # What all of training has is right once in the test.
            pool=lambda names, split: [Problem(f"{n}{i}", "What?", "red", images[n]) for n in names for i in range(3)],
            missing=lambda name, split: "",
        )
        asked = {name: [Problem("0", "What?", a, images[name]) for a in ("blue", "red", "blue")] for name in SETS}
        described = {"questions": 3, "of": 5, "kinds": {"shape": 2 / 3, "color": 1 / 3}, "sources": {}, "ids": ["0"]}
        composition = {"evaluation": {"split": "test", "sets": {name: described for name in SETS}}}
        builders = dict.fromkeys(("training", "evaluation", "base"), builder)
        self.heldout = types.SimpleNamespace(
            questions=asked.__getitem__, composition=lambda: composition, builders=builders
        )  # fmt: skip
        self.decided = {"model.remat": "full: on a CPU"}
        self.interruption = types.SimpleNamespace(at_once=contextlib.nullcontext)
        self.reward = types.SimpleNamespace(counters=lambda: {"reward_failures": 3})
        self.engine = types.SimpleNamespace(counters=lambda: {"retries": 2})
        flat = {("visual", "a"): 6, ("visual", "b"): 4, ("text", "c"): 90}
        parameters = nnx.from_flat_state([(path, nnx.Param(jnp.ones(n))) for path, n in flat.items()])
        self.trainer = types.SimpleNamespace(parameters=lambda: parameters)
        shape = (1,) * len(self.config.mesh)
        self.mesh = Mesh(np.array(jax.devices()[:1]).reshape(shape), tuple(self.config.mesh.keys()))

    def export(self, name):
        return self.workdir / "checkpoints" / name

    def seconds(self):
        return 12.5

    def finish(self, status="finished"):
        if self.owner:
            with JsonLines(self.workdir / "metrics.jsonl") as lines:
                for record in (*self.recorder.steps, *self.recorder.evaluations):
                    lines.write(record)
        facts = {"parameters": 100, "blind": {"perception": 0.5}, "stages": [{"stage": "text", "steps": 4}]}
        return results.finish(self, status, facts)


def test_the_summary_of_a_finished_run(tmp_path):
    run = Run(tmp_path)
    summary = run.finish()
    assert summary == {
        "status": "finished",
        "accuracy": {
            "perception": {"base": 0.25, "after_text": 0.5, "final": 0.5},
            "text": {"base": 0.5, "after_text": 0.75, "final": 0.75},
        },
        "accuracy_answered": {
            "perception": {"base": 0.3, "after_text": 0.6, "final": 0.6},
            "text": {"base": 0.6, "after_text": 0.9, "final": 0.9},
        },
        "left_out": {name: {"base": 2, "after_text": 2, "final": 2} for name in SETS},
        "instruction": {"training": "suffix", "evaluation": "suffix", "base": "suffix"},
        "blind": {"perception": 0.5},
        "seconds": 12.5,
        "step_seconds_median": 4.0,  # of 1, 4, 16
        "compilations_after_warmup": 1,
        "logprob_difference_mean": 0.25,
        "format_reward_final": 0.5,  # of the last evaluation alone
        "steps": 9,  # those before the records begin included
        "devices": 1,
        "best_validation": 0.75,
        "parameters": 100,
        "stages": [{"stage": "text", "steps": 4}],
        "checkpoint": str(tmp_path / "checkpoints" / "final"),
        "put_right": {"rows": 1, "flawed images": 1},
        "skipped": {"rows": 3, "images": 2, "prompts": 1, "refused_prompts": 0, "updates": 4, "reward_failures": 3},
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == summary and run.closed == ["checkpoints"]
    files = {"report": tmp_path / "report.html", "metrics": tmp_path / "metrics.jsonl"}
    assert run.shown == [("warn", "left out: long: too long"), ("final", summary, files)] and files["report"].is_file()


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_did_not_end_has_no_final_figures(tmp_path, status):
    summary = Run(tmp_path).finish(status)
    assert summary["status"] == status and summary["format_reward_final"] is None
    assert summary["accuracy"]["text"] == {"base": 0.5, "after_text": 0.75}
    assert summary["left_out"]["text"] == {"base": 2, "after_text": 2}


def test_paths_are_told_as_the_folder_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    run = Run(Path("run"))
    run.finish("finished")
    _, summary, files = run.shown[-1]
    assert summary["checkpoint"] == "run/checkpoints/final"
    assert set(map(str, files.values())) == {"run/report.html", "run/metrics.jsonl"}


def test_a_run_that_was_stopped_before_its_first_step_has_a_summary_too(tmp_path):
    run = Run(tmp_path)
    run.recorder.steps, run.recorder.evaluations = [], []
    summary = run.finish("interrupted")
    assert summary["accuracy"] == {} and summary["compilations_after_warmup"] == 0
    for key in ("step_seconds_median", "logprob_difference_mean", "format_reward_final"):
        assert summary[key] is None
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


@pytest.mark.parametrize("status", ["interrupted", "failed", "finished"])
def test_a_run_that_learned_nothing_exports_no_base_as_its_end(tmp_path, status):
    run = Run(tmp_path)
    run.recorder.skipped = run.progress.version  # every update was left out
    run.export = lambda name: run.written.append(name) or tmp_path / name
    summary = run.finish(status)
    wanted = status == "finished"  # such a run has failed: see test_main.py
    assert run.written == ["final"] * wanted and (summary["checkpoint"] is not None) == wanted


def test_a_step_that_is_pending_where_a_run_fails_is_recorded(tmp_path):
    run = Run(tmp_path)
    run.pending = [step(9)]
    assert run.finish("failed")["step_seconds_median"] == 10.0  # of 1, 4, 16, 81


def test_steps_without_a_figure_are_left_out_of_its_mean(tmp_path):
    run = Run(tmp_path)
    values = [math.nan, 0.5, None, 1.0]  # an update that was skipped has none
    run.recorder.steps = [step(n, logprob_difference_mean=value) for n, value in enumerate(values)]
    run.recorder.steps += [step(5, "sft"), step(6, "an objective whose loss does not tell it")]
    assert run.finish()["logprob_difference_mean"] == 0.75


def test_a_process_that_owns_no_file_writes_none(tmp_path):
    run = Run(tmp_path, owner=False)
    assert run.finish()["status"] == "finished" and run.closed == ["checkpoints"]
    results.plan(run, run.stages)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("owner", [True, False])
def test_the_facts_as_text_are_told_in_the_reports_and_nowhere_where_a_set_has_none(tmp_path, owner):
    run, told = Run(tmp_path, owner, **{"evaluation.counterfactual": 3}), []
    dots = [Problem(str(at), "How many?", "3", ("/x.png",), metadata={"caption": "Some dots."}) for at in range(5)]
    run.heldout.questions = {"perception": dots, "text": [Problem("0", "2+1?", "3")]}.__getitem__
    builder = run.heldout.builders["evaluation"]
    builder.try_build, builder.processor = (
        (lambda problem: problem),
        types.SimpleNamespace(response=lambda tokens: tokens),
    )
    run.display.progress = lambda title, total: contextlib.nullcontext(told.append)
    run.engine.generate = lambda prompts, sampling, n, *_: [[types.SimpleNamespace(tokens=p)] * n for p in prompts]
    run.sampling = sampling_of(run.config, "rollout")
    right = lambda problems, texts: [types.SimpleNamespace(accuracy=float(not one.images)) for one in texts]  # noqa: E731
    counters, run.reward = run.reward.counters, right
    results.counterfactual(run)
    run.reward = types.SimpleNamespace(counters=counters)
    run.finish()
    kept = tmp_path / "evaluation" / "final" / "counterfactual.json"
    assert sum(told) == 6 and kept.is_file() == owner
    if owner:
        found = json.loads(kept.read_text())
        assert list(found["sets"]) == ["perception"] and found["sets"]["perception"]["text"]["questions"] == 3
        assert found["sets"]["perception"]["text"]["wrong_right"][0] == 1
        report = (tmp_path / "report.html").read_text()
        assert "facts as text" in report and "<td>100.0</td>" in report and "Chance alone" in report


def test_no_counterfactual_is_asked_where_none_is_wanted(tmp_path):
    run = Run(tmp_path, **{"evaluation.counterfactual": 0})
    results.counterfactual(run)
    run.finish()
    assert not (tmp_path / "evaluation").exists() and "facts as text" not in (tmp_path / "report.html").read_text()


# ---------------------------------------------------------------------- the plan


def test_the_plan_says_what_is_trained_on_what(tmp_path):
    run = Run(tmp_path)
    facts = results.plan(run, run.stages)
    (stages,) = (part["Stages"] for kind, part in run.shown if kind == "plan")
    assert facts == {"parameters": 100, "blind": dict.fromkeys(SETS, 1 / 3), "stages": stages}
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(run.config.to_dict()))
    assert json.loads((tmp_path / "versions.json").read_text())["jax"] == jax.__version__
    (_, plan), *warnings = run.shown
    assert plan["Run"]["parameters"] == 100 and plan["Run"]["of them vision"] == 10
    assert plan["Run"]["model.remat"] == "full: on a CPU"
    assert plan["A prompt, as the model sees it"] == {
        "prompt": '"user: What?\\n"',
        "the template begins": "<think>: rewards count it as part of every response",
    }
    (stage,), held = plan["Stages"], plan["Held-out questions (test)"]
    given = run.config.stages.text
    assert (stage["stage"], stage["data"], stage["problems"], stage["objective"]) == ("text", "text", 7, "grpo")
    assert (stage["steps"], stage["a step"], stage["frozen"]) == (given.steps, f"{given.prompts} x 3", "^visual")
    assert held == [
        {"set": name, "questions": 3, "of": 5, "blind guess": "33.3%", "kinds and sources": "shape 67%, color 33%"}
        for name in SETS
    ]
    assert json.loads((tmp_path / "questions.json").read_text()) == run.heldout.composition()
    assert warnings == [
        ("warn", "text train: 2 rows skipped, the first: text:3: no answer"),
        ("warn", "text test: 1 rows skipped, the first: x"),
        ("warn", "text train: 1 rows put right, the first: 7: float noise taken off (`data check` shows them)"),
    ]


def test_the_plan_shows_each_way_of_asking_and_warns_where_the_base_has_its_own(tmp_path):
    run = Run(tmp_path, **{"evaluation.base_instruction": "none"})
    bare = types.SimpleNamespace(placement="none", render=lambda problem: f"bare: {problem.problem}\n")
    run.heldout.builders["base"] = bare
    results.plan(run, run.stages)
    shown = run.shown[0][1]["A prompt, as the model sees it"]
    assert shown["training, evaluation"] == '"user: What?\\n"' and shown["base"] == '"bare: What?\\n"'
    assert run.shown[1][1].startswith("config.evaluation: base_instruction = 'none' asks the base otherwise than")
    assert "only boxed answers" in run.shown[1][1]
    assert run.finish()["instruction"] == {"training": "suffix", "evaluation": "suffix", "base": "none"}


def test_the_plan_of_an_imitation_and_of_low_rank_factors(tmp_path):
    run = Run(tmp_path, **{"stages.text.objective": "sft", "stages.text.freeze": "", "stages.text.data": SETS})
    run.config.stages.text.curriculum.update({"order": "file", "rows": 0})
    run.stages = schedule.stages(run.config)
    results.plan(run, run.stages)
    run.policy.lora = object()
    results.plan(run, run.stages)
    plain, low_rank = (call[1]["Stages"][0] for call in run.shown if call[0] == "plan")
    assert (plain["data"], plain["a step"], plain["frozen"]) == (
        "perception + text (file)", f"{run.config.stages.text.prompts}", "nothing",
    )  # fmt: skip
    assert low_rank["frozen"] == "all but LoRA's factors"


def test_a_selection_that_leaves_fewer_than_were_to_be_drawn_is_told(tmp_path):
    run = Run(tmp_path)
    run.sets.selected = lambda data, curriculum: [["p"] * 7]
    run.sets.problems = lambda name, split: ["p"] * 10
    for rows, told in ((9, "7 of 10 problems of text, fewer than curriculum.rows = 9"), (20, "= 10"), (7, ""), (0, "")):
        run.config.stages.text.curriculum.update({"rows": rows, "drop_all_right": True})
        run.shown.clear()
        results.plan(run, schedule.stages(run.config))
        said = [one[1] for one in run.shown if one[0] == "warn" and "pass rate" in one[1]]
        assert len(said) == bool(told) and all(told in one for one in said)


def test_blind_guesses_are_for_every_set_that_is_evaluated(tmp_path):
    run = Run(tmp_path)
    # Learned from "train", asked on the test; perception has no stage.
    assert results.plan(run, run.stages)["blind"] == {"perception": 1 / 3, "text": 1 / 3}
    assert run.shown[0][1]["Held-out questions (test)"][0]["blind guess"] == "33.3%"
    run.sets.missing = lambda name, split: "name a file" if name == "perception" else ""
    pooled, pool = [], run.sets.pool
    run.sets.pool = lambda names, split: pooled.append((names, split)) or pool(names, split)
    assert set(results.plan(run, run.stages)["blind"]) == set(SETS)
    assert pooled == [(["text"], "train")] * 2  # of a set without rows of its own: the stages'
    run.config.evaluation.blind = False
    assert results.plan(run, run.stages)["blind"] == {}


def test_with_several_devices_the_plan_says_where_parameters_lie(tmp_path):
    run = Run(tmp_path)
    shape = {axis: 1 for axis in run.config.mesh}
    run.mesh = types.SimpleNamespace(size=2, shape={**shape, "data": 2})
    results.plan(run, run.stages)
    ((_, _, lines),) = [call for call in run.shown if call[0] == "table"]
    assert [line["parameter"] for line in lines] == ["text.c", "visual.a", "visual.b"]


# ---------------------------------------------------------------------- records


def micro(prompts, computed, responses):
    """A micro-batch: prompts of these lengths, with one response to each."""
    real = sum(prompts) + sum(responses)
    return types.SimpleNamespace(slots=lambda: np.array([real, computed, real, 0, 0]))


def test_a_step_s_record(tmp_path, monkeypatch):
    run = Run(tmp_path)
    (stage,) = run.stages
    minis = [[micro((5, 3), 40, (2, 2))], [micro((4, 4), 40, (1, 3)), micro((6, 2), 40, (4, 4))]]
    rollout = Rollout([graded(1, [0, 0.1, 0.9, 1], version=18)], 4, 1, version=18)
    record = results.step_record(run, stage, minis, rollout, 0.125, {"write": 2.0})
    expected = {
        "type": "step", "step": 9, "stage": "text", "stage_step": 4, "objective": "grpo", "learning_rate": 0.125,
        "weight_version": 18, "rollout_retries": 2, "drawn_groups": 4.0, "dropped_groups": 1.0,
        "tokens": 40, "micro_batches": 3, "token_padding": 1 - 40 / 120, "packing": 1.0, "seconds_sync_write": 2.0,
    }  # fmt: skip
    assert {key: record[key] for key in expected} == expected
    imitated = results.step_record(run, stage, minis, None, 0.125, {})
    assert "weight_version" not in imitated and "reward" not in imitated and imitated["tokens"] == 40
    # Tokens are those of all processes.
    monkeypatch.setattr(results.distributed, "exchange", lambda counts: np.stack([counts, counts]))
    assert results.step_record(run, stage, minis, None, 0.125, {})["tokens"] == 80


def test_evaluations_and_validations_are_records_of_the_step_that_is_done(tmp_path):
    run = Run(tmp_path)
    found = [
        {"capability": name, "accuracy": accuracy, "accuracy_answered": 1.0, "questions": 2, "by_kind": {"k": 1.0}}
        for name, accuracy in zip(SETS, (0.25, 0.75), strict=True)
    ]
    run.heldout.evaluate = run.heldout.validate = lambda label: found if label == "text" else None
    results.evaluate(run, "text")
    ((records, seconds),) = run.evaluated
    assert records == [{"type": "evaluation", "step": 9, "after": "text", **result} for result in found]
    assert 0 <= seconds < 60
    assert results.validate(run, "text") == 0.5
    (record,) = run.written
    assert 0 <= record.pop("seconds_all") < 60
    assert record == {
        "type": "validation", "step": 9, "stage": "text", "accuracy": 0.5,
        "perception": {"capability": "perception", "accuracy": 0.25, "accuracy_answered": 1.0, "questions": 2},
        "text": {"capability": "text", "accuracy": 0.75, "accuracy_answered": 1.0, "questions": 2},
    }  # fmt: skip
