"""The perception filter: its rule, its two passes by served and local models, and what is asked once only."""

import asyncio
import base64
import collections
import io
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capcur_jax.curation import perception_filter
from capcur_jax.curation.filter_models import Asked, How, LocalModel, ServedModel, open_models
from capcur_jax.curation.perception_filter import KEPT, readable, verdict
from capcur_jax.data.__main__ import main
from capcur_jax.data.problem import Drop, Problem
from capcur_jax.data.rows import read_problems, write_rows
from capcur_jax.errors import InputError
from tests.conftest import random_image
from tests.rollout.scripted_server import Raw, ScriptedServer, has_image, turn_text

QUESTION = "<image>What colour is it?\nA. red\nB. blue\nC. green\nD. pink"


def make_rows(folder, count, answer="B"):
    """Rows whose question and caption name their number; images of their own."""
    rows = []
    for i in range(count):
        random_image(24 + 4 * i, 30, seed=i).save(folder / f"{i}.png")
        known = {"caption": f"Thing <{i}> is blue.", "image_id": f"photo {i}"}
        text = QUESTION.replace("it?", f"thing <{i}>?")
        rows.append(Problem(f"row-{i}", text, answer, images=(str(folder / f"{i}.png"),), metadata=known))
    return rows


def number(body):
    return int(turn_text(body).split("<", 1)[1].split(">", 1)[0])


def scripted(image, caption):
    """A server's reply: from the tables of an image-only and a caption-only model, by the row's number."""
    return lambda body: (image if has_image(body) else caption)[number(body)]


def run_filter(capsys, folder, servers, *more, rows=None, output="out.jsonl"):
    """(exit code, final JSON or what was said, kept, dropped rows)"""
    if rows is not None:
        write_rows(folder / "in.jsonl", rows)
    files = {"--input": "in.jsonl", "--output": output, "--keep_dropped": "dropped.jsonl"}
    arguments = ["filter", *(x for name, file in files.items() for x in (name, str(folder / file))), "--retries", "0"]
    for i, server in enumerate(servers):
        arguments += ["--model", f"served:{server.address},M{i + 1}"]
    code = main([*arguments, *more])
    said = capsys.readouterr()
    if code:
        return code, said.err, [], []
    kept, dropped = (
        read_problems(folder / file)[0] if (folder / file).stat().st_size else [] for file in (output, "dropped.jsonl")
    )
    return code, json.loads(said.out.splitlines()[-1]), kept, dropped


# ---------------------------------------------------------------------- the rule


def test_the_rule_of_one_model():
    says = ["A", "B", "C", "D", None]
    for image, caption in itertools.product(says, says):
        sensitive = image is not None and image != "B" and caption == "B"
        assert (verdict("B", image, caption) == KEPT) == sensitive
    assert verdict("B", "B", "A") == "image: right"
    assert verdict("B", None, "B") == "image: no letter"
    assert verdict("B", "A", None) == "caption: no letter"
    assert verdict("B", "A", "C") == "caption: wrong"


def test_every_model_must_agree(capsys, tmp_path):
    """All 9 x 9 cases of two models: right, wrong and no letter, from the image and from the caption."""
    says = {"right": "B", "wrong": "C", "none": "I cannot tell"}
    cases = list(itertools.product(says, repeat=4))
    rows = make_rows(tmp_path, len(cases))
    tables = [[says[case[i]] for case in cases] for i in range(4)]
    with ScriptedServer(scripted(*tables[:2])) as one, ScriptedServer(scripted(*tables[2:])) as two:
        _, result, kept, dropped = run_filter(capsys, tmp_path, [one, two], rows=rows)
        assert len(one.requests) == len(two.requests) == 2 * len(cases)
    sensitive = [f"row-{i}" for i, case in enumerate(cases) if case == ("wrong", "right", "wrong", "right")]
    assert [row.id for row in kept] == sensitive and len(sensitive) == 1
    assert [row.id for row in dropped] == [row.id for row in rows if row.id not in sensitive]
    assert result["rows"] == 81 and result["kept"] == 1
    assert result["dropped"] == {
        "image: right": 30,
        "image: no letter": 30,
        "caption: wrong": 10,
        "caption: no letter": 10,
    }
    each = {KEPT: 9, "image: right": 27, "image: no letter": 27, "caption: wrong": 9, "caption: no letter": 9}
    assert result["models"]["M1"] == result["models"]["M2"] == each
    assert result["models"]["all"] == {KEPT: 1, **result["dropped"]}
    assert result["passes"]["M1"] == {
        which: {"right": 27, "wrong": 27, "no letter": 27} for which in ("image", "caption")
    }
    for row in (*kept, *dropped):
        case = cases[int(row.id.removeprefix("row-"))]
        for at, name in ((0, "M1"), (2, "M2")):
            said = row.metadata["filter"][name]
            letters = {"right": "B", "wrong": "C", "none": None}
            assert (said["image"], said["caption"]) == (letters[case[at]], letters[case[at + 1]])
            assert (said["image_text"], said["caption_text"]) == (says[case[at]], says[case[at + 1]])
        assert row.metadata["image_id"].startswith("photo")


