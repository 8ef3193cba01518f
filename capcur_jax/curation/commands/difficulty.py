"""python -m capcur_jax.data difficulty: how often a model answers each problem rightly, graded as in training."""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from capcur_jax import presets
from capcur_jax.curation.commands.options import journal_file, output_file
from capcur_jax.data.draw import drawn
from capcur_jax.data.problem import Drop, Problem
from capcur_jax.data.rows import Tally, read_rows, write_rows
from capcur_jax.errors import InputError, RolloutError
from capcur_jax.records.command_line import at_least
from capcur_jax.records.journal import Journal, fingerprint
from capcur_jax.records.tables import titled
from capcur_jax.records.terminal import Progress, kept_and_dropped, stderr_console

TENTHS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="rows of problems (.jsonl, .parquet)")
    add("--output", required=True, metavar="FILE", help="the same rows with pass_rate, pass_rate_by, predictions and "
        "correctness; a journal beside it keeps what was measured, and a later run goes on from there")  # fmt: skip
    add("--config", default="configs/staged.py", metavar="FILE[:PRESET]",
        help="checkpoint, engine, prompt and reward are those of this config (default: %(default)s); any key can be "
        "set: --config.checkpoint=DIR --config.rollout.engine=sglang")  # fmt: skip
    add("--samples", type=at_least(1), default=16, metavar="K", help="responses to each problem (default: %(default)s)")
    add("--temperature", type=float, default=0.7, metavar="T", help="default: %(default)s, as in the paper")
    add("--top_p", type=float, default=1.0, metavar="P",
        help="default: %(default)s, as in training; the paper's release measured with --top_p 0.9 and the instruction "
        "as a system turn (--config.prompt.instruction=system)")  # fmt: skip
    add("--max_new_tokens", type=at_least(1), default=1024, metavar="N", help="default: %(default)s, as in the paper")
    add("--seed", type=at_least(0), default=0, metavar="N")
    add("--limit", type=at_least(0), default=0, metavar="N", help="measure only N rows, drawn by the hash of "
        "their ids; 0: all")  # fmt: skip


def _chosen(rows: Iterable[Problem | Drop], limit: int, file: str) -> Iterable[Problem | Drop]:
    """The rows that are measured, and those that can't be read, in the order of the file."""
    if not limit:
        return rows
    rows = list(rows)
    taken = {row.id for row in drawn([row for row in rows if isinstance(row, Problem)], limit, file)}
    return [row for row in rows if isinstance(row, Drop) or row.id in taken]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns rows, kept, dropped by reason, the mean pass rate, its histogram in tenths (the last: all right), and the
    kinds whose pass rates follow their answers."""
    output = output_file(arguments.output, arguments.input)
    config = presets.read(arguments.config, arguments.overrides)
    if not config.checkpoint:
        raise InputError("config.checkpoint is empty: name the model to measure, --config.checkpoint=DIR")
    from capcur_jax import policy

    if policy.engine_kind(config).shares_devices(config):
        raise InputError("config.rollout.sglang.colocate: nothing is trained here; set it to False")
    from capcur_jax.curation import difficulty
    from capcur_jax.devices import drivers, sharding  # here: JAX comes with them
    from capcur_jax.hub import download
    from capcur_jax.rewards.reward import make_reward
    from capcur_jax.rollout.engine import Sampling

    try:
        sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p)
        reward = make_reward(config.reward)
    except ValueError as error:
        raise InputError(str(error)) from None
    drivers.without_drivers_cpu()
    drivers.keep_programs()
    mesh = sharding.make_mesh(config.mesh)
    source = download.checkpoint(config.checkpoint)
    model, opened = policy.open_model(config, source, mesh, lambda line: print(line, file=sys.stderr))
    tally = Tally()
    rows = tally.kept(_chosen(read_rows(arguments.input), arguments.limit, arguments.input))
    found = list(tally.passed(difficulty.measurable(rows, opened.builder)))
    problems, sizes = [problem for problem, _ in found], [size for _, size in found]
    if tally.rows and not problems:
        stderr_console().print(kept_and_dropped(tally.summary(), tally.told()))
        raise InputError(f"{arguments.input}: none of {tally.rows} rows can be measured; nothing is written")
    by = {
        "model": str(Path(config.checkpoint).expanduser()),
        "samples": arguments.samples, "temperature": arguments.temperature, "top_p": arguments.top_p,
        "max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed,
        "engine": config.rollout.engine, "instruction": config.prompt.instruction,
    }  # fmt: skip
    known = by | {"weights": fingerprint(source), "reward": config.reward.function or "accuracy"}
    known |= {name: config.prompt[name] for name in ("max_tokens", "min_pixels", "max_pixels")}
    with opened.images, Journal(journal_file(output), known) as journal:
        todo = [problem for problem in problems if difficulty.key(problem) not in journal.done]
        if todo:
            engine = policy.open_engine(config, model, opened, output.parent)
            try:
                from flax import nnx

                engine.update_weights(nnx.split(model)[1], 0)
                images = any(size.images for size in sizes)
                engine.warm_up(sizes, sampling, arguments.samples, images)
                with Progress("measuring", len(problems), len(problems) - len(todo)) as progress:
                    difficulty.measure(
                        problems, engine=engine, builder=opened.builder, reward=reward, sampling=sampling,
                        samples=arguments.samples, seed=arguments.seed, journal=journal, images=images,
                        batch=max(1, policy.batch(config) // arguments.samples),
                        progress=progress.advance,
                    )  # fmt: skip
            except RolloutError as error:
                raise InputError(f"{error}; the same command goes on") from None
            finally:
                engine.close()
                reward.close()
        measured = list(tally.passed(difficulty.rated(problems, journal, by)))
    write_rows(output, measured)
    rates = [problem.pass_rate for problem in measured]
    console = stderr_console()
    console.print(kept_and_dropped(tally.summary(), tally.told()))
    if rates:
        said = [("mean", f"{sum(rates) / len(rates):.1%}")]
        said += [("rows always right", rates.count(1)), ("rows always wrong", rates.count(0))]
        console.print(titled("Pass rate", ("", ""), said))
    if followed := difficulty.followed(measured):
        head = ("kind", "rows", "explained by the answer", "lowest", "highest")
        lines = [
            (kind, f"{number:,}", f"{share:.0%}", *(f"{answer} {rate:.0%}" for answer, rate in ends))
            for kind, number, share, *ends in followed
        ]
        console.print(titled("Pass rates that follow the answer: an order by them sorts by answer", head, lines))
    histogram = collections.Counter(int(rate * TENTHS) for rate in rates)
    return tally.summary() | {
        "pass_rate": sum(rates) / len(rates) if rates else None,
        "histogram": [histogram[tenth] for tenth in range(TENTHS + 1)],
        "explained_by_answer": {one.kind: round(one.share, 3) for one in followed},
        "output": str(output),
    }
