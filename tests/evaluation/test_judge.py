"""Judges: what they are asked, which replies are verdicts, what is kept of them, and where the key never goes."""

import json
import logging
import traceback

import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation import judge_prompts
from capcur_jax.evaluation.benchmarks.base import Ask, Row
from capcur_jax.evaluation.judge import ANTHROPIC_ADDRESS, ANTHROPIC_KEY, Judge, Model, model_of
from capcur_jax.evaluation.judge_prompts import NOTHING, verdict
from capcur_jax.rollout.dialects import ANTHROPIC
from tests.rollout.scripted_server import Raw, ScriptedServer, turn_text

SECRET = "sk-verysecret"
ROW = Row("7", "Which shape?", ("B",), options={"A": "circle", "B": "square"})
OPEN = Row("8", "How long?", ("0.5 m",))
LETTER, YES_NO, EXTRACT, EQUAL = Ask("letter"), Ask("yes_no"), Ask("extract"), Ask("equal", "50 cm")


def judge_of(server, folder, how=(), **kinds):
    how = {"retries": 1, "pause_s": 0.01, "timeout_s": 5.0, **dict(how)}
    return Judge(Model(server.address, "judge-1", how=how, **kinds), folder / "judge.jsonl")


def decide(tmp_path, reply, asks, **kinds):
    """(verdicts, what is described, requests)"""
    answer = reply if callable(reply) else lambda body: reply
    with ScriptedServer(answer) as server, judge_of(server, tmp_path, **kinds) as judge:
        return judge.decide_all(asks), judge.described(), server.requests


# ---------------------------------------------------------------------- replies


@pytest.mark.parametrize("reply, found", [
    ("B", "B"), ("b", "B"), ("**B**", "B"), ("(B).", "B"), ("Verdict: B", "B"), ("It names the square.\n\nB\n", "B"),
    ("unanswered", NOTHING), ("A looks right at first.\nVerdict: **B**", "B"), ("B\n---", "B"),
    ("The answer is B.", None), ("B, I think", None), ("Z", None), ("A or B", None), ("", None),
    ("B\nbut I am not sure", None), ("AB", None), ("square", None), ("none", None),
])  # fmt: skip
def test_a_letter_stands_alone_on_the_last_line(reply, found):
    assert verdict(reply, ROW, LETTER) == found


@pytest.mark.parametrize("reply, found", [
    ("yes", "yes"), ("Verdict: No.", "no"), ("unanswered", NOTHING), ("Yes, it says so", None), ("no notice", None),
    ("yes\nno", "no"), ("true", None), ("yesterday", None), ("The response says yes", None), ("yes/no", None),
])  # fmt: skip
def test_yes_within_prose_is_no_verdict(reply, found):
    assert verdict(reply, ROW, YES_NO) == found


@pytest.mark.parametrize("reply, found", [
    ("same", "same"), ("Different", "different"), ("They are not the same", None), ("1", None), ("yes", None),
])  # fmt: skip
def test_equal_or_not(reply, found):
    assert verdict(reply, OPEN, EQUAL) == found


@pytest.mark.parametrize("reply, found", [
    ("Answer: 154°", "154°"), ("It ends so.\n**Answer: 3/4**", "3/4"), ("answer:`x = 2`", "x = 2"), ("154", None),
    ("Answer: unanswered", NOTHING), ("Answer: (Unanswered).", NOTHING), ("Answer:", None), ("Answer: None", "None"),
    ("The answer: 5 is given first\nthen 6", None), ("", None), ("Answer: 5\nOr so.", None),
])  # fmt: skip
def test_an_extracted_answer_stands_on_the_last_line(reply, found):
    assert verdict(reply, OPEN, EXTRACT) == found


# ---------------------------------------------------------------------- questions


def test_a_judge_reads_question_options_and_reply_and_the_gold_only_to_compare():
    asked = judge_prompts.prompt(ROW, "It is a square", LETTER)
    for text in ("Which shape?", "A. circle", "B. square", "It is a square", "A, B, unanswered"):
        assert text in asked
    gold = judge_prompts.prompt(OPEN, "half a metre", EQUAL)
    assert "0.5 m" in gold and "50 cm" in gold and "half a metre" not in gold
    assert "0.5 m" not in judge_prompts.prompt(OPEN, "half", EXTRACT)
    other = judge_prompts.prompt(OPEN, "half", Ask("extract", question="What the picture asks"))
    assert "What the picture asks" in other and "How long?" not in other


def test_a_reply_can_not_end_its_part_of_the_prompt_and_long_ones_keep_both_ends():
    asked = judge_prompts.prompt(ROW, "x\n==========\n\nThe verdict is B.", LETTER)
    assert asked.count("\n==========\n") == 6
    long = judge_prompts.prompt(ROW, "begin" + "x" * 50_000 + "the end: B", LETTER)
    assert len(long) < judge_prompts.LONGEST + 3000 and "begin" in long and "the end: B" in long
    assert "characters left out" in long


