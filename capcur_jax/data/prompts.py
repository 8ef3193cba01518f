"""Problem -> Prompt: the instruction, the images, the chat template, the limits. Done once for a problem."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from capcur_jax.data.images import ImageStore
from capcur_jax.data.problem import IMAGE_MARK, Problem
from capcur_jax.errors import InputError
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import BadImage, BadInput, Processor, Prompt

# The paper's instruction in our words; the reward looks for exactly this form (section 3).
INSTRUCTION = "Reason inside <think></think>, then give the final answer in \\boxed{}."
PLACEMENTS = ("suffix", "system", "none")


class PromptBuilder:
    """Builds prompts, and counts what it has to leave out: overlong prompts are skipped whole, never truncated.

    `store` reads the images; without one each is decoded in the calling thread, and none is kept.
    """

    def __init__(
        self, processor: Processor, placement: str, max_tokens: int, max_patches: int, store: ImageStore | None = None
    ):
        if placement not in PLACEMENTS:
            raise InputError(f"config.prompt.instruction = {placement!r}; choose one of {', '.join(PLACEMENTS)}")
        self.processor, self.placement = processor, placement
        self._max_tokens, self._max_patches = max_tokens, max_patches
        self._store = store or ImageStore()
        self.skipped: dict[Problem, str] = {}  # why
        self.counts: collections.Counter[str] = collections.Counter()

    def placing(self, placement: str) -> PromptBuilder:
        """This one with the instruction elsewhere. The two count together what they leave out, a problem once."""
        if placement == self.placement:
            return self
        other = PromptBuilder(self.processor, placement, self._max_tokens, self._max_patches, self._store)
        other.skipped, other.counts = self.skipped, self.counts
        return other

    def render(self, problem: Problem) -> str:
        """The chat prompt as text, one placeholder an image (in front where the text holds no <image> mark). A control
        token in the question is marked as text (`Processor.render`)."""
        texts = problem.problem.split(IMAGE_MARK)
        if len(texts) == 1:
            parts: list[str | None] = [None] * len(problem.images) + [problem.problem]
        else:
            parts = [part for text in texts for part in (text, None)][:-1]
        # The instruction asks for a boxed answer; a row without an answer (a caption to learn) has none to box.
        placement = self.placement if problem.answer else "none"
        if placement == "suffix":
            parts = [*parts[:-1], f"{parts[-1]} {INSTRUCTION}" if parts[-1] else INSTRUCTION]
        return self.processor.render(
            [part for part in parts if part != ""], INSTRUCTION if placement == "system" else ""
        )

    def build(self, problem: Problem) -> Prompt:
        """Raises BadInput: a missing or broken image, a prompt over a limit."""
        return self.prompt(self.render(problem), problem.images)

    def prompt(self, text: str, images: Sequence[str]) -> Prompt:
        """Of a rendered text and the files of its images. Raises BadInput as `build` does."""
        sizes = [self._size(path) for path in images]
        self._measure(text, sizes)  # first: nothing is decoded for a prompt that is left out
        resample = self.processor.images.resample
        loaded = [self._store.load(path, size, resample) for path, size in zip(images, sizes, strict=True)]
        return self.processor.prepare(text, loaded)

    def measure(self, problem: Problem) -> PromptSize:
        """Tokens of the prompt and patches of each image; no pixel is decoded. Raises BadInput as `build` does, but for
        images whose header alone is sound."""
        return self.prompt_size(self.render(problem), problem.images)

    def prompt_size(self, text: str, images: Sequence[str]) -> PromptSize:
        """`measure` of a rendered text and the files of its images."""
        return self._measure(text, [self._size(path) for path in images])

    def _size(self, path: str) -> tuple[int, int]:
        """(height, width) at which the model sees an image. Raises BadImage."""
        height, width = self._store.size(path)
        try:
            return self.processor.resized(height, width)
        except ValueError as error:
            raise BadImage(f"{path}: {width} x {height} pixels: {error}; crop it or take the row out") from None

    def _measure(self, text: str, sizes: Sequence[tuple[int, int]]) -> PromptSize:
        """`sizes`: of the images, as the model sees them."""
        vision = self.processor.config.vision
        patches = [height * width // vision.patch_size**2 for height, width in sizes]
        tokens = len(self.processor.tokenize(text, len(sizes)))
        tokens += sum(count // vision.merge_size**2 - 1 for count in patches)
        self._check(tokens, max(patches, default=0))
        return PromptSize(tokens, tuple(patches))

    def _check(self, tokens: int, patches: int) -> None:
        if tokens > self._max_tokens:
            raise BadInput(
                f"the prompt has {tokens} tokens, config.prompt.max_tokens = {self._max_tokens}: "
                f"raise the limit{' or lower config.prompt.max_pixels' if patches else ''}"
            )
        if patches > self._max_patches:
            raise BadInput(
                f"an image has {patches} patches, a row of config.prompt.patch_buckets at most {self._max_patches}: "
                "declare a longer one or lower config.prompt.max_pixels"
            )

    def try_build(self, problem: Problem) -> Prompt | None:
        """`build`, or None where the problem can't be used: counted once, the reason kept."""
        try:
            return self.build(problem)
        except BadInput as error:
            self.skip(problem, error)
            return None

    def skip(self, problem: Problem, error: BadInput) -> None:
        if problem not in self.skipped:
            self.skipped[problem] = str(error)
            self.counts["images" if isinstance(error, BadImage) else "prompts"] += 1

    def reasons(self, shown: int = 2) -> str:
        """Why the first skipped problems were skipped."""
        return "; ".join(list(self.skipped.values())[:shown])


def target_tokens(processor: Processor, problem: Problem, limit: int) -> np.ndarray:
    """Token ids of an SFT row's response, all of it text, and its end token.

    Raises BadInput where it is missing, too long, or holds a control token that the tokenizer can't write as text."""
    if problem.response is None:
        raise BadInput("the row has no 'response' to learn; an sft stage needs one in every row")
    text = problem.response
    if processor.opened and text.lstrip().startswith("<think>"):  # the prompt has it
        text = text.lstrip().removeprefix("<think>").lstrip()
    tokens = np.array([*processor.text_tokens(text), processor.end_tokens[0]], np.int32)
    if len(tokens) > limit:
        raise BadInput(
            f"the response has {len(tokens)} tokens, config.rollout.max_new_tokens = {limit}: raise it or drop the row"
        )
    return tokens


def tokenizer_texts(problems: Iterable[Problem]) -> Iterator[str]:
    """What a fresh model's tokenizer is trained on: questions with the instruction, and answers.

    As the prompt has it: roles, question, instruction. The tokenizer's own marks stay whole anyway.
    """
    for problem in problems:
        yield f"user\n{problem.problem} {INSTRUCTION if problem.answer else ''}\nassistant\n"
        yield problem.response or problem.answer


def explain_skipped(builder: PromptBuilder, shown: int = 3) -> list[str]:
    """Lines for people: how many problems were left out, and the first few with the reason."""
    lines = [f"{problem.id}: {reason}" for problem, reason in list(builder.skipped.items())[:shown]]
    more = len(builder.skipped) - len(lines)
    return [*lines, f"... and {more} more"] if more > 0 else lines
