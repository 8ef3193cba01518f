"""The peer's side of laptop_step.py: TRL's GRPOTrainer on the same checkpoint, prompts and sizes; prints JSON lines.

Run by laptop_step.py in an environment that has trl, torch and torchvision, and nothing of this project.
"""

import argparse
import json
import os
import random
import tempfile
import time

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--rows", required=True, help="JSON lines with problem and image")
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--threads", type=int, required=True)
options = parser.parse_args()

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else its threads spin-wait and it looks slower than it is
import torch  # noqa: E402

torch.set_num_threads(options.threads)
from datasets import Dataset  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


def reward(completions, **_):
    """Random, so that every group has an advantage; grading is not what is compared."""
    return [random.random() for _ in completions]


class Clock(TrainerCallback):
    """Prints the wall time of each step."""

    def on_step_begin(self, *_, **__):
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        print(json.dumps({"step_seconds": time.perf_counter() - self.started}), flush=True)


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
    trainer = GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(options.checkpoint, dtype=torch.float32),
        processing_class=AutoProcessor.from_pretrained(options.checkpoint),
        reward_funcs=reward,
        train_dataset=data,
        args=GRPOConfig(
            output_dir=directory,
            per_device_train_batch_size=20,  # four micro-batches of 20: the fastest of 20, 40 and 80 on two cores
            gradient_accumulation_steps=4,
            steps_per_generation=4,
            num_generations=5,
            max_completion_length=48,
            generation_kwargs={"min_new_tokens": 48},
            temperature=1.0,
            beta=0.01,
            num_iterations=1,
            learning_rate=1e-6,
            max_steps=options.steps,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=10_000,
            disable_tqdm=True,
        ),
    )
    trainer.add_callback(Clock())
    trainer.train()
