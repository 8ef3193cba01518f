"""Claims of a grid by hand from its files, in part or whole, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from scipy import stats

from capcur_jax.errors import InputError
from capcur_jax.evaluation import folders, statistics
from capcur_jax.grid.report import claims, gather, seeds, tables
from capcur_jax.grid.rows import ROWS


@pytest.fixture(scope="module")
def measures(grid):
    return claims.Measures(gather.read([str(grid)]))


def credits(grid, row, seed, name):
    answered = folders.read(grid / row / f"seed{seed}").answered[name]
    return {index: one.verdicts["official"].credit for index, one in answered.items()}


def test_a_difference_is_that_of_the_files(grid, measures):
    gains = [
        100 * (np.array([*credits(grid, "staged", seed, "visual").values()])
               - np.array([*credits(grid, "merged", seed, "visual").values()]))
        for seed in range(3)
    ]  # fmt: skip
    found, by_seed, common = measures.difference("staged", "merged", "visual")
    assert common == (0, 1, 2) and found.mean == pytest.approx(np.mean(gains))
    assert by_seed == pytest.approx(np.mean(gains, axis=1))
    answered = folders.read(grid / "staged/seed0").answered["visual"]
    mean, clusters = np.mean(gains, axis=0), [one.cluster for one in answered.values()]
    rows = "staged", "merged", "order_321", "sft_perception"
    pool = seeds.pool(
        np.array([100 * np.mean([*credits(grid, row, seed, "visual").values()]) for seed in range(3)]) for row in rows
    )
    by_hand = seeds.estimate(by_seed, 2, pool, statistics.standard_error(mean, clusters) ** 2, len(set(clusters)))
    assert (found.error, found.df) == (pytest.approx(by_hand.error), pytest.approx(by_hand.df))


def test_lengths_are_relative_to_the_other_row(measures):
    found, _, _ = measures.difference("staged", "merged", "length")
    one, other = (measures.by_seed(row, "length").mean() for row in ("staged", "merged"))
    assert found.mean == pytest.approx(100 * (one / other - 1)) and found.mean < 0
    low, high = found.interval()
    assert low < found.mean < high < 0


def test_the_base_is_one_row_without_seeds(measures):
    assert measures.grid.rows["base"].seeds == ()
    found = measures.value("base", "text")
    right = measures.grid.rows["base"].credit["text"][0]
    assert found.mean == pytest.approx(100 * right.mean()) and found.error == pytest.approx(100 * stats.sem(right))


def test_a_base_that_answers_differently_is_no_trained_row(measures):
    """Its seeds would make the noise of training look smaller and better known than it is."""
    base, alike = measures.grid.rows["base"], measures.pool("visual")
    credit, tokens = (
        {name: np.concatenate([other(of), of, of]) for name, of in part.items()}
        for part, other in ((base.credit, lambda of: 1 - of), (base.tokens, lambda of: of))
    )
    rows = {**measures.grid.rows, "base": gather.Figures((0, 1, 2), credit, tokens)}
    found = claims.Measures(dataclasses.replace(measures.grid, rows=rows))
    assert found.pool("visual") == alike and alike.df == 8  # of four rows
    assert found.difference("staged", "base", "visual")[0].df != measures.difference("staged", "base", "visual")[0].df


def test_a_base_that_was_asked_otherwise_is_named(grid, measures, tmp_path):
    assert not any("the base was asked otherwise" in note for note in measures.grid.notes)
    shutil.copytree(grid / "staged/seed0", tmp_path / "staged/seed0")
    for part, placement in (("base", "none"), ("final", "system")):
        file = tmp_path / "staged/seed0/evaluation" / part / folders.SCORES
        found = json.loads(file.read_text())
        file.write_text(json.dumps(found | {"conditions": found["conditions"] | {"instruction": placement}}))
    (note,) = (note for note in gather.read([str(tmp_path)]).notes if "asked otherwise" in note)
    assert 'instruction: "none" (base), "system"' in note


def test_a_damaged_summary_is_named(grid, tmp_path):
    shutil.copytree(grid / "staged/seed0", tmp_path / "staged/seed0")
    file = tmp_path / "staged/seed0/summary.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(InputError, match=f"{file}: no JSON"):
        gather.read([str(tmp_path)])


def test_claims_are_adjusted_over_those_that_can_be_tested(measures):
    found = {one.claim.title: one for one in claims.judged(measures)}
    tested = [one for one in found.values() if one.verdict]
    assert len(tested) == 5 and "no finished run of difficulty" in found["difficulty beats merged"].missing
    adjusted = statistics.holm([float(one.difference.p()) for one in tested])
    assert [one.p_holm for one in tested] == adjusted
    assert found["staged training helps"].verdict == claims.HOLDS
    assert all((one.verdict == claims.OPEN) == (one.p_holm >= 0.05) for one in tested)
    shorter = found["staged answers shorter than merged"]
    assert shorter.verdict == claims.HOLDS and shorter.same_sign == 3 and shorter.difference.mean < 0


def test_the_opposite_is_said(grid, tmp_path):
    shutil.copytree(grid / "merged", tmp_path / "staged")
    shutil.copytree(grid / "staged", tmp_path / "merged")
    found = {one.claim.title: one for one in claims.judged(claims.Measures(gather.read([str(tmp_path)])))}
    one = found["staged answers shorter than merged"]
    assert one.verdict == claims.OPPOSITE and one.same_sign == 0
    assert "other sign than in the paper" in str(tables.claims([one]))


def test_one_seed_has_differences_but_no_verdict(grid, tmp_path):
    for row in ("staged", "merged"):
        shutil.copytree(grid / row / "seed0", tmp_path / row / "seed0")
    measures = claims.Measures(gather.read([str(tmp_path)]))
    one = next(one for one in claims.judged(measures) if one.claim.title == "staged beats merged")
    assert not one.verdict and np.isnan(one.p_holm) and "training noise is not known" in one.missing
    assert one.difference.mean == measures.difference("staged", "merged", "visual")[0].mean


def test_same_seeds_alone_are_compared(grid, tmp_path):
    shutil.copytree(grid / "staged", tmp_path / "staged")
    shutil.copytree(grid / "merged/seed2", tmp_path / "merged/seed2")
    _, by_seed, common = claims.Measures(gather.read([str(tmp_path)])).difference("staged", "merged", "visual")
    assert common == (2,) and len(by_seed) == 1
    shutil.move(tmp_path / "staged/seed2", tmp_path / "apart")
    found = {one.claim.title: one for one in claims.judged(claims.Measures(gather.read([str(tmp_path)])))}
    assert found["staged beats merged"].missing == "no seed in common: staged has 0, 1, merged has 2"


def test_questions_that_not_all_were_asked_are_left_out_and_counted(grid, tmp_path):
    for row in ("staged", "merged"):
        shutil.copytree(grid / row / "seed0", tmp_path / row / "seed0")
    file = folders.predictions_file(tmp_path / "merged/seed0/evaluation/final", "text")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-4]))
    found = gather.read([str(tmp_path)])
    assert len(found.clusters["text"]) == 86 and any("text: 4 questions" in note for note in found.notes)
    assert found.rows["base"].credit["text"].shape == (1, 86)


def test_every_claim_names_rows_and_the_papers_values():
    names = {row for claim in claims.CLAIMS for row in (claim.better, claim.worse)}
    assert names <= {"base", *ROWS}
    known = {claim.title: claims.paper_difference(claim.better, claim.worse, claim.paper) for claim in claims.CLAIMS}
    assert known["staged beats merged"] == pytest.approx({"Qwen3-VL-8B": 1.46, "Qwen2.5-VL-7B": 1.52})
    assert known["1-2-3 beats 3-2-1"] == pytest.approx({"Qwen2.5-VL-7B": 4.56})
    assert known["perception by RL beats SFT"] == {"Qwen3-VL-8B": 1.6, "Qwen2.5-VL-7B": 8.1}
    assert [title for title, values in known.items() if not values] == ["1-2-3 beats 2-1-3"]


def test_places_that_cant_be_used_are_named(grid, tmp_path):
    with pytest.raises(InputError, match=r"holds no metrics\.jsonl"):
        gather.read([str(tmp_path)])
    shutil.copytree(grid / "staged/seed0", tmp_path / "mine")
    with pytest.raises(InputError, match="which row is it"):
        gather.read([str(tmp_path / "mine")])
    with pytest.raises(InputError, match="both are staged seed 0"):
        gather.read([f"staged={tmp_path / 'mine'}", str(grid / "staged/seed0")])
    assert [run.name for run in gather.read([f"merged={tmp_path / 'mine'}"]).runs] == ["merged seed 0"]
