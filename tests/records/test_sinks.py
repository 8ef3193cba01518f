"""TensorBoard's files as its own format's reader sees them, and what W&B is told."""

import io
import math
import struct
import sys
import textwrap

import ml_dtypes
import numpy as np
import PIL.Image
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from capcur_jax.errors import InputError
from capcur_jax.records import samples, sinks
from tests.conftest import random_image

STEP = {
    "type": "step", "step": 3, "stage": "perception", "stage_step": 1, "objective": "grpo", "learning_rate": 1e-3,
    "reward": 0.5, "kl": math.nan, "grad_norm": np.float32("inf"), "response_length": 7.5, "token_padding": 0.25,
    "seconds": 2.0, "seconds_update": 1.5, "tokens_per_second": 100.0, "compilations": 0, "device_peak_gib": 3.5,
    "response_length_by_capability": {"text": 6, "count/two": 9}, "advantage": {"mean": np.float32(0.5), "parts": [1]},
    "note": np.str_("text"), "image": "data:image/png;base64," + "A" * 100, "nothing": None, "pixels": np.zeros((2, 2)),
    "ratio": ml_dtypes.bfloat16(1.5),
}  # fmt: skip
EVALUATION = {
    "type": "evaluation", "step": 3, "after": "base", "capability": "perception", "accuracy": 0.75, "questions": 20,
    "by_kind": {"what shape?": 0.5},
}  # fmt: skip


def events(directory) -> list[Event]:
    """All events of a folder in TensorBoard's order, both checksums of each checked."""
    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            content = data[12 : 12 + length]
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(content)
            found.append(Event.FromString(content))
            data = data[16 + length :]
    return found


def shown(directory) -> list[tuple[str, int, float]]:
    """The points that TensorBoard shows: at the start of a session, those from its step on are dropped."""
    points = []
    for event in events(directory):
        if event.session_log.status == SessionLog.START:
            points = [point for point in points if point[1] < event.step]
        points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return points


def make(directory, *, tensorboard=True, wandb="", **options):
    return sinks.Sinks(directory, tensorboard=tensorboard, wandb=wandb, config={"seed": 1}, **options)


def test_tags_of_a_step():
    assert sinks.scalars(STEP) == {
        "train/learning_rate": 1e-3, "train/reward": 0.5, "rollout/length": 7.5, "batch/token_padding": 0.25,
        "time/step": 2.0, "time/update": 1.5, "time/tokens_per_second": 100.0, "system/compilations": 0,
        "system/device_peak_gib": 3.5, "rollout/length_by_capability/text": 6,
        "rollout/length_by_capability/count_two": 9, "train/advantage/mean": 0.5, "train/ratio": 1.5,
    }  # fmt: skip


def test_tags_of_an_evaluation_and_of_another_record():
    assert sinks.scalars(EVALUATION) == {
        "eval/perception/accuracy": 0.75,
        "eval/perception/questions": 20,
        "eval/perception/by_kind/what_shape_": 0.5,
    }
    assert sinks.scalars({**EVALUATION, "type": "validation", "by_kind": {}}).keys() == {
        "validation/perception/accuracy",
        "validation/perception/questions",
    }


def test_event_file_is_there_before_the_run_ends(tmp_path):
    writer = make(tmp_path)
    writer.write(STEP)
    writer.write(EVALUATION)
    writer.write({"type": "note", "text": "no number"})
    writer.write({"type": "versions", "jax": 10})  # no step
    first = events(tmp_path)[0]
    assert first.file_version == "brain.Event:2"
    expected = {
        (tag, 3, np.float32(value)) for record in (STEP, EVALUATION) for tag, value in sinks.scalars(record).items()
    }
    assert set(shown(tmp_path)) == expected and len(shown(tmp_path)) == len(expected)
    writer.close()
    assert writer.failures == {}


def test_resumed_run_shows_no_step_twice(tmp_path):
    """In the same second too: the second file must neither replace the first nor come before it."""
    for resume, reward in ((0, 1.0), (2, 2.0), (4, 3.0)):
        writer = make(tmp_path, resume_step=resume)
        for step in range(resume + 1, resume + 5):
            writer.write({"type": "step", "step": step, "reward": reward})
        writer.close()
    rewards = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 3.0), (6, 3.0), (7, 3.0), (8, 3.0)]
    assert shown(tmp_path) == [("train/reward", step, reward) for step, reward in rewards]


