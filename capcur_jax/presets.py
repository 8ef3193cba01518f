"""Everything a run can be told, in one place: the laptop run, and the paper's run with the paper's numbers.

A config file picks a preset and an order of stages: `configs/staged.py` is five lines. Every key is read somewhere;
configs are locked, so an unknown key is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from capcur_jax import bounds
from capcur_jax.errors import InputError
from capcur_jax.rollout.sglang.settings import Settings

TINY_CHECKPOINT = str(Path(__file__).parent / "assets" / "tiny_qwen3_vl")
CAPABILITIES = ("perception", "text", "visual")

# The laptop run's budget, the same for every row of the paper (capcur_jax/grid/): each row sees the same problems of
# each of its sets once, at a constant rate.
LAPTOP_STEPS = 250  # of a stage; one merged stage has those of all three
LAPTOP_SHORT_STEPS = 80  # the same for laptop_short, which grids of many runs take
LAPTOP_PROMPTS = 32  # of a step
LAPTOP_LEARNING_RATE = 5e-5  # at 1e-4 the visual stage forgets what the first two learned
LAPTOP_UPDATES = 2  # of a step

# Keys that are no more, and what does their work.
_ROWS = "groups of a mini-batch are packed into device rows of few shapes: declare these in config.packing.shapes"
_PATCHES = "declare config.prompt.patch_buckets, for the sampler, and config.packing.shapes, for the trainer"
_OLD_ROWS = ("lengths", "patch_buckets", "buckets", "slabs", "micro_prompts")
DELETED = {
    **{f"packing.{name}": _ROWS for name in _OLD_ROWS},
    "rollout.sglang.router": "prompts are spread over the servers without a router: list the servers' own addresses in "
    "config.rollout.sglang.addresses, or have config.rollout.sglang.servers of them started",
    "prompt.patch_row": _PATCHES,
    "prompt.patch_rows": _PATCHES,
}


def deleted(error: Exception) -> str:
    """What to use instead, where ml_collections refused a config for a key that was deleted; "" for any other error."""
    words = re.findall(r"\w+", str(error))[:2]  # it begins with the last part of the key, or with the word Key and that
    return "\n".join(f"config.{key} was removed: {DELETED[key]}" for key in DELETED if key.rpartition(".")[2] in words)


def explained(error: Exception) -> str:
    """What is wrong where ml_collections refused a config, in one line, or a line for each deleted key.

    Raises `error` again where the config file itself has the mistake: its own line helps more than ours.
    """
    if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
        raise error
    said = error
    while said.args and isinstance(said.args[0], Exception):
        said = said.args[0]
    # Without the whole config, which it may repeat.
    text = re.sub(r"\. Other fields present: .*?(?=\nDid you mean|\Z)", "", str(said.args[0]), flags=re.DOTALL)
    text = text.replace("\n", "; ")
    return deleted(error) or f"the config has no such key, or it holds another type of value: {text}"


def check_deleted(config: ConfigDict) -> None:
    """Raises InputError for a deleted key in a config that was not locked when it was set."""
    for key, instead in DELETED.items():
        *sections, name = key.split(".")
        if name in functools.reduce(operator.getitem, sections, config):
            raise InputError(f"config.{key} was removed: {instead}")


def stage(data: tuple[str, ...], steps: int, prompts: int, learning_rate: float, freeze: str = "") -> dict:
    """An entry of config.stages."""
    return {
        "data": data,  # sets of config.data.sets; several make one pool, see curriculum
        "objective": "grpo",  # or "sft", which imitates each row's `response`
        "steps": steps,  # rollout batches; 0: `epochs` are given
        "epochs": 0,  # times that the stage's problems are seen; 0: `steps` are given
        "prompts": prompts,  # in a rollout batch (sft: examples in an update)
        "learning_rate": learning_rate,  # the greatest one, after the warm-up
        "learning_rate_schedule": "constant",  # or "linear", "cosine": to zero at the end
        "warmup_steps": 0,  # updates in which the learning rate rises from zero
        "freeze": freeze,  # parameters that are not trained: a regular expression of their paths, e.g. "^visual"
        "curriculum": {
            "order": "shuffled",  # anew each epoch; or easy_to_hard, hard_to_easy (by pass rate), file (as they come)
            "ties": "shuffled",  # problems of one pass rate; or kept, in the order of the sets and their files
            "by_set": False,  # True: an epoch takes the sets of `data` one after the other, each in that order
            "weights": (),  # of the sets of `data`, to mix them endlessly; (): one pool
            "rows": 0,  # at most so many of each set's problems, drawn by the hash of their ids; 0: all
            "pass_rates": (0.0, 1.0),  # least and greatest; problems outside are left out
            "drop_all_right": False,  # problems of pass rate 1 are left out
            "drop_all_wrong": False,  # problems of pass rate 0 are left out
            # True: an epoch's last, partial batch is left out; False: it is filled from the next. Sets that are mixed
            # by weights have no epochs.
            "drop_last": False,
        },
        # What ends the stage before its steps are done; the stages after it get those that are left.
        "switch": {
            # none; plateau: the validation accuracy of its sets has not risen for `checks` validations; mastered: at
            # least `above` of all responses of the last `window` steps were right
            "rule": "none",
            "checks": 3,  # validations (plateau)
            "window": 20,  # steps (mastered)
            "above": 0.8,  # a share (mastered)
        },
    }


def problem_set(source: str = "", train: str = "", validation: str = "", test: str = "") -> dict:
    """An entry of config.data.sets: a set that is built on first use, or the files of its splits."""
    return {
        "source": source,  # builds the set on first use (data/sets.py); a file of your own below overrides it
        "train": train,  # a file of problems (docs/data.md), or hf://datasets/OWNER/NAME/FILE
        "validation": validation,  # the same, for validation.every
        "test": test,  # the same, for evaluation
    }


def defaults() -> ConfigDict:
    """Every key and what it does, with the paper's choices. Sizes are left to the presets: none of them fits all."""
    config = ConfigDict(
        {
            "seed": 0,  # of everything that is drawn: data order, samples, fresh weights
            "checkpoint": "",  # a directory, or OWNER/NAME[@REVISION] on the Hub; "": random weights, see `create`
            "create": {},  # architecture of a fresh small model (configs/tiny_base.py); empty: none
            "order": CAPABILITIES,  # names of `stages`, in the order in which they run
            "stages": {},  # by name, each with the keys of stages.NAME: the preset's
            "architecture": "",  # a published size (models/published.py), for `plan` where there is no checkpoint
            "mesh": {  # devices along each axis, -1: all that are left; data x fsdp split prompts
                "data": 1,  # copies of the model, over hosts
                "fsdp": -1,  # parameters, gradients and optimizer state are split
                "tensor": 1,  # heads and feed-forward are split
                "gpus": (),  # of this host, those that the trainer takes, where servers have the others; (): all
            },
            "model": {
                "dtype": "float32",  # of computation; or bfloat16
                # What is computed again backwards instead of kept: none, dots (all but products), or full. auto: dots
                # where they fit the devices' memory, else full; on a CPU full, which is faster there.
                "remat": "auto",
                "attention": "auto",  # the platform's kernel where there is one; "xla": never
                "lora": {  # low-rank factors beside the decoder's layers
                    "rank": 0,  # above 0: they alone are trained; exports have them merged
                    "alpha": 16.0,  # they count alpha / rank
                    "targets": ("q", "k", "v", "o", "gate", "up", "down"),  # the layers that get them
                },
            },
            "data": {
                "sets": {name: problem_set() for name in CAPABILITIES},
                "workers": 2,  # processes that decode images; 0: the trainer's own threads do
                "image_cache_mb": 256,  # MiB of resized images that are kept
            },
            "prompt": {
                # Where it stands in training and validation: suffix (after the question), system (a turn), or none
                "instruction": "suffix",
                "max_tokens": 0,  # the preset's; a longer prompt is left out, never truncated
                "min_pixels": 0,  # smaller images are enlarged; 0: the checkpoint's own
                "max_pixels": 0,  # larger images are shrunk; 0: the checkpoint's own
                "token_buckets": (),  # the preset's: declared tokens of a device row's prompts in a prefill, in all
                # The preset's: declared patches of a device row's images in a prefill, (rows, patches of a row) of
                # each, rising. Images share a row, and none may have more patches than it.
                "patch_buckets": (),
            },
            "rollout": {
                "engine": "local",  # or "sglang": servers, docs/rollouts.md
                "group": 5,  # responses to each prompt
                "max_new_tokens": 0,  # the preset's: the longest response
                "temperature": 1.0,  # of sampling in training
                "top_p": 1.0,  # the likeliest tokens with this mass in all; 1: all tokens
                "top_k": 0,  # as many of the likeliest tokens; 0: all tokens
                # Responses that the local engine decodes together; 0: all of a step, 320 of a device row at most.
                "slots": 0,
                "page": 0,  # tokens of a page of keys and values; 0: 128, on a CPU all that a response may have
                "pages": 0,  # of a device row; 0: as many as its memory holds, or as the slots may need
                "prefill": 1,  # prompts of a device row that it reads at once, as many as its tokens hold
                # True: device rows do not split its copy of the decoder. None: where that fits their memory.
                "gathered": config_dict.placeholder(bool),
                # 1 (sglang): the next batch is sampled while the trainer works on this one; needs a sampler_correction.
                "async_steps": 0,
                "sglang": dataclasses.asdict(Settings()),
                # How often, at most, groups without an advantage are drawn again; 0: train on all groups.
                "dynamic_retries": 0,
            },
            "packing": {
                # The preset's: declared shapes of a device row of tokens, which holds whole groups, with their images:
                # (tokens, rows of patches, patches of a row) of each; the last two are 0 where no prompt has an image.
                # A mini-batch takes the fewest tokens that hold it, a row each micro-batch. Each shape is a program of
                # each pass. Accelerators round tokens up to multiples of 128.
                "shapes": (),
                "groups": 0,  # the preset's: groups of such a row at most
            },
            "reward": {
                "accuracy_weight": 0.9,  # times 1 for a right answer
                "format_weight": 0.1,  # times 1 for <think>...</think> ... \boxed{...} as a whole
                "function": "",  # "module:function": your own reward, docs/rewards.md
                "workers": 0,  # processes that grade, while other groups are sampled; 0: half of this process's cores
                "timeout_s": 5.0,  # for a verdict; then it counts as wrong, and the process is replaced
                "memory_mb": 1024,  # MiB of such a process
            },
            "objective": {  # the paper's choices; objectives.py says what the others are
                "ratio": "token",  # of policies; or "sequence" (GSPO)
                "clip_low": 0.2,  # the ratio counts down to 1 - clip_low
                "clip_high": 0.3,  # and up to 1 + clip_high
                "clip_dual": 3.0,  # and up to this where the advantage is negative; 0: no such bound
                "kl_estimator": "k3",  # or "k1", "k2", "k3_unbiased", "none"
                "kl_coefficient": 0.01,  # of the KL to the policy that the stage started from; 0: no reference pass
                "aggregation": "token",  # mean over tokens; or "sequence", "constant" (Dr.GRPO: rollout.max_new_tokens)
                "advantage_std": True,  # False: advantages are not divided by the group's standard deviation
                "advantage_epsilon": 1e-6,  # is added to that deviation
                "sampler_correction": "none",  # or "truncate", "mask": importance weights between sampler and trainer
                "sampler_cap": 2.0,  # the greatest such weight
                "sampler_level": "token",  # whose weight it is; or "sequence"
                "mask_truncated": False,  # True: responses cut off at max_new_tokens count for nothing
                "entropy_coefficient": 0.0,  # of a bonus for entropy; 0: none
                "updates_per_batch": 1,  # optimizer updates that a rollout batch is split into
            },
            "reference": {
                "dtype": "float32",  # in which the reference policy is kept; or bfloat16
                "memory": "device",  # or "pinned_host": on the devices only while it is read
            },
            "optimizer": {
                "beta1": 0.9,  # AdamW's, of the gradient's mean
                "beta2": 0.999,  # of its square
                "epsilon": 1e-8,  # is added to the root of that
                "weight_decay": 0.01,  # times the learning rate, of a weight in an update
                "max_gradient_norm": 1.0,  # a longer gradient is shortened to it; 0: never
                "parameters": "float32",  # or "bfloat16": with a compensation, half the memory
                "moments": "float32",  # or "bfloat16", rounded stochastically
                "memory": "device",  # or "pinned_host": moments leave the devices between updates
            },
            "checkpointing": {
                "every": 50,  # steps between checkpoints; a stage's start and end are saved, too
                "keep": 2,  # how many of the last ones, and of the last validations; the best one is kept, too
            },
            "validation": {
                "every": 0,  # steps between validations; 0: none. The best checkpoint is exported as checkpoints/best
                "questions": 100,  # of each of evaluation.sets; 0: all
                "temperature": 0.0,  # of its answers; 0: greedy
                "top_p": 1.0,  # as rollout.top_p
            },
            "evaluation": {
                "sets": CAPABILITIES,  # the sets that held-out questions come from
                "split": "test",  # their split; or "validation", "train"
                "questions": 1000,  # of each set; 0: all
                "temperature": 0.0,  # of its answers; 0: greedy
                "top_p": 1.0,  # as rollout.top_p
                "instruction": "",  # where it stands then: as in prompt.instruction, unless it is set
                "base_instruction": "",  # before the first stage: as in evaluation.instruction, unless it is set
                "blind": True,  # report what guessing without the image scores
                # Questions of each set that the final weights also answer with the figure's facts as text in place of
                # the image, where a set has such facts: which errors are of perception. 0: none.
                "counterfactual": 0,
                # A folder that keeps what the base scored, for other runs that would ask it the same; "": none.
                "base_results": "",
            },
            "log": {
                "rollouts_every": 5,  # steps between logged rollouts
                "rollout_prompts": 2,  # prompts logged then, with all their responses
                "tensorboard": True,  # writes WORKDIR/tensorboard
                "wandb": "",  # a project of Weights & Biases; "": none
                "stop_at": (),  # alarms (docs/training.md) that end the run
            },
            "export": {  # of Hugging Face checkpoints
                "dtype": "float32",  # or bfloat16
                "each_stage": True,  # one after each stage, beside that of the end
            },
        }
    )
    # They follow the other key until they are set; what is set here does not change that one.
    config.evaluation.instruction = config.prompt.get_oneway_ref("instruction")
    config.evaluation.base_instruction = config.evaluation.get_oneway_ref("instruction")
    return config


