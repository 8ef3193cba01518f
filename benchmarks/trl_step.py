"""The peer's side of laptop_step.py and grpo_step.py: TRL's GRPOTrainer on the same checkpoint and prompts; JSON lines.

Run by these two in an environment that has trl, torch and torchvision, and nothing of this project. Without --recorded
it generates, and prints the seconds of each step. With it, completions and rewards are the recorded ones: it prints
what each step's update took, its loss and its gradient norm, a round of --steps steps for every line on standard input.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--rows", required=True, help="JSON lines with problem and image")
parser.add_argument("--steps", type=int, required=True, help="in all, or with --recorded in a round")
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--recorded", default="", help="JSON written by grpo_step.py")
parser.add_argument("--rounds", type=int, default=1)
# The fastest of 20, 40 and 80 on two cores.
parser.add_argument("--micro_rows", type=int, default=20, help="sequences of a micro-batch")
parser.add_argument("--checkpointing", type=int, default=1, help="0: activations are kept for the backward pass")
options = parser.parse_args()

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else its threads spin-wait and it looks slower than it is
import numpy as np  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(options.threads)
from datasets import Dataset  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.trainer import grpo_trainer  # noqa: E402

PROMPTS, GROUP, TOKENS = 16, 5, 48
PARTS = PROMPTS * GROUP // options.micro_rows  # micro-batches of a step


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def say(**values) -> None:
    print(json.dumps(values), flush=True)


def load(checkpoint: str):
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)


def random_rewards(completions, **_):
    """Every group has an advantage; grading is not what is compared."""
    return [random.random() for _ in completions]


class Clock(TrainerCallback):
    """Prints the wall time of each step."""

    def on_step_begin(self, *_, **__):
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        say(step_seconds=time.perf_counter() - self.started)


class Recorded(GRPOTrainer):
    """Takes completions from the record; counts the seconds that are no part of an update: preparing prompts and
    images, rewards, collating. Reference and old log-probs are part of it."""

    losses: list
    norm, beside, scoring, pixels = 0.0, 0.0, None, 0.0

    def _generate_single_turn(self, prompt_ids, *_, **__):
        assert prompt_ids == [ids for ids in record["prompts"] for _ in range(GROUP)], "the prompts differ"
        return [list(ids) for ids in record["completions"]], None

    def _generate_and_score_completions(self, inputs):
        started, self.scoring = time.perf_counter(), 0.0
        output = super()._generate_and_score_completions(inputs)
        self.beside += time.perf_counter() - started - self.scoring
        self.scoring = None
        self.pixels = float((output["pixel_values"] - expected).abs().max())
        return output

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        started = time.perf_counter()
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self.scoring is not None:
            self.scoring += time.perf_counter() - started
        return result

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.losses.append(loss.detach())
        return loss


class Rounds(TrainerCallback):
    """Waits for its turn, then times `--steps` steps; a step is all updates on one set of completions."""

    def __init__(self):
        self.done, self.updates = 0, []

    def on_step_begin(self, *_, **__):
        if self.done % (options.steps * record["updates"]) == 0 and not sys.stdin.readline():
            sys.exit("nobody waits for the next round")
        self.started, trainer.beside, trainer.losses = time.perf_counter(), 0.0, []

    def on_step_end(self, *_, **__):
        total = time.perf_counter() - self.started
        loss = float(torch.stack(trainer.losses).sum())
        self.updates.append((total - trainer.beside, total, loss, float(trainer.norm)))
        self.done += 1
        if len(self.updates) == record["updates"]:
            seconds, whole, losses, norms = map(list, zip(*self.updates, strict=True))
            say(seconds=sum(seconds), whole=sum(whole), losses=losses, norms=norms)
            self.updates = []
        if self.done % (options.steps * record["updates"]) == 0:
            say(peak=resident("VmHWM"), pixels=trainer.pixels)


def config(directory: str, **more) -> GRPOConfig:
    return GRPOConfig(
        output_dir=directory,
        per_device_train_batch_size=options.micro_rows,
        num_generations=GROUP,
        max_completion_length=TOKENS,
        temperature=1.0,
        num_iterations=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=bool(options.checkpointing),
        report_to=[],
        save_strategy="no",
        logging_steps=10_000,
        disable_tqdm=True,
        **more,
    )


with open(options.rows, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
data = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["problem"]}]}],
            "image": Image.open(row["image"]).convert("RGB"),
        }
        for row in rows
    ]
)
with tempfile.TemporaryDirectory() as directory:
    # TRL pads prompts on the left but takes what marks their image tokens as the processor pads it: on another side the
    # positions of the shorter prompts would be wrong.
    processor = AutoProcessor.from_pretrained(options.checkpoint, padding_side="left")
    if not options.recorded:
        args = config(
            directory,
            gradient_accumulation_steps=PARTS,
            steps_per_generation=PARTS,
            generation_kwargs={"min_new_tokens": TOKENS},
            beta=0.01,
            learning_rate=1e-6,
            max_steps=options.steps,
        )
        common = {"args": args, "train_dataset": data, "processing_class": processor}
        trainer = GRPOTrainer(model=load(options.checkpoint), reward_funcs=random_rewards, **common)
        trainer.add_callback(Clock())
        trainer.train()
        sys.exit()
    with open(options.recorded, encoding="utf-8") as file:
        record = json.load(file)
    # Of a prompt all responses bring the image with them.
    patches = np.load(record["patches"])
    expected = torch.from_numpy(np.repeat(patches, GROUP, axis=0).reshape(-1, patches.shape[-1]))
    args = config(
        directory,
        gradient_accumulation_steps=PARTS // record["updates"],
        steps_per_generation=PARTS,
        loss_type="dapo",  # sums over all tokens of an update, divided by their number
        scale_rewards="group",
        epsilon=record["clip_low"],
        epsilon_high=record["clip_high"],
        delta=None,
        beta=record["beta"],
        use_bias_correction_kl=False,  # its default multiplies k3 with the ratio, which has a gradient of its own
        learning_rate=record["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=record["weight_decay"],
        adam_beta1=record["beta1"],
        adam_beta2=record["beta2"],
        adam_epsilon=record["epsilon"],
        max_grad_norm=record["max_gradient_norm"],
        max_steps=options.rounds * options.steps * record["updates"],
        shuffle_dataset=False,
    )
    common = {"args": args, "train_dataset": data, "processing_class": processor}
    if record["updates"] > 1:  # else the updates of a step have other rows than ours
        grpo_trainer.shuffle_sequence_dict = lambda batch: batch
    trainer = Recorded(model=load(options.checkpoint), reward_funcs=lambda **_: record["rewards"], **common)
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(load(record["reference"]).state_dict())
    clip = trainer.accelerator.clip_grad_norm_

    def noted(*args, **kwargs):
        trainer.norm = clip(*args, **kwargs)
        return trainer.norm

    trainer.accelerator.clip_grad_norm_ = noted
    trainer.add_callback(Rounds())
    say(loaded=resident("VmRSS"))
    trainer.train()