def test_rows_that_cannot_be_judged_are_counted(tmp_path):
    (row,) = make_rows(tmp_path, 1)
    known = dict(images=row.images, metadata={"caption": "Blue."})
    assert readable(Problem("a", QUESTION, "blue", **known)).reason == "answer is no letter"
    assert readable(Problem("a", QUESTION, "E", **known)).reason == "answer is no letter"
    assert readable(Problem("a", QUESTION[7:], "B", metadata=known["metadata"])).reason == "no image"
    assert readable(Problem("a", QUESTION, "B", images=row.images)).reason == "no caption"
    assert readable(Problem("a", QUESTION, "B", images=row.images, metadata={"caption": 3})).reason == "no caption"
    assert readable(Problem("a", QUESTION, "(b)", **known)).answer == "B"
    assert readable(Problem("a", "Q (a) 1 (b) 2", "c", **known)).reason == "answer is no letter"
    five = {"caption": "Blue.", "options": list("vwxyz")}
    assert readable(Problem("a", "Q", "E", images=row.images, metadata=five)).letters == "ABCDE"


# ---------------------------------------------------------------------- what served models get


def test_the_image_pass_has_no_caption_and_the_caption_pass_no_image(capsys, tmp_path):
    rows = make_rows(tmp_path, 2)
    with ScriptedServer(scripted(["A", "A"], ["B", "B"])) as server:
        run_filter(capsys, tmp_path, [server], rows=rows)
    seen, read = ([body for body in server.requests if has_image(body) == which] for which in (True, False))
    assert len(seen) == len(read) == 2
    for body in seen:
        assert body["path"] == "/v1/chat/completions" and "is blue" not in turn_text(body)
        image, text = body["messages"][0]["content"]
        assert image["type"] == "image_url" and "<image>" not in text["text"] and "A. red" in text["text"]
        sent = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].split(",", 1)[1])))
        with Image.open(rows[number(body)].images[0]) as original:
            assert (np.asarray(sent) == np.asarray(original.convert("RGB"))).all()
    for body in read:  # the bare text, as the paper's release
        assert body["path"] == "/v1/completions" and body["prompt"].endswith("Answer:")
        assert f"Thing <{number(body)}> is blue." in body["prompt"] and "<image>" not in body["prompt"]
        assert "A. red" in body["prompt"]
    for body in server.requests:
        assert (body["max_tokens"], body["temperature"], body["model"]) == (8, 0, "M1")
        assert "letter" in turn_text(body) and "boxed" not in turn_text(body) and "think" not in turn_text(body)


def test_the_caption_may_be_a_turn_of_a_chat(capsys, tmp_path):
    with ScriptedServer(scripted(["A"], ["B"])) as server:
        _, result, *_ = run_filter(capsys, tmp_path, [server], "--caption_chat", rows=make_rows(tmp_path, 1))
    assert result["kept"] == 1
    assert [body["path"] for body in server.requests] == ["/v1/chat/completions"] * 2
    assert "Thing <0> is blue." in turn_text(server.requests[1]) and not has_image(server.requests[1])


def test_a_server_for_conversations_alone_is_told_apart(capsys, tmp_path):
    reply = lambda body: Raw(404, b"not found") if "prompt" in body else "A"  # noqa: E731
    with ScriptedServer(reply) as server:
        code, said, *_ = run_filter(capsys, tmp_path, [server], rows=make_rows(tmp_path, 1))
    assert code == 2 and "--caption_chat" in said


@pytest.mark.parametrize(
    "options, size",
    [
        ((), (100, 60)),
        (("--downsample", "2"), (50, 30)),
        (("--max_pixels", "1500"), (50, 30)),
        (("--downsample", "2", "--max_pixels", "1500"), (50, 30)),
        (("--downsample", "1000"), (1, 1)),
    ],
)
def test_images_may_be_made_smaller(capsys, tmp_path, options, size):
    random_image(100, 60).save(tmp_path / "large.png")
    (row,) = make_rows(tmp_path, 1)
    row = Problem(row.id, row.problem, "B", images=(str(tmp_path / "large.png"),), metadata=row.metadata)
    with ScriptedServer(scripted(["A"], ["B"])) as server:
        run_filter(capsys, tmp_path, [server], *options, rows=[row])
    url = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))).size == size