def laptop(steps: int = LAPTOP_STEPS) -> ConfigDict:
    """A 1-4 M-parameter Qwen3-VL on 64 x 64 images: minutes on two CPU cores. `steps`: of a stage."""
    config = defaults()
    config.checkpoint = TINY_CHECKPOINT
    numbers = {"prompts": LAPTOP_PROMPTS, "learning_rate": LAPTOP_LEARNING_RATE}
    config.stages = {name: stage((name,), steps, **numbers) for name in CAPABILITIES}
    # Texts give the vision tower no gradient; frozen, it is spared the weight decay too (as the paper's release does).
    config.stages.text.freeze = "^visual"
    config.stages.merged = stage(CAPABILITIES, len(CAPABILITIES) * steps, **numbers, freeze="^visual")
    for entry in config.stages.values():
        entry.curriculum.rows = steps * LAPTOP_PROMPTS
    config.objective.updates_per_batch = LAPTOP_UPDATES
    for name, source in (("perception", "easy_vqa"), ("text", "word_problems"), ("visual", "easy_vqa")):
        config.data.sets[name].source = source
    config.prompt.update({"max_tokens": 96, "token_buckets": (832, 1104), "patch_buckets": ((16, 64),)})
    config.rollout.update({"max_new_tokens": 48, "slots": 80, "prefill": 16})
    shapes = (960, 3), (960, 4), (960, 8), (1216, 5), (1216, 8)
    config.packing.update({"shapes": tuple((*shape, 64) for shape in shapes), "groups": 16})
    config.evaluation.counterfactual = 200
    return config


