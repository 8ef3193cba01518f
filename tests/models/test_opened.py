"""Templates of thinking models, which begin the response themselves: rewards judge all of it."""

import json
import shutil

import pytest

from capcur_jax.answers.response import boxed_response, is_formatted
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import target_tokens
from capcur_jax.models.inputs import Processor


@pytest.fixture(scope="module")
def thinking(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("thinking") / "checkpoint"
    shutil.copytree(checkpoint, directory)
    before = Processor.from_directory(checkpoint).tokenizer.chat_template
    after = before.replace("assistant\\n'", "assistant\\n<think>\\n'")
    assert after != before
    (directory / "chat_template.jinja").write_text(after)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": after}))
    return Processor.from_directory(directory)


def test_what_the_template_has_opened_is_part_of_the_response(thinking, processor):
    said = "2 and 3</think> \\boxed{5}"
    tokens = thinking.text_tokens(said)
    assert thinking.opened == "<think>\n" and is_formatted(thinking.response(tokens))
    assert processor.opened == "" and processor.response(tokens) == processor.decode(tokens)
    assert not is_formatted(processor.response(tokens))


def test_a_target_does_not_open_it_again(thinking, processor):
    problem = Problem("a", "?", "5", response=boxed_response("2 and 3", "5"))
    assert processor.decode(target_tokens(processor, problem, 99)) == problem.response
    target = target_tokens(thinking, problem, 99)
    assert "<think>" not in thinking.decode(target) and is_formatted(thinking.response(target))