def groups(directory, step=3):
    """Two groups of two responses: a photo and a small picture, and a text alone."""
    directory.mkdir(exist_ok=True)
    random_image(640, 480).save(directory / "photo.png")
    random_image(32, 16).save(directory / "small.png")
    said = [
        {"response": "A *red*\n<b>circle</b>\u202e", "reward": 0.9, "accuracy": 1, "advantage": 0.5},
        {"response": "blue", "reward": 0.0, "accuracy": 0, "advantage": -0.5},
    ]
    said = [{**sample, "format": 0, "timed_out": False, "tokens": 7, "finish": "stop"} for sample in said]
    seen = {"step": step, "stage": "visual", "id": "1", "problem": "<image>What?", "answer": "red circle"}
    pictures = ["photo.png", "small.png", "gone.png"]
    return [
        {**seen, "images": pictures, "samples": said}, {**seen, "id": "2", "answer": "", "images": [], "samples": said}
    ]  # fmt: skip


def test_tensorboard_shows_sampled_groups_with_their_images(tmp_path):
    writer = make(tmp_path)
    writer.rollouts(3, [])
    writer.rollouts(3, groups(tmp_path))
    writer.close()
    (event,) = (event for event in events(tmp_path) if event.summary.value)
    values = {value.tag: value for value in event.summary.value}
    assert event.step == 3 and writer.failures == {}
    assert list(values) == ["rollouts/1/text_summary", "rollouts/1/image", "rollouts/2/text_summary"]
    shown = values["rollouts/1/image"].image
    image = PIL.Image.open(io.BytesIO(shown.encoded_image_string))
    assert image.format == "JPEG" and image.size == (shown.width, shown.height) == (320 + 32, 240)
    text = values["rollouts/1/text_summary"].tensor.string_val[0].decode()
    for line in (
        "**visual**, step 3",
        "    <image>What?",
        "    red circle",
        "**reward 0.9**, accuracy 1, advantage +0.50, 7 tokens, stop:",
        "    A *red*",
        "    <b>circle</b>\\u202e",
        "    blue",
    ):
        assert line in text.splitlines()
    assert "expected" not in values["rollouts/2/text_summary"].tensor.string_val[0].decode()


def test_a_small_picture_stays_sharp(tmp_path):
    groups(tmp_path)
    image = samples.picture({"images": ["small.png"]}, tmp_path)
    assert image is not None and PIL.Image.open(io.BytesIO(samples.encoded(image))).format == "PNG"


def test_full_disk_is_one_warning_and_the_run_goes_on(tmp_path):
    warnings = []
    writer = make(tmp_path, warn=warnings.append)
    writer._sinks["TensorBoard"]._file = open("/dev/full", "wb")  # noqa: SIM115
    for step in range(3):
        writer.write({**STEP, "step": step})
    writer.close()
    assert writer.failures == {"TensorBoard": 4}, "three records and the closing of the file"
    assert len(warnings) == 1 and "No space left on device" in warnings[0]


def test_directory_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(InputError, match="event file can't be written"):
        make(tmp_path)