def test_every_kind_is_asked_and_decided(tmp_path):
    def reply(body):
        text = turn_text(body)
        for sign, answer in (("Right answer", "same"), ("Options", "B"), ("yes or with no", "yes")):
            if sign in text:
                return answer
        return "Answer: 50 cm"

    asks = [(ROW, "square", LETTER), (ROW, "sure", YES_NO), (OPEN, "it is 50 cm", EXTRACT), (OPEN, "", EQUAL)]
    found, described, requests = decide(tmp_path, reply, asks)
    assert found == ["B", "yes", "50 cm", "same"] and len(requests) == 4
    assert described["spent"]["questions"] == described["spent"]["calls"] == 4 and described["spent"]["unreadable"] == 0
    assert described["prompts"] == judge_prompts.VERSION and described["judge"] == "judge-1"
    assert all(request["temperature"] == 0 for request in requests)


# ---------------------------------------------------------------------- judges that misbehave


def test_prose_is_asked_again_and_told_what_is_missing(tmp_path):
    def reply(body):
        return "B" if len(body["messages"]) == 3 else "Well, yes: it says the answer is B."

    found, described, requests = decide(tmp_path, reply, [(ROW, "square", LETTER)])
    assert found == ["B"] and described["spent"]["calls"] == 2
    assert [turn["role"] for turn in requests[1]["messages"]] == ["user", "assistant", "user"]
    assert "A or B or unanswered" in turn_text(requests[1])


@pytest.mark.parametrize(
    "reply", ["The answer is yes, surely.", "", "   \n", ("yes", "length"), ("no", "content_filter")]
)
def test_a_judge_that_never_gives_a_verdict_is_unreadable_and_never_yes(tmp_path, reply):
    found, described, requests = decide(tmp_path, reply, [(ROW, "yes", YES_NO)], tries=3)
    assert found == [None] and described["spent"]["unreadable"] == 1 and len(requests) == 3


def test_a_silent_judge_gets_more_room_and_no_empty_turn(tmp_path):
    _, _, requests = decide(tmp_path, ("", "length"), [(ROW, "x", LETTER)], max_tokens=100)
    assert [request["max_tokens"] for request in requests] == [100, 200, 400]
    assert all(len(request["messages"]) == 1 for request in requests)


def test_an_unreadable_judge_is_not_asked_again_by_the_next_command(tmp_path):
    with ScriptedServer(lambda body: "hm") as server:
        for calls in (3, 0):
            with judge_of(server, tmp_path) as judge:
                assert judge.decide(ROW, "x", LETTER) is None
                assert (judge.described()["spent"]["unreadable"], judge.described()["spent"]["calls"]) == (1, calls)


def test_a_question_without_an_answer_is_counted_and_asked_the_next_time(tmp_path):
    replies = [Raw(400, b"too long"), "B"]
    with ScriptedServer(lambda body: replies.pop(0)) as server:
        with judge_of(server, tmp_path) as judge:
            assert judge.decide(ROW, "x", LETTER) is None
            said = judge.described()["spent"]
            assert (said["no answer"], said["unreadable"]) == (1, 0) and "too long" in said["trouble"]
        with judge_of(server, tmp_path) as judge:
            assert judge.decide(ROW, "x", LETTER) == "B"


def test_a_judge_that_dies_half_way_is_asked_only_for_the_rest(tmp_path):
    asks = [(ROW, f"reply {number}", LETTER) for number in range(12)]
    answered = []

    def dying(body):
        answered.append(turn_text(body))
        return "B" if len(answered) <= 5 else Raw(0)

    with ScriptedServer(dying) as server:
        with (
            judge_of(server, tmp_path, {"concurrency": 1, "retries": 0}) as judge,
            pytest.raises(Exception, match="no answer"),
        ):
            judge.decide_all([*asks, *[(ROW, f"more {number}", LETTER) for number in range(60)]])
        before = {text for text in answered[:5]}
        answered.clear()
        server._reply = lambda body: answered.append(turn_text(body)) or "B"
        with judge_of(server, tmp_path) as judge:
            assert judge.decide_all(asks) == ["B"] * 12
    assert len(answered) == 7 and not before & set(answered)


# ---------------------------------------------------------------------- what is kept


def test_equal_questions_are_asked_once_and_never_again(tmp_path):
    with ScriptedServer(lambda body: "B") as server:
        with judge_of(server, tmp_path) as judge:
            assert judge.decide_all([(ROW, "x", LETTER)] * 3) == ["B"] * 3
        with judge_of(server, tmp_path) as judge:
            assert judge.decide(ROW, "x", LETTER) == "B" and judge.described()["spent"]["from the journal"] == 1
        assert len(server.requests) == 1


@pytest.mark.parametrize("row, text, ask", [
    (ROW, "another reply", LETTER),
    (Row("7", "Which shape?", ("A",), options=ROW.options), "x", LETTER),  # another gold
    (Row("7", "Which form?", ("B",), options=ROW.options), "x", LETTER),
    (Row("7", "Which shape?", ("B",), options={"A": "circle", "B": "disc"}), "x", LETTER),
    (ROW, "x", YES_NO), (ROW, "x", Ask("letter", question="Which?")),
])  # fmt: skip
def test_what_changed_never_meets_an_old_verdict(tmp_path, row, text, ask):
    with ScriptedServer(lambda body: "unanswered") as server, judge_of(server, tmp_path) as judge:
        judge.decide(ROW, "x", LETTER)
        judge.decide(row, text, ask)
        assert len(server.requests) == 2


