"""`run`, the command without a name: asks a model about benchmarks, and scores what it replies."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capcur_jax import presets
from capcur_jax.data.prompts import PLACEMENTS
from capcur_jax.errors import InputError
from capcur_jax.evaluation import asking, judge, outcome, page, rules
from capcur_jax.evaluation.asking import Answerer, Replies, Said
from capcur_jax.evaluation.benchmarks.base import MODES
from capcur_jax.evaluation.chosen import Chosen, Source, choose
from capcur_jax.evaluation.commands.score import described, tell, told
from capcur_jax.evaluation.folders import SCORES, Answered
from capcur_jax.evaluation.scoring import Scored, score
from capcur_jax.files import prepare_workdir
from capcur_jax.records import metrics
from capcur_jax.records.command_line import add_judge, add_server, at_least, server_settings
from capcur_jax.records.terminal import Progress
from capcur_jax.rollout.engine import Sampling

MAX_NEW_TOKENS = 2048  # the paper's
REPLIES = "replies"  # journals, in the work directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--benchmarks", required=True, metavar="NAME,...", help="which ones; --list names them; or files of problems")
    add("--checkpoint", metavar="DIR", help="a Hugging Face checkpoint, or OWNER/NAME on the Hub: asked by this "
        "project's engines")  # fmt: skip
    add("--address", metavar="URL[,URL]", help="an OpenAI-compatible server, or several of one model")
    add("--model", metavar="NAME", help="the name under which the server at --address has it")
    add("--config", metavar="FILE[:PRESET]",
        help="engine, mesh, pixel limits, sampling and problem sets for --checkpoint (default: those of the run that "
        "exported it, if it lies in a run's folder); any key can be set: --config.rollout.engine=sglang")  # fmt: skip
    add(
        "--data",
        metavar="PATH",
        help="folder (or file) of the benchmarks, as VLMEvalKit or they themselves publish them",
    )
    add("--images", metavar="DIR", help="folder for images that tables hold (default: WORKDIR/images)")
    add("--workdir", metavar="DIR", help="gets scores.json, predictions/ and the journals; the same command with it "
        "goes on (default: a dated folder in runs/)")  # fmt: skip
    add("--limit", type=at_least(0), default=0, metavar="N", help="ask N rows of each, drawn by hash; 0: all")
    add("--instruction", choices=PLACEMENTS,
        help="where the training's instruction stands (default: as the run's config has it, else none)")  # fmt: skip
    add("--read", choices=rules.READINGS,
        help="what of a reply the rules read (default: box where the instruction asks for one, else raw)")  # fmt: skip
    add("--max_new_tokens", type=at_least(1), metavar="N",
        help=f"longest reply (default: the config's, else {MAX_NEW_TOKENS:,})")  # fmt: skip
    add("--temperature", type=float, metavar="T", help="default: the config's for evaluation, else 0")
    add("--top_p", type=float, metavar="P", help="default: the config's for evaluation, else 1")
    add_judge(parser)
    add_server(parser)
    add("--coordinator", default="", metavar="HOST:PORT", help="of several processes: an address of process 0")
    add("--process_id", type=int, metavar="N", help="of several processes: this one's number, from 0")
    add("--process_count", type=int, metavar="N", help="of several processes: how many there are")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Who is asked what. read: what of a reply the rules read."""

    chosen: Sequence[Chosen]
    answerer: Answerer
    sampling: Sampling
    instruction: str
    read: str
    workdir: Path
    data: Path | None

    @property
    def settings(self) -> dict[str, Any]:
        """What replies depend on."""
        return {**self.answerer.settings, **asking.sampled(self.sampling, self.instruction)}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the scores of both modes by benchmark; all else is in the work directory. Raises InputError."""
    judging = judge.model_of(arguments.judge, arguments.judge_model, arguments.judge_key_variable)
    setting = opened(arguments)
    workdir, settings = setting.workdir, setting.settings
    model = {"model": arguments.model or arguments.checkpoint_name, "versions": metrics.versions()}
    result = {}
    with contextlib.ExitStack() as closing:
        # Opened first: what is wrong with a judge is said before a model answers for hours.
        journal = workdir / judge.FILE
        judged = _by_owner(lambda: closing.enter_context(judge.Judge(judging, journal)) if judging else None)
        said = ask(setting.chosen, setting.answerer, settings, workdir)
        for one, replies in zip(setting.chosen, said, strict=False):  # process 0 has them
            conditions = {**model, **settings}
            result[one.benchmark.name] = score_and_write(one, replies, setting.read, judged, conditions, workdir)
    if result:
        tell(f"{workdir / SCORES}, {page.write(workdir).name}, predictions/")
    meet()
    return {"workdir": str(workdir), "benchmarks": result}


def opened(arguments: argparse.Namespace) -> Setting:
    """What the options of `add_arguments` mean; of several processes all call it. Raises InputError."""
    _check(arguments)
    config, instruction = None, arguments.instruction or "none"
    if arguments.checkpoint:
        _join(arguments)
        _find(arguments)
        config = _config(arguments)
        instruction = arguments.instruction or _instruction(arguments, config)
    workdir = prepare_workdir(arguments.workdir, "evaluation")
    built = _run_folder(arguments) or workdir
    images = Path(arguments.images) if arguments.images else workdir / "images"
    data = Path(arguments.data) if arguments.data else None
    source = Source(data, images, config, built / "data")
    chosen = _in_turn(lambda: choose(arguments.benchmarks.split(","), source, arguments.limit))
    for one in chosen:
        tell(described(one.benchmark, one.rows) if not one.conditions["partial"] else _partial(one))
    tell(f"work directory: {workdir}")
    sampling = _sampling(arguments, config)
    answerer = _answerer(arguments, config, sampling, workdir)
    read = arguments.read or ("raw" if instruction == "none" else "box")
    return Setting(chosen, answerer, sampling, instruction, read, workdir, data)


def ask(chosen: Sequence[Chosen], answerer: Answerer, settings: dict[str, Any], workdir: Path) -> list[list[Said]]:
    """The replies to the rows of each benchmark, of which those that are known are not asked again. Of several
    processes all call it, and process 0 keeps the journals; the others get nothing. Raises InputError, RolloutError."""
    from capcur_jax.devices import distributed

    questions = [[asking.asked(one.benchmark, row, settings["instruction"]) for row in one.rows] for one in chosen]
    with contextlib.ExitStack() as closing:

        def opened(at: int) -> Replies:
            name = chosen[at].benchmark.name
            known = {"benchmark": name, **settings}
            return closing.enter_context(Replies(workdir / REPLIES / f"{name}.jsonl", known, questions[at]))

        journals = distributed.by_owner(lambda: [opened(at) for at in range(len(chosen))], str(workdir))
        wanted = []
        for at in range(len(chosen)):
            mine = journals[at].wanted() if journals else [False] * len(questions[at])
            wanted.append(distributed.broadcast(mine).tolist())
        if any(map(any, wanted)):
            closing.enter_context(answerer)
            answerer.prepare(question for each in questions for question in each)
        for at, one in enumerate(chosen):
            if any(wanted[at]):
                _ask_one(one, answerer, questions[at], wanted[at], journals[at] if journals else None)
        return [journal.said() for journal in journals] if journals else []


def _ask_one(
    one: Chosen, answerer: Answerer, questions: Sequence[Any], wanted: Sequence[bool], journal: Replies | None
) -> None:
    known = len(wanted) - sum(wanted)
    with contextlib.ExitStack() as closing:
        bar = closing.enter_context(Progress(one.benchmark.name, len(wanted), known)) if journal else None

        def done(answers: Sequence[tuple[Any, Said]]) -> None:
            if journal is not None and bar is not None:
                journal.add(answers)
                for _, said in answers:
                    bar.advance("failed" if said.failed else "")

        answerer.answer(questions, wanted, done)


def score_and_write(
    one: Chosen, said: Sequence[Said], read: str, judged: Any, settings: dict[str, Any], workdir: Path
) -> dict[str, Any]:
    """Scores a benchmark in both modes, and adds it to the files of the work directory. Returns rows and scores."""
    benchmark, replies = one.benchmark, [each.reply() for each in said]
    found: dict[str, Scored] = {}
    for mode in MODES:
        found[mode] = score(benchmark, one.rows, replies, mode, read, judged)
        tell(f"{benchmark.name}, {told(mode, found[mode])}")
    answered = [
        Answered(row, reply, {mode: found[mode].verdicts[at] for mode in MODES})
        for at, (row, reply) in enumerate(zip(one.rows, replies, strict=True))
    ]
    failed = [reply.failed for reply in replies if reply.failed]
    if failed:
        tell(f"{benchmark.name}: {len(failed)} rows have no reply and count as wrong; the same command asks them again "
             f"(the first: {failed[0]})")  # fmt: skip
    conditions = {**settings, **one.conditions, "read": benchmark.reading or read}
    conditions["judge"] = judged.described() if judged else "none"
    entry = outcome.outcome(answered, benchmark.metrics, conditions, found)
    thinking = {row.index: each.thinking for row, each in zip(one.rows, said, strict=True) if each.thinking}
    scores = _known(workdir)
    scores["benchmarks"][benchmark.name] = entry
    outcome.write(workdir, scores, {benchmark.name: answered}, {benchmark.name: thinking})
    return {"rows": len(one.rows), **{mode: entry[mode]["score"] for mode in MODES}}


def _known(workdir: Path) -> dict[str, Any]:
    """The scores that the work directory has of other commands."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((workdir / SCORES).read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("benchmarks"), dict):
            return found
    return {"benchmarks": {}}