def test_no_sink_writes_nothing(tmp_path):
    writer = make(tmp_path / "run", tensorboard=False)
    writer.write(STEP)
    writer.close()
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- Weights & Biases


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in that keeps rows as W&B does: a lower step is dropped, a higher one sends the row before."""
    code = """
        runs, calls, broken = {}, [], []
        class Image:
            def __init__(self, image):
                self.size = image.size
        class Table:
            def __init__(self, columns, data):
                assert all(len(row) == len(columns) for row in data)
                self.rows = [dict(zip(columns, row)) for row in data]
        class Run:
            def __init__(self, rows):
                self.rows, self.row, self.step = rows, {}, max(rows, default=-1) + 1
            def define_metric(self, name, step_metric=None):
                calls.append(("define_metric", name, step_metric))
            def log(self, data, step=None, commit=None):
                if broken:
                    raise ConnectionError("no network")
                assert all(type(value) in (float, int, Table) for value in data.values())
                if step is not None:
                    assert step >= self.step, "W&B would drop this with a warning"
                    if step > self.step:
                        self.send(step)
                self.row |= data
                if commit or (commit is None and step is None):
                    self.send(self.step + 1)
            def send(self, step):
                if self.row:
                    self.rows[self.step] = self.row
                self.row, self.step = {}, step
            def finish(self):
                self.send(self.step + 1)
        def init(**options):
            calls.append(("init", options))
            if options["project"] == "refused":
                raise RuntimeError("not logged in")
            return Run(runs.setdefault(options["id"], {}))
    """
    (tmp_path / "wandb.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def reward(step, value):
    return {"type": "step", "step": step, "reward": value}


def test_wandb_is_told_the_run(tmp_path, wandb):
    writer = make(tmp_path / "first", tensorboard=False, wandb="curriculum")
    writer.write({**EVALUATION, "step": 0, "by_kind": {}})
    writer.write({**EVALUATION, "step": 0, "by_kind": {}, "capability": "text"})
    for step in (1, 2):
        writer.write(reward(step, step / 10))
    writer.write({**EVALUATION, "step": 2, "by_kind": {}})
    writer.close()
    (_, options), *defined = wandb.calls
    identity = (tmp_path / "first" / "wandb_id.txt").read_text().strip()
    assert options == {
        "project": "curriculum", "id": identity, "resume": "allow", "name": "first", "dir": str(tmp_path / "first"),
        "config": {"seed": 1},
    }  # fmt: skip
    assert defined == [("define_metric", "eval/step", None), ("define_metric", "eval/*", "eval/step")]
    evaluation = {"eval/perception/accuracy": 0.75, "eval/perception/questions": 20}
    assert wandb.runs[identity] == {
        0: {**evaluation, "eval/text/accuracy": 0.75, "eval/text/questions": 20, "eval/step": 0},
        1: {"train/reward": 0.1},
        2: {"train/reward": 0.2, **evaluation, "eval/step": 2},
    }


def test_wandb_shows_sampled_groups_as_a_table(tmp_path, wandb):
    writer = make(tmp_path / "run", tensorboard=False, wandb="p")
    for step in (1, 2, 3):
        if step == 2:
            writer.rollouts(step, groups(tmp_path / "run", step))  # they are there before their step's record
        writer.write(reward(step, 1.0))
    writer.close()
    (rows,) = wandb.runs.values()
    table = rows[1].pop("rollouts/samples")
    assert (
        rows
        == {
            1: {"train/reward": 1.0, "rollouts/step": 2},
            2: {"train/reward": 1.0},
            3: {"train/reward": 1.0},
        }
        and not writer.failures
    )
    assert [row["response"] for row in table.rows] == ["A *red*\n<b>circle</b>\u202e", "blue"] * 2
    assert [row["reward"] for row in table.rows] == [0.9, 0.0] * 2
    assert [row["image"] and row["image"].size for row in table.rows] == [(352, 240)] * 2 + [None] * 2
    first = table.rows[0]
    assert (first["step"], first["stage"], first["id"], first["answer"]) == (2, "visual", "1", "red circle")


def test_wandb_goes_on_under_the_same_id_without_steps_twice(tmp_path, wandb):
    writer = make(tmp_path / "run", tensorboard=False, wandb="p")
    for step in (1, 2, 3, 4):
        writer.write(reward(step, 1.0))
    writer._sinks["W&B"]._run.send(5)  # killed here, after what W&B's own process has sent
    writer = make(tmp_path / "run", tensorboard=False, wandb="p", resume_step=2)
    for step in (3, 4, 5):
        writer.write(reward(step, 2.0))
        writer.write({**EVALUATION, "step": step, "by_kind": {}})
    writer.close()
    (rows,) = wandb.runs.values()
    assert [(step, row["train/reward"]) for step, row in rows.items()] == [(n, 1.0) for n in (1, 2, 3, 4)] + [(5, 2.0)]
    assert rows[5]["eval/step"] == 5 and writer.failures == {}
    make(tmp_path / "other", tensorboard=False, wandb="p")
    assert len(wandb.runs) == 2, "another work directory is another run"


def test_wandb_that_fails_leaves_tensorboard_alone(tmp_path, wandb):
    warnings = []
    writer = make(tmp_path / "run", wandb="p", warn=warnings.append)
    wandb.broken.append(True)
    for step in (1, 2):
        writer.write(reward(step, 1.0))
    writer.close()
    assert writer.failures == {"W&B": 2} and len(warnings) == 1 and "no network" in warnings[0]
    assert len(shown(tmp_path / "run")) == 2


def test_wandb_missing_or_refused_is_an_input_error(tmp_path, wandb, monkeypatch):
    with pytest.raises(InputError, match=r"'refused'\) doesn't start: not logged in; `wandb login`"):
        make(tmp_path / "run", wandb="refused")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        with pytest.raises(InputError, match=r"pip install 'capcur_jax\[wandb\]'"):
            make(tmp_path / "run", wandb="p")
    assert not (tmp_path / "run" / "tensorboard").exists()
