"""Questions on their way to a model and back: what is sent, what is kept, and that nothing is asked twice."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest

from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import INSTRUCTION, PromptBuilder
from capcur_jax.errors import InputError
from capcur_jax.evaluation.asking import Asked, Replies, Said, asked, turn
from capcur_jax.evaluation.benchmarks.base import Row
from capcur_jax.evaluation.served import Served, messages_of
from capcur_jax.rollout.engine import Sampling
from tests.evaluation.asked import FORMATS, SECRET, rows, tiny
from tests.rollout.scripted_server import Raw, ScriptedServer, completion, images, turn_text

GREEDY = Sampling(64, 0.0)
SETTINGS = {"model": "m", "temperature": 0.0}


def number(body):
    return int(turn_text(body).split("Question ")[1].split("?")[0])


def questions(folder, instruction="none", count=6):
    made = rows(folder, count)
    return [asked(tiny(made), row, instruction) for row in made]


def ask(server, folder, path=None, instruction="none", sampling=GREEDY, count=6, **how):
    """One command: asks what is wanted; returns what is known then."""
    how = {"concurrency": 3, "timeout_s": 5.0, "retries": 2, "pause_s": 0.01} | how
    all_of_them = questions(folder, instruction, count)
    with Replies(path or folder / "tiny.jsonl", SETTINGS, all_of_them) as replies:
        served = Served([server.address], "m", sampling, **how)
        served.answer(all_of_them, replies.wanted(), replies.add)
        return replies.said()


@pytest.mark.parametrize("instruction", ["none", "suffix", "system"])
def test_a_request_has_the_images_first_and_byte_true_and_no_gold(tmp_path, instruction):
    with ScriptedServer(lambda body: f"reply {number(body)}") as server:
        said = ask(server, tmp_path, instruction=instruction, sampling=Sampling(321, 0.5, 0.9, 20))
    assert [one.text for one in said] == [f"reply {at}" for at in range(6)] and len(server.requests) == 6
    for body in server.requests:
        at = number(body)
        made = rows(tmp_path)[at]
        assert images(body) == [
            (FORMATS[file.suffix[1:].upper()], file.read_bytes()) for file in made.images
        ]  # also checks that they come first
        assert (body["max_tokens"], body["temperature"], body["top_p"], body["top_k"]) == (321, 0.5, 0.9, 20)
        assert SECRET not in json.dumps(body)
        *before, last = body["messages"]
        assert before == ([{"role": "system", "content": INSTRUCTION}] if instruction == "system" else [])
        text = f"Question {at}?\nA. yes\nB. no" + (f" {INSTRUCTION}" if instruction == "suffix" else "")
        assert turn_text(body) == text and last["role"] == "user"


def test_a_greedy_request_names_no_other_sampling(tmp_path):
    with ScriptedServer(lambda body: "A") as server:
        ask(server, tmp_path)
    assert not {"top_p", "top_k"} & set(server.requests[0])


FLAWED = {
    "429": Raw(429, b"slow down", {"Retry-After": "0.02"}),
    "500": Raw(500, b"boom"),
    "cut connection": Raw(0),
    "no choice": Raw(200, b'{"choices": []}'),
    "empty choice": Raw(200, completion("")),
    "null": Raw(200, completion(None)),
}


@pytest.mark.parametrize("kind", FLAWED)
def test_what_passes_is_tried_again_and_asked_once(tmp_path, kind):
    seen, lock = set(), threading.Lock()

    def reply(body):
        with lock:
            first = number(body) not in seen
            seen.add(number(body))
        return FLAWED[kind] if first else f"reply {number(body)}"

    with ScriptedServer(reply) as server:
        said = ask(server, tmp_path)
        assert [one.text for one in said] == [f"reply {at}" for at in range(6)] and len(server.requests) == 12
        ask(server, tmp_path)
    assert len(server.requests) == 12  # the second command knows all of them


@pytest.mark.parametrize("kind", FLAWED)
def test_what_does_not_pass_is_failed_and_asked_again_by_the_next_command(tmp_path, kind):
    broken = True

    def reply(body):
        return FLAWED[kind] if broken and number(body) == 4 else f"reply {number(body)}"

    with ScriptedServer(reply) as server:
        said = ask(server, tmp_path)
        assert said[4].failed and said[4].text == "" and not any(one.failed for i, one in enumerate(said) if i != 4)
        assert said[4].reply().failed == said[4].failed
        before, broken = len(server.requests), False
        said = ask(server, tmp_path)
        assert [number(body) for body in server.requests[before:]] == [4]
    assert not any(one.failed for one in said) and said[4].text == "reply 4"


def test_how_a_reply_ended_its_tokens_and_a_thought_apart_are_kept(tmp_path):
    scripted = {
        0: completion("half", "length", tokens=64), 1: completion(None, "length", tokens=64, thinking="Hm, "),
        2: completion("done", tokens=3, thinking="Easy."), 3: completion("", tokens=1),
        4: completion("x", "content_filter"),
    }  # fmt: skip
    with ScriptedServer(lambda body: Raw(200, scripted.get(number(body), completion("y")))) as server:
        ask(server, tmp_path)
        said = ask(server, tmp_path)  # as the journal gives them back
    assert len(server.requests) == 6
    assert said == [
        Said("half", "length", 64), Said("", "length", 64, "Hm, "), Said("done", "stop", 3, "Easy."),
        Said("", "stop", 1),  # a model that ends at once has answered
        Said("x", "content_filter"), Said("y", "stop"),
    ]  # fmt: skip


def test_a_broken_image_fails_its_row_alone(tmp_path):
    made = questions(tmp_path)
    (tmp_path / "1.jpeg").write_bytes(b"no picture")
    with ScriptedServer(lambda body: "A") as server, Replies(tmp_path / "j", SETTINGS, made) as replies:
        Served([server.address], "m", Sampling(8, 0.0), concurrency=2).answer(made, replies.wanted(), replies.add)
        failed = {
            question.index: said.failed for question, said in zip(made, replies.said(), strict=True) if said.failed
        }
    assert set(failed) == {question.index for question in made if any("1.jpeg" in file for file in question.images)}
    assert all("1.jpeg" in why and "broken image" in why for why in failed.values())


def test_changed_settings_are_refused_by_name_and_a_changed_row_is_another(tmp_path):
    path, made = tmp_path / "j.jsonl", questions(tmp_path)
    with Replies(path, SETTINGS, made) as replies:
        replies.add([(question, Said("A", "stop")) for question in made])
    with pytest.raises(InputError, match=r"temperature 0.0, now 0.5.*--workdir"):
        Replies(path, SETTINGS | {"temperature": 0.5}, made)
    # Fewer rows, in another order, are the same rows; another text, image, or system turn is not.
    with Replies(path, SETTINGS, made[::-2]) as replies:
        assert not any(replies.wanted())
    (tmp_path / "1.jpeg").write_bytes((tmp_path / "0.png").read_bytes())
    shown = [any("1.jpeg" in file for file in question.images) for question in made]
    with Replies(path, SETTINGS, made) as replies:
        assert replies.wanted() == shown and any(shown)
        assert [one.failed for one in replies.said()] == ["not asked yet" if new else "" for new in shown]
    for other in (questions(tmp_path, "system"), questions(tmp_path, "suffix")):
        with Replies(path, SETTINGS, other) as replies:
            assert all(replies.wanted())


def test_marks_in_a_text_are_places_of_images_where_there_are_images_for_them():
    a, b = Path("a.png"), Path("b.png")
    assert turn("What?", (a, b)) == (a, b, "What?")
    assert turn("First <image>, then <image>: which?", (a, b)) == ("First ", a, ", then ", b, ": which?")
    assert turn("<image>What?", (a,)) == (a, "What?")
    assert turn("What does <image> do in HTML?", ()) == ("What does <image> do in HTML?",)
    assert turn("One and <image>?", (a, b)) == (a, "One and ", b, "?")
    assert turn("<image> and <image>?", (a,)) == (a, "<image> and <image>?")


@pytest.mark.parametrize("placement", ["none", "suffix", "system"])
@pytest.mark.parametrize("text", ["What?", "See <image> here", "<image>"])
def test_a_row_is_asked_as_training_asks_it(processor, placement, text):
    problem = Problem("0", text, "1", ("a.png",))
    benchmark = dataclasses.replace(tiny([]), put=lambda row: row.question)
    made = asked(benchmark, Row("0", text, ("1",), (Path("a.png"),)), placement)
    ours = processor.render([None if isinstance(part, Path) else part for part in made.parts], made.system)
    assert ours == PromptBuilder(processor, placement, 999, 999).render(problem)


def test_the_journal_grows_while_questions_are_drawn_one_by_one(tmp_path):
    """Nothing waits in memory: when the last request goes out, all but those under way are on the disk."""
    path, waiting = tmp_path / "j.jsonl", []

    def reply(body):
        waiting.append(path.read_bytes().count(b"\n") - 1)
        return "A"

    with ScriptedServer(reply) as server:
        ask(server, tmp_path, path, count=60, concurrency=2)
    assert all(known >= sent - 4 for sent, known in enumerate(waiting)) and len(waiting) == 60


def test_a_text_alone_goes_out_as_a_text():
    assert messages_of(Asked("1", ("What?",))) == [{"role": "user", "content": "What?"}]