def _partial(one: Chosen) -> str:
    asked, rows = one.conditions["asked"], one.conditions["rows"]
    return f"{one.benchmark.title}: {asked:,} of {rows:,} rows, drawn by hash (--limit): the score is a partial one"


# ---------------------------------------------------------------------- what the arguments mean


def _check(arguments: argparse.Namespace) -> None:
    if bool(arguments.checkpoint) == bool(arguments.address):
        raise InputError("give --checkpoint=DIR, or --address=URL with --model=NAME")
    if arguments.address and not arguments.model:
        raise InputError("--address needs --model, the name under which the server has it")
    if arguments.checkpoint and arguments.model:
        raise InputError("--model is a server's; a --checkpoint needs none")
    if arguments.address and (arguments.config or arguments.overrides or arguments.process_count):
        raise InputError("--config and several processes are for a --checkpoint; a server at --address has its own")


def _join(arguments: argparse.Namespace) -> None:
    from capcur_jax.devices import cluster, distributed, drivers

    drivers.without_drivers_cpu()
    drivers.keep_programs()
    cluster.initialize(cluster.Settings(arguments.coordinator, arguments.process_id, arguments.process_count))
    if distributed.process_count() > 1 and not arguments.workdir:
        raise InputError("an evaluation by several processes needs --workdir, one that all of them see")