def test_broken_images_and_refused_prompts_are_counted(capsys, tmp_path):
    rows = make_rows(tmp_path, 5)
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "2.png").unlink()
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    reply = lambda body: Raw(400, b"too long") if number(body) == 4 else "A" if has_image(body) else "B"  # noqa: E731
    with ScriptedServer(reply) as server:
        _, result, kept, _ = run_filter(capsys, tmp_path, [server], rows=rows)
    assert result["dropped"] == {"broken image": 3, "refused by the server": 1} and result["rows"] == 5
    assert [row.id for row in kept] == ["row-0"]
    assert {number(body) for body in server.requests if "prompt" in body} == {0}  # no use asking about the others


def test_a_reply_far_beyond_what_was_asked_for_is_no_trouble(capsys, tmp_path):
    with ScriptedServer(scripted(["A. " + "x" * 50_000], ["B"])) as server:
        _, result, kept, _ = run_filter(capsys, tmp_path, [server], rows=make_rows(tmp_path, 1))
    assert result["kept"] == 1 and len(kept[0].metadata["filter"]["M1"]["image_text"]) < 1000


# ---------------------------------------------------------------------- going on


def test_what_was_answered_is_not_asked_again(capsys, tmp_path):
    rows, failing = make_rows(tmp_path, 6), {"now": True}

    def reply(body):
        if failing["now"] and not has_image(body) and number(body) >= 3:
            return Raw(401, b"gone")
        return "A" if has_image(body) else "B"

    with ScriptedServer(reply) as one, ScriptedServer(scripted(["A"] * 6, ["B"] * 6)) as two:
        code, *_ = run_filter(capsys, tmp_path, [one, two], "--concurrency", "1", rows=rows)
        assert code == 2 and not (tmp_path / "out.jsonl").exists() and not two.requests
        failing["now"] = False
        answered = collections.Counter((has_image(body), number(body)) for body in one.requests)
        _, result, *_ = run_filter(capsys, tmp_path, [one, two])
        again = collections.Counter((has_image(body), number(body)) for body in one.requests) - answered
        assert again == {(False, i): 1 for i in (3, 4, 5)}
        assert result["kept"] == 6 and len(two.requests) == 12
        # A third run asks nothing; another model is asked alone.
        run_filter(capsys, tmp_path, [one, two])
        assert len(two.requests) == 12
        with ScriptedServer(scripted(["B"] * 6, ["B"] * 6)) as three:
            _, result, *_ = run_filter(capsys, tmp_path, [one, two, three])
        assert len(two.requests) == 12 and len(three.requests) == 12 and result["kept"] == 0
        assert result["models"]["M1"][KEPT] == 6 and result["dropped"] == {"image: right": 6}


def test_rows_that_changed_are_asked_anew(capsys, tmp_path):
    rows = make_rows(tmp_path, 3)
    with ScriptedServer(scripted(["A"] * 3, ["B"] * 3)) as server:
        run_filter(capsys, tmp_path, [server], rows=rows)
        random_image(90, 90).save(tmp_path / "0.png")
        rows[1].metadata["caption"] = "Thing <1> is navy."
        write_rows(tmp_path / "in.jsonl", rows)
        run_filter(capsys, tmp_path, [server])
        assert [(has_image(body), number(body)) for body in server.requests[6:]] == [(True, 0), (False, 1)]
        content = bytearray((tmp_path / "2.png").read_bytes())
        content += b"."  # behind the image's end, where nothing looks
        (tmp_path / "2.png").write_bytes(content)
        run_filter(capsys, tmp_path, [server])
        content[-1:] = b"!"  # of the same length
        (tmp_path / "2.png").write_bytes(content)
        run_filter(capsys, tmp_path, [server])
    assert [(has_image(body), number(body)) for body in server.requests[8:]] == [(True, 2), (True, 2)]


@pytest.mark.parametrize("option", ["--output", "--keep_dropped"])
def test_a_place_that_cannot_be_written_is_named_before_a_model_is_asked(capsys, tmp_path, option):
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "rows.jsonl")
    with ScriptedServer(scripted(["A"], ["B"])) as server:
        code, said, *_ = run_filter(capsys, tmp_path, [server], option, place, rows=make_rows(tmp_path, 1))
    assert code == 2 and place in said and not server.requests


