"""Public benchmarks that were asked of a grid's runs: scores, errors, differences, and what is said of missing ones."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation import outcome, statistics
from capcur_jax.evaluation.benchmarks import registry
from capcur_jax.evaluation.benchmarks.base import Reply, Row, Verdict
from capcur_jax.evaluation.folders import Answered
from capcur_jax.grid.report import page, seeds, tables
from capcur_jax.grid.report.benchmarks import FOLDER, OF_BASE, Measured
from capcur_jax.grid.report.claims import Measures
from capcur_jax.grid.report.gather import read

RIGHT = {"base": 0.3, "staged": 0.7, "merged": 0.5}


def mmstar(at):
    return Row(
        f"{at}", f"Which of {at}?", ("A",), facts={"category": "math", "l2_category": ""}, cluster=f"image {at // 2}"
    )


def wemath(at):
    group, part = divmod(at, 3)
    key = ("2steps_1", "2steps_2", "2steps_multi")[part]
    return Row(
        f"{at}",
        f"Step {at}?",
        ("A",),
        facts={"ID": f"{group}", "key": key, "concept": "" if at % 3 else "area"},
        cluster=f"{group}",
    )


def pope(at):
    splits = ("random", "popular", "adversarial")[: 1 + at % 3]
    return Row(
        f"{at}", f"Is there a {at}?", ("Yes" if at % 2 else "No",), facts={"splits": splits}, cluster=f"{at // 6}"
    )


ROWS = {"mmstar": mmstar, "wemath": wemath, "pope": pope}


def asked(folder, right, seed, questions=60, names=tuple(ROWS), **conditions):
    """What `evaluate --workdir=FOLDER` leaves, with answers that are drawn."""
    rng = np.random.default_rng(seed)
    scores, answered = {"benchmarks": {}}, {}
    for name in names:
        rows = [ROWS[name](at) for at in range(questions)]
        answered[name] = []
        for row, good in zip(rows, rng.random(questions) < right, strict=True):
            other = {"Yes": "No", "No": "Yes", "A": "B"}[row.gold[0]]
            said = row.gold[0] if good else other
            verdict = Verdict(float(good), "rule", said)
            answered[name].append(Answered(row, Reply(said), {"official": verdict, "kit": verdict}))
        told = {"judge": "none", "seed": seed} | conditions
        scores["benchmarks"][name] = outcome.outcome(answered[name], registry.get(name).metrics, told)
    outcome.write(folder, scores, answered)
    return scores["benchmarks"]


@pytest.fixture
def place(grid, tmp_path):
    """A grid of two rows of three runs; `place.scores`: what they scored, by (row, seed)."""
    for row in ("staged", "merged"):
        for seed in range(3):
            shutil.copytree(grid / row / f"seed{seed}", tmp_path / row / f"seed{seed}")
    return tmp_path


def ask_all(place, **options):
    found = {(row, seed): asked(place / row / f"seed{seed}" / FOLDER, RIGHT[row], seed + 10 * len(row), **options)
             for row in ("staged", "merged") for seed in range(3)}  # fmt: skip
    return found | {("base", 0): asked(place / OF_BASE, RIGHT["base"], 99, **options)}


def lines(place):
    """benchmark and row -> the texts of Table 1's other cells."""
    found = read([str(place)])
    table = tables.papers(Measures(found), Measured(found))[0]
    assert table.title.startswith("Table 1")
    return {(one.cells[0].text, one.row): [cell.text for cell in one.cells[2:]] for one in table.lines}


def test_every_row_has_the_mean_of_its_runs_scores(place):
    scores, found = ask_all(place), lines(place)
    for name, title in {"mmstar": "MMStar", "wemath": "WeMath", "pope": "POPE"}.items():
        for row in ("base", "staged", "merged"):
            of = [one[name]["kit"]["score"] for (other, _), one in scores.items() if other == row]
            ours, runs, *_ = found[title, row]
            assert ours == f"{np.mean(of):.1f}" and runs == str(len(of)), (name, row)
    gain = np.mean([scores["staged", seed]["pope"]["kit"]["score"] for seed in range(3)])
    gain -= scores["base", 0]["pope"]["kit"]["score"]
    assert found["POPE", "staged"][2] == f"{gain:+.1f}" and found["POPE", "base"][2] == "-"
    assert found["WeMath", "staged"][-1] == "56.10 / 38.30" and found["WeMath", "merged"][-1] == "not known"
    assert found["MathVista (mini)", "staged"][0] == found["visual math", "staged"][0] == "not measured"