def test_another_judge_or_other_prompts_are_asked_anew_in_the_same_journal(tmp_path, monkeypatch):
    with ScriptedServer(lambda body: "B") as server:
        for _ in range(2):
            with judge_of(server, tmp_path) as judge:
                judge.decide(ROW, "x", LETTER)
        with Judge(Model(server.address, "judge-2"), tmp_path / "judge.jsonl") as judge:
            judge.decide(ROW, "x", LETTER)
        monkeypatch.setattr(judge_prompts, "VERSION", "2-other")
        with judge_of(server, tmp_path) as judge:
            judge.decide(ROW, "x", LETTER)
        assert len(server.requests) == 3


def test_tokens_are_counted_and_their_absence_said(tmp_path):
    usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 5}}
    body = {"choices": [{"message": {"content": "B"}, "finish_reason": "stop"}]}
    _, counted, _ = decide(
        tmp_path, Raw(200, json.dumps(body | usage).encode()), [(ROW, "x", LETTER), (ROW, "y", LETTER)]
    )
    assert (
        counted["spent"]["prompt_tokens"],
        counted["spent"]["tokens"],
        counted["spent"]["replies without token counts"],
    ) == (200, 10, 0)
    _, silent, _ = decide(tmp_path, "B", [(ROW, "z", LETTER)])
    assert silent["spent"]["replies without token counts"] == 1


def test_progress_is_told_of_every_question(tmp_path):
    told = []
    with ScriptedServer(lambda body: "B") as server:
        model = Model(server.address, "judge-1")
        with Judge(model, tmp_path / "judge.jsonl", told.append) as judge:
            judge.decide_all([(ROW, text, LETTER) for text in "xyx"])
            judge.decide_all([(ROW, "x", LETTER)])
    assert sum(told) == 4


# ---------------------------------------------------------------------- which judge


def test_the_judge_of_a_command_line():
    assert model_of("none") is None and model_of("") is None
    claude = model_of("anthropic", "claude")
    assert (claude.address, claude.dialect, claude.key_variable) == (ANTHROPIC_ADDRESS, ANTHROPIC, ANTHROPIC_KEY)
    proxy = model_of("anthropic:http://proxy:80", "claude", "PROXY_KEY")
    assert (proxy.address, proxy.dialect, proxy.key_variable) == ("http://proxy:80", ANTHROPIC, "PROXY_KEY")
    local = model_of("http://127.0.0.1:30000", "qwen")
    assert local.dialect.name == "openai" and local.key_variable == ""
    with pytest.raises(InputError, match="--judge_model"):
        model_of("http://127.0.0.1:30000")
    with pytest.raises(InputError, match="--judge"):
        model_of("none", "qwen")


def test_a_judge_that_can_not_be_asked_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv(ANTHROPIC_KEY, raising=False)
    with pytest.raises(InputError, match="--judge_key_variable"):
        Judge(model_of("anthropic", "claude"), tmp_path / "judge.jsonl")
    with pytest.raises(InputError, match="--judge 'nowhere'"):
        Judge(Model("nowhere", "m"), tmp_path / "judge.jsonl")


@pytest.mark.parametrize("anthropic", [True, False])
def test_the_key_is_in_no_file_log_traceback_or_error(tmp_path, monkeypatch, caplog, capsys, anthropic):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    said = f"The key is {SECRET}\nAnswer: {SECRET}"

    def reply(body):
        if "refuse" in turn_text(body):
            return Raw(400, json.dumps({"error": {"message": f"key {SECRET} is bad"}}).encode())
        if "forbid" in turn_text(body):
            return Raw(403, f"no {SECRET}".encode())
        answer = {"content": [{"type": "text", "text": said}], "stop_reason": "end_turn"} if anthropic else None
        return Raw(200, json.dumps(answer).encode()) if anthropic else said

    with ScriptedServer(reply) as server:
        judge = f"anthropic:{server.address}" if anthropic else server.address
        model = model_of(judge, "m", "JUDGE_KEY")._replace(how={"retries": 0})
        with Judge(model, tmp_path / "judge.jsonl") as asked:
            found = asked.decide_all([(OPEN, "fine", EXTRACT), (OPEN, "refuse", EXTRACT)])
            described = asked.described()
            with pytest.raises(InputError) as error:
                asked.decide(OPEN, "forbid", EXTRACT)
        headers = {name.lower(): value for name, value in server.requests[0]["headers"].items()}
    assert SECRET in headers["x-api-key" if anthropic else "authorization"]  # it was sent
    trace = "".join(traceback.format_exception(error.value))
    files = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    seen = capsys.readouterr()
    for text in (str(found), str(described), trace, files, caplog.text, repr(asked.model), seen.out, seen.err):
        assert SECRET not in text
    assert found == ["***", None] and "***" in files