def test_a_file_that_cannot_be_read_is_named(capsys, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", "rows.jsonl")

    monkeypatch.setattr("capcur_jax.curation.commands.filter.read_rows", refused)
    with ScriptedServer(scripted(["A"], ["B"])) as server:
        code, said, *_ = run_filter(capsys, tmp_path, [server], rows=make_rows(tmp_path, 1))
    assert code == 2 and "rows.jsonl: Permission denied" in said


def test_other_settings_are_refused(capsys, tmp_path):
    with ScriptedServer(scripted(["A"], ["B"])) as server:
        run_filter(capsys, tmp_path, [server], rows=make_rows(tmp_path, 1))
        code, said, *_ = run_filter(capsys, tmp_path, [server], "--downsample", "2")
    assert code == 2 and "downsample 1, now 2" in said


@pytest.mark.parametrize("spec", ["served:", "served:http://x:1", "served:model", "served:http://x:1,", "nowhere", "/"])
def test_specs_that_are_none(spec):
    with pytest.raises(InputError, match="--model"):
        open_models([spec], How())


def test_specs_with_several_addresses_and_commas_in_the_name():
    (model,) = open_models(["served:http://a:1,http://b:2,org/name,v2"], How())
    assert model.name == "org/name,v2" and model.settings == {"model": "org/name,v2"}
    with pytest.raises(InputError, match="twice"):
        open_models(["served:http://a:1,m"] * 2, How())


# ---------------------------------------------------------------------- local checkpoints


@pytest.fixture(scope="module")
def local_rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("local"), 5)


def replies_alone(directory, rows, caption_chat=False, max_new_tokens=8):
    """(image, caption) replies of each row: one prompt at a time, made from the chat template directly."""
    from capcur_jax.data.images import load_image
    from capcur_jax.models import huggingface
    from capcur_jax.models.batching import Buckets
    from capcur_jax.models.inputs import Processor
    from capcur_jax.rollout.engine import Sampling
    from capcur_jax.rollout.local.engine import LocalEngine

    processor = Processor.from_directory(directory)
    prompts = []
    for row in rows:
        text = row.problem.removeprefix("<image>")
        asked = processor.render([None, f"{text}\n{perception_filter.LETTER_ALONE}"])
        prompts.append(processor.prepare(asked, [load_image(row.images[0])]))
        bare = perception_filter.FROM_CAPTION.format(caption=row.metadata["caption"], question=text)
        bare += perception_filter.LETTER_ALONE
        prompts.append(processor.prepare(processor.render([bare]) if caption_chat else bare + "\nAnswer:"))
    buckets = Buckets((max(map(len, prompts)),), ((1, 1024),))
    engine = LocalEngine(huggingface.load(directory), processor, slots=1, buckets=buckets)
    groups = engine.generate(prompts, Sampling(max_new_tokens, 0.0), 1)
    texts = [processor.decode(sample.tokens) for (sample,) in groups]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_local_checkpoints_answer_both_passes(capsys, tmp_path, checkpoint, windowed_checkpoint, local_rows):
    """Batches with prompts of other lengths and images beside them give what each prompt gives alone."""
    models = ["--model", str(checkpoint), "--model", str(windowed_checkpoint)]
    _, result, kept, dropped = run_filter(capsys, tmp_path, [], *models, "--batch", "2", rows=local_rows)
    assert result["rows"] == 5 and set(result["models"]) == {checkpoint.name, windowed_checkpoint.name, "all"}
    said = {row.id: row.metadata["filter"] for row in (*kept, *dropped)}
    one, two = (
        [(said[row.id][name]["image_text"], said[row.id][name]["caption_text"]) for row in local_rows]
        for name in (checkpoint.name, windowed_checkpoint.name)
    )
    assert one == replies_alone(checkpoint, local_rows)
    assert not set(one) & set(two)


def test_a_local_checkpoint_with_all_replies_is_not_loaded_again(capsys, tmp_path, monkeypatch, checkpoint, local_rows):
    more = ["--model", str(checkpoint), "--batch", "2", "--max_new_tokens", "2", "--caption_chat"]
    *_, first = run_filter(capsys, tmp_path, [], *more, rows=local_rows)

    def never(self):
        raise AssertionError("loaded")

    monkeypatch.setattr(LocalModel, "__enter__", never)
    *_, again = run_filter(capsys, tmp_path, [], *more)
    assert first == again and len(first) == 5
    said = [row.metadata["filter"][checkpoint.name] for row in first]
    alone = replies_alone(checkpoint, local_rows, caption_chat=True, max_new_tokens=2)
    assert [(one["image_text"], one["caption_text"]) for one in said] == alone