def _paper(architecture: str) -> ConfigDict:
    """The paper's run (sections 3 and 4) of a published size: needs a checkpoint, the three data sets and 8 x H200."""
    config = defaults()
    config.architecture = architecture
    for name, steps in (("perception", 90), ("text", 375), ("visual", 465)):
        config.stages[name] = stage((name,), steps, 512, 1e-6, freeze="^visual" if name == "text" else "")
    config.stages.merged = stage(CAPABILITIES, 930, 512, 1e-6, freeze="^visual")
    for entry in config.stages.values():
        entry.curriculum.drop_last = True
    config.model.dtype = "bfloat16"
    config.data.update({"workers": 8, "image_cache_mb": 8192})
    config.prompt.update(
        {
            "max_tokens": 2048,
            "min_pixels": 262_144,
            "max_pixels": 4_194_304,
            "token_buckets": (4096, 6144, 8192),
            "patch_buckets": tuple((1, patches) for patches in (8192, 16_384, 24_576, 32_768)),
        }
    )
    config.rollout.update({"max_new_tokens": 2048, "prefill": 16})
    tokens, patches = (9216, 11_264, 13_312, 15_360), (5120, 6144, 8192, 10_240, 12_288, 16_384, 20_480)
    config.packing.update({"shapes": tuple(itertools.product(tokens, (1,), patches)), "groups": 16})
    config.objective.updates_per_batch = 4
    config.reference.dtype = "bfloat16"
    config.checkpointing.update({"every": 10})
    config.validation.update({"every": 10, "questions": 300, "temperature": 0.6, "top_p": 0.95})
    config.export.dtype = "bfloat16"
    # Greedy, as in the paper. The release asks trained models with the instruction as a system turn, base models
    # without any (its evaluation/README.md).
    config.evaluation.update({"temperature": 0.0, "top_p": 1.0, "instruction": "system", "base_instruction": "none"})
    return config


