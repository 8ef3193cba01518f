"""Order, batches and the sets of a config."""

import threading

import pytest

from capcur_jax import presets, schedule
from capcur_jax.data import loader
from capcur_jax.data import sets as pipeline
from capcur_jax.data.curriculum import Curriculum
from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import read_problems, write_rows
from capcur_jax.errors import InputError
from tests.data.tables import DOCS

PROBLEMS = [Problem(str(i), f"question {i}", str(i)) for i in range(10)]


def ids(problems):
    return [problem.id for problem in problems]


def first(ordered, count):
    return ids(ordered[i] for i in range(count))


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_batches_follow_the_order_and_run_over_epochs(threads):
    ordered = Curriculum().arrange([PROBLEMS], 1, 4)
    batches = loader.batches(ordered.__getitem__, 4, threads=threads)
    got = [next(batches) for _ in range(10)]
    assert all(isinstance(batch, list) and len(batch) == 4 for batch in got)
    assert [id for batch in got for id in ids(batch)] == first(ordered, 40)


@pytest.mark.parametrize("start", [1, 3, 7])
def test_batches_go_on_exactly_where_they_were_left(start):
    ordered = Curriculum().arrange([PROBLEMS], 2, 4)
    whole, rest = (loader.batches(ordered.__getitem__, 4, start=at) for at in (0, start))
    unbroken = [ids(next(whole)) for _ in range(start + 6)]
    assert [ids(next(rest)) for _ in range(6)] == unbroken[start:]


def test_nothing_before_the_start_is_made():
    made = []
    batch = next(loader.batches(lambda number: made.append(number) or number, 4, start=5, threads=1))
    assert batch == [20, 21, 22, 23] and min(made) == 20


def test_what_is_built_is_handed_on_as_it_is():
    built = [(problem, [problem.id]) for problem in PROBLEMS]
    batch = next(loader.batches(built.__getitem__, 3))
    assert all(example is built[n] for n, example in enumerate(batch))


def test_building_runs_ahead_in_threads():
    names = set()

    def build(number):
        names.add(threading.current_thread().name)
        return number

    next(loader.batches(build, 2))
    assert names and threading.current_thread().name not in names


def test_an_error_while_building_reaches_the_caller():
    def build(number):
        raise KeyError("what went wrong")

    with pytest.raises(KeyError, match="what went wrong"):
        next(loader.batches(build, 2))


# ---------------------------------------------------------------------- sets


@pytest.fixture
def config():
    return presets.get("laptop")


def test_a_user_s_file_is_read_and_its_rows_get_the_set_s_name(config, tmp_path):
    write_rows(tmp_path / "mine.jsonl", PROBLEMS)
    config.data.sets.text.train = str(tmp_path / "mine.jsonl")
    problems = pipeline.Sets(config.data, tmp_path).problems("text", "train")
    assert ids(problems) == ids(PROBLEMS) and {problem.capability for problem in problems} == {"text"}


def test_a_set_is_built_on_first_use_into_the_directory(config, tmp_path):
    sets = pipeline.Sets(config.data, tmp_path)
    assert not list(tmp_path.iterdir())
    path = sets.path("text", "test")
    assert tmp_path in path.parents
    problems = sets.problems("text", "test")
    assert problems and problems == read_problems(path, capability="text")[0]
    assert sets.problems("text", "test") is problems  # read once


def test_questions_are_drawn_once(config, tmp_path, monkeypatch):
    write_rows(tmp_path / "mine.jsonl", PROBLEMS)
    config.data.sets.text.test = str(tmp_path / "mine.jsonl")
    sets, asked, drawn = pipeline.Sets(config.data, tmp_path), [], pipeline.drawn
    monkeypatch.setattr(pipeline, "drawn", lambda *what: asked.append(what[1]) or drawn(*what))
    for count in (3, 5, 3, 5):
        found = sets.drawn("text", "test", count)
        assert ids(found) == ids(drawn(PROBLEMS, count, tmp_path / "mine.jsonl"))
        found.clear()  # it is the caller's
    assert asked == [3, 5]


def test_a_set_with_one_file_of_the_user_s_is_the_user_s_in_all_splits(config, tmp_path):
    write_rows(tmp_path / "mine.jsonl", PROBLEMS)
    config.data.sets.text.train = str(tmp_path / "mine.jsonl")
    sets = pipeline.Sets(config.data, tmp_path / "built")
    assert sets.path("text", "train") == tmp_path / "mine.jsonl"
    with pytest.raises(InputError, match=r"config\.data\.sets\.text\.test is empty.*sets\.text\.test=FILE"):
        sets.path("text", "test")  # not built: that would be another task under the same name


def test_bad_rows_are_kept_aside_with_their_reason(config, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n{"problem": "p"}\nnot JSON\n')
    config.data.sets.text.train = str(path)
    sets = pipeline.Sets(config.data, tmp_path)
    assert len(sets.problems("text", "train")) == 1
    (lines,) = sets.skipped_rows.values()
    assert list(sets.skipped_rows) == [("text", "train")] and len(lines) == 2
    assert f"{path}:2" in lines[0] and f"{path}:3" in lines[1]


def test_an_unknown_source_is_an_error_that_names_key_and_choices(config, tmp_path):
    config.data.sets.text.source = "gsm8k"
    with pytest.raises(InputError, match=r"config\.data\.sets\.text\.source = 'gsm8k'.*easy_vqa, word_problems"):
        pipeline.Sets(config.data, tmp_path).problems("text", "train")


def test_neither_file_nor_source_is_an_error_that_says_what_to_name(config, tmp_path):
    config.data.sets.text.source = ""
    message = r"config\.data\.sets\.text\.validation is empty.*--config\.data\.sets\.text\.validation=FILE"
    with pytest.raises(InputError, match=message):
        pipeline.Sets(config.data, tmp_path).problems("text", "validation")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such problem file"), ("", "no usable row"), ("{}\n", "no usable row")]
)
def test_a_useless_file_is_an_error_that_names_key_and_file(config, tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    if content is not None:
        path.write_text(content)
    config.data.sets.text.train = str(path)
    with pytest.raises(InputError, match=rf"config\.data\.sets\.text\.train: {path}: .*{message}|{message}") as caught:
        pipeline.Sets(config.data, tmp_path).problems("text", "train")
    assert str(path) in str(caught.value) and "config.data.sets.text.train" in str(caught.value)


def test_the_config_file_of_the_docs_adds_a_set(tmp_path):
    page = (DOCS / "data.md").read_text(encoding="utf-8")
    names = {}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    config = names["get_config"]()
    config.update_from_flattened_dict({"data.sets.charts.train": str(tmp_path / "train.jsonl")})
    write_rows(tmp_path / "train.jsonl", [Problem("1", "2 + 2?", "4")])
    assert len(pipeline.Sets(config.data, tmp_path).problems("charts", "train")) == 1
    assert [stage.name for stage in schedule.stages(config)] == ["charts"] and config.evaluation.sets == ("charts",)