def _find(arguments: argparse.Namespace) -> None:
    """The directory in place of a name on the Hub. Raises InputError."""
    from capcur_jax.hub import download

    spec = arguments.checkpoint
    directory = download.checkpoint(spec, "--checkpoint")
    arguments.checkpoint = str(directory)
    arguments.checkpoint_name = download.version(spec, directory) or str(directory.resolve())


def _by_owner(act: Callable[[], Any]) -> Any:
    """What `act` gives in process 0, None in the others. Raises InputError in all."""
    from capcur_jax.devices import distributed

    return distributed.by_owner(act, "what the command was given")


def _in_turn(read: Callable[[], Any]) -> Any:
    """What `read` gives, first in process 0, which unpacks and builds what the others then find."""
    given = _by_owner(read)
    return read() if given is None else given


def meet() -> None:
    """Waits for the other processes."""
    from capcur_jax.devices import distributed

    distributed.barrier("end")  # a process that leaves earlier would take the others with it


def _run_folder(arguments: argparse.Namespace) -> Path | None:
    from capcur_jax.evaluation.checkpoint import run_of

    return run_of(Path(arguments.checkpoint).expanduser()) if arguments.checkpoint else None


def _config(arguments: argparse.Namespace) -> ConfigDict:
    from capcur_jax.evaluation.checkpoint import config_of_run, plain_config

    if arguments.config:
        return presets.read(arguments.config, arguments.overrides)
    if arguments.overrides:
        raise InputError(f"{arguments.overrides[0]} needs a --config=FILE whose key it sets; configs/ has some")
    folder = _run_folder(arguments)
    return config_of_run(folder) if folder else plain_config()


def _instruction(arguments: argparse.Namespace, config: ConfigDict) -> str:
    known = arguments.config or _run_folder(arguments)
    return config.evaluation.instruction if known else "none"


def _sampling(arguments: argparse.Namespace, config: ConfigDict | None) -> Sampling:
    limit, temperature, top_p = MAX_NEW_TOKENS, 0.0, 1.0
    if config is not None:
        limit = config.rollout.max_new_tokens or limit
        temperature, top_p = config.evaluation.temperature, config.evaluation.top_p
    given = arguments.max_new_tokens, arguments.temperature, arguments.top_p
    chosen = [other if one is None else one for one, other in zip(given, (limit, temperature, top_p), strict=True)]
    try:
        return Sampling(*chosen)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def _answerer(arguments: argparse.Namespace, config: ConfigDict | None, sampling: Sampling, workdir: Path) -> Answerer:
    if config is None:
        from capcur_jax.evaluation.served import Served

        made = Served(arguments.address.split(","), arguments.model, sampling, **server_settings(arguments))
        made.check()
        return made
    from capcur_jax.evaluation.checkpoint import Checkpoint

    return Checkpoint(Path(arguments.checkpoint).expanduser(), config, sampling, workdir)