def qwen2_5_vl_72b() -> ConfigDict:
    """Beyond the paper: what the sharded trainer is for. docs/plan.md has the smallest topologies that hold it."""
    config = _paper("qwen2_5_vl_72b")
    config.mesh.tensor = 8
    config.optimizer.update({"parameters": "bfloat16", "moments": "bfloat16"})
    return config


def _split(preset: Callable[[], ConfigDict]) -> ConfigDict:
    """On a host of 8 GPUs: four train, four serve SGLang."""
    config = preset()
    config.mesh.gpus, config.rollout.engine = (0, 1, 2, 3), "sglang"
    config.rollout.sglang.update({"servers": 4, "gpus": (4, 5, 6, 7), "memory_fraction": 0.85})
    return config


def _turns(preset: Callable[[], ConfigDict]) -> ConfigDict:
    """On a host of 8 GPUs: all of them serve SGLang, then all of them train."""
    config = preset()
    config.rollout.engine = "sglang"
    config.rollout.sglang.update({"servers": 8, "memory_fraction": 0.7, "colocate": True})
    return config


_short = functools.partial(laptop, LAPTOP_SHORT_STEPS)
PRESETS = {"laptop": laptop, "laptop_short": _short, "qwen2_5_vl_72b": qwen2_5_vl_72b}
for _size in ("qwen3_vl_8b", "qwen2_5_vl_7b"):  # the paper's two models
    PRESETS[_size] = _published = functools.partial(_paper, _size)
    PRESETS[f"{_size}_split"] = functools.partial(_split, _published)
    PRESETS[f"{_size}_turns"] = functools.partial(_turns, _published)


def get(preset: str, order: tuple[str, ...] = CAPABILITIES) -> ConfigDict:
    """The preset's config with its stages in this order, locked. Raises InputError for an unknown preset."""
    if preset not in PRESETS:
        raise InputError(f"unknown preset '{preset}'; choose one of {', '.join(PRESETS)}")
    config = PRESETS[preset]()
    config.order = order
    return config.lock()


def read(name: str, overrides: Sequence[str]) -> ConfigDict:
    """The config file with the command line's --config.key=value. Raises InputError."""
    if not Path(name.partition(":")[0]).is_file():
        raise InputError(f"--config {name}: no such config file; configs/ has some")
    values, given = flags.FlagValues(), ["config", f"--config={name}", *overrides]
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=given)
    try:
        rest = values(given)
        config = values.config
    except flags.UnrecognizedFlagError as error:
        raise InputError(f"unknown argument --{error.flagname}; settings look like --config.checkpoint=DIR") from None
    except (flags.Error, OSError) as error:
        raise InputError(f"--config {name}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"--config {name}: {explained(error)}") from None
    if len(rest) > 1:
        raise InputError(f"unknown argument {rest[1]!r}; settings look like --config.checkpoint=DIR")
    bounds.check(config)
    return config