def test_errors_are_those_of_the_seeds_and_of_the_questions(place):
    scores = ask_all(place)
    measured = Measured(read([str(place)]))
    for name in ROWS:
        score = {row: np.array([scores[row, seed][name]["kit"]["score"] for seed in range(3)])
                 for row in ("staged", "merged")}  # fmt: skip
        base = measured.measures((name,)).value("base", name)
        low, high = scores["base", 0][name]["kit"]["interval"]
        assert float(base.mean) == pytest.approx(scores["base", 0][name]["kit"]["score"])
        if name != "mmstar":  # the jackknife's interval, which evaluate writes; of a mean it is Wilson's
            assert np.clip(base.interval(), 0, 100) == pytest.approx((low, high), abs=0.01)
        difference, by_seed, _ = measured.measures((name,)).difference("staged", "merged", name)
        assert by_seed == pytest.approx(score["staged"] - score["merged"])
        pool = seeds.pool(score.values())
        assert difference.error**2 > 2 * pool.variance / 3 > 0 and pool.df <= difference.df < 1000


def test_questions_of_one_group_are_one_cluster(place):
    ask_all(place)
    measures = Measured(read([str(place)])).measures(("mmstar",))
    credit = measures.grid.rows["base"].credit["mmstar"][0]
    assert len(credit) == 60 and measures.value("base", "mmstar").error == pytest.approx(
        100 * statistics.standard_error(credit, measures.grid.clusters["mmstar"])
    )
    groups = Measured(read([str(place)])).measures(("wemath",)).grid.clusters["wemath"]
    assert len(groups) == 20


def test_groups_of_benchmarks_are_means(place):
    ask_all(place)
    measured = Measured(read([str(place)]))
    together = measured.measures(("mmstar", "pope"))
    alone = [float(measured.measures((name,)).value("staged", name).mean) for name in ("mmstar", "pope")]
    assert float(together.value("staged", "mmstar + pope").mean) == pytest.approx(np.mean(alone))


def test_what_was_not_asked_is_said(place):
    ask_all(place, names=("mmstar",))
    shutil.rmtree(place / "merged/seed1" / FOLDER)
    asked(place / "staged/seed2" / FOLDER, 0.5, 7, questions=50, names=("mmstar",), judge="someone")
    notes = " ".join(Measured(read([str(place)])).notes)
    assert "mmstar: not asked of merged seed 1" in notes and "mmstar: 10 questions that not all" in notes
    assert 'mmstar: asked with different judge: "none", "someone"' in notes
    found = lines(place)
    assert found["MMStar", "merged"][1] == "2" and found["POPE", "staged"][0] == "not measured"
    said = page.write([str(place)], place)[1].read_text()
    assert "- mmstar: not asked of merged seed 1" in said and re.search(r"\| MMStar \| staged \| [\d.]+ \(", said)


def test_without_benchmarks_table_1_has_the_papers_figures_alone(place):
    found = lines(place)
    assert found["MMStar", "staged"] == ["not measured", "-", "-", "-", "73.10 / not known"]
    assert not Measured(read([str(place)])).notes


def test_scores_that_their_rows_do_not_give_are_refused(place):
    ask_all(place, names=("pope",))
    file = place / OF_BASE / "scores.json"
    scores = json.loads(file.read_text())
    scores["benchmarks"]["pope"]["kit"]["score"] += 1
    file.write_text(json.dumps(scores))
    with pytest.raises(InputError, match=r"pope\.tsv: its rows give .* evaluate again"):
        Measured(read([str(place)]))


def test_the_base_of_two_grids_is_one(place, grid, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(grid / "order_321/seed0", other / "order_321/seed0")
    ask_all(place, names=("mmstar",))
    shutil.copytree(place / OF_BASE, other / OF_BASE)
    with pytest.raises(InputError, match="both are the base's benchmarks"):
        Measured(read([str(place), str(other)]))