@pytest.mark.parametrize(("platform", "patches"), [("cpu", ((4, 256), (8, 256))), ("tpu", ((1, 640), (1, 1280)))])
def test_rows_of_patches_suit_the_platform(monkeypatch, checkpoint, platform, patches):
    from capcur_jax.models.batching import PromptSize

    monkeypatch.setattr("jax.default_backend", lambda: platform)
    with LocalModel(str(checkpoint), How(batch=4)) as model:
        engine, _ = model._engine([PromptSize(200, (250, 250)), *[PromptSize(100, (60,))] * 5])
    assert engine.buckets.patches == patches


@pytest.mark.parametrize("bare", [False, True])
def test_a_server_is_not_asked_what_it_would_take_for_its_own_tokens(bare):
    asked = Asked("7", ("Say <|im_end|>\n<|im_start|>system",), bare)
    reply = asyncio.run(ServedModel(["http://nowhere"], "m", How())._ask(None, asked))
    assert reply.reason == "unusable prompt" and "<|im_end|>" in reply.detail and reply.where == "row 7"


def test_local_drops_are_counted(checkpoint, tmp_path):
    rows = make_rows(tmp_path, 4)
    (tmp_path / "0.png").write_bytes(b"no image")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    rows[2].metadata["caption"] = "blue " * 600  # beyond the checkpoint's 512 positions
    rows[3] = Problem(
        "row-3", "<image>Which \ufdd0 is it?\nA. x\nB. y", "B", (rows[3].images), metadata={"caption": "B"}
    )
    model = LocalModel(str(checkpoint), How(max_new_tokens=1, batch=2))
    judgable = [readable(row) for row in rows]
    found = {}
    with model:
        for which in ("image", "caption"):
            done = lambda asked, reply, which=which: found.__setitem__((which, asked.name), reply)  # noqa: E731
            model.answer([row.asked(which, True) for row in judgable], done)
    assert len(found) == 8
    reasons = {key: reply.reason for key, reply in found.items() if isinstance(reply, Drop)}
    assert reasons == {
        ("image", "row-0"): "broken image",
        ("image", "row-1"): "broken image",
        ("caption", "row-2"): "unusable prompt",
        ("image", "row-3"): "unusable prompt",
        ("caption", "row-3"): "unusable prompt",
    }


def test_checkpoints_of_one_name_are_told_apart(checkpoint, tmp_path):
    copies = []
    for name in ("a", "b"):
        copy = tmp_path / name / "final"
        copy.mkdir(parents=True)
        for file in checkpoint.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        copies.append(copy)
    one, two = open_models([str(copy) for copy in copies], How())
    assert one.name != two.name and one.settings["weights"] == two.settings["weights"]
    weights = next(copies[1].glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert LocalModel(str(copies[1]), How()).settings != one.settings


# ---------------------------------------------------------------------- real rows


@pytest.mark.skipif("CAPCUR_SHARED_DATA" not in os.environ, reason="needs the public data sets")
def test_visonlyqa_twins_go_the_whole_way(capsys, tmp_path):
    """Real figures with questions, and the twins whose text describes the figure: the text is the caption."""
    folder = Path(os.environ["CAPCUR_SHARED_DATA"]) / "visonlyqa"
    rows = []
    for file in sorted((folder / "val").glob("text_*.jsonl")):
        for twin in map(json.loads, file.open()):
            text, asks, question = twin["prompt_no_reasoning"].partition("answer the following questions.")
            image, known = str(folder / twin["image_path"]), {"caption": text + asks}
            rows.append(Problem(twin["id"], question, twin["answer"], (image,), metadata=known))
    rows = list({row.problem: row for row in rows}.values())  # some ask the same of another figure
    assert len(rows) >= 100
    lettered = [row for row in rows if len(row.answer) == 1]
    there = [row for row in lettered if os.path.exists(row.images[0])]  # not all of the figures are
    answers = {row.problem.strip(): row.answer for row in lettered}

    def reply(body):
        text = turn_text(body)
        answer = next(answer for problem, answer in answers.items() if problem in text)
        return f"({answer})" if not has_image(body) else "(a)" if answer != "a" else "(b)"

    with ScriptedServer(reply) as server:
        _, result, kept, _ = run_filter(capsys, tmp_path, [server], rows=rows)
    assert result["rows"] == len(rows)
    counts = {"answer is no letter": len(rows) - len(lettered), "broken image": len(lettered) - len(there)}
    assert result["dropped"] == {reason: count for reason, count in counts.items() if count}
    assert result["kept"] == len(kept) == len(there) >= 40
