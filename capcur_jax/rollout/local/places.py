"""Which response is in which slot, which pages it has and which prompt comes next: what the host decides, without a
device.

The engine follows it, and a plan follows it too, with lengths in the place of responses. A response's first pages are
those of its prompt, which it shares with others of its group; what of the prompt fills no page is copied into each
one's own. When pages run out the youngest response waits until there are some, and is drawn again from its start.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capcur_jax.errors import InputError
from capcur_jax.models.batching import PromptSize

_FEWER, _FEWEST = 4, 8  # at a call's end so many times fewer rows decode, and so many at least


def burst_sizes(rows: int) -> list[int]:
    """Rows of a device row that a burst may have: all slots, and fewer when few responses are left."""
    sizes = [rows]
    while sizes[-1] // _FEWER >= _FEWEST:
        sizes.append(sizes[-1] // _FEWER)
    return sizes


class Pool(NamedTuple):
    """The pages of a device row."""

    pages: int
    size: int  # tokens of a page

    def of(self, tokens: int) -> int:
        """Pages that so many tokens of one row lie in."""
        return -(-tokens // self.size)

    def row(self, tokens: int) -> int:
        """The same of the longest prompt with the longest response, which must find room. Raises InputError."""
        if (needed := self.of(tokens)) > self.pages:
            raise InputError(
                f"config.rollout.pages = {self.pages}: a prompt and a response of {tokens} tokens need {needed} pages "
                f"of {self.size} tokens; give at least those, or 0"
            )
        return needed


class Entry(NamedTuple):
    """What waits: responses of a prompt."""

    prompt: int
    responses: tuple[int, ...]


class Admitted(NamedTuple):
    """What starts: responses of a prompt, each in a slot."""

    prompt: int
    responses: tuple[int, ...]
    slots: tuple[int, ...]
    copies: tuple[tuple[int, int], ...]  # (first token of the prompt, page that it and those behind it are copied to)


@dataclasses.dataclass
class _Held:
    """The pages of a running response."""

    prompt: int
    shared: list[int]  # the same list for all that share them
    users: list[int]  # how many do, likewise: one number
    own: list[int]
    stamp: int  # when it came
    drawn: int = 1  # tokens of the response

    @property
    def pages(self) -> list[int]:
        return self.shared + self.own


class Places:
    """The slots of a call. Response i of prompt p has the number p x n + i.

    Args:
        sizes: of the prompts.
        n: responses of each.
        shards: device rows.
        rows: slots of a device row.
        each: prompts of a device row that one prefill takes, at most,
        row: and tokens of them.
        pool: pages of a device row.
        longest: tokens of a response at most.
        burst: of them between two visits of the host, at most.

    Raises:
        InputError: a prompt and a response do not fit into the pages of a device row.
    """

    def __init__(
        self,
        sizes: Sequence[PromptSize],
        n: int,
        shards: int,
        rows: int,
        each: int,
        row: int,
        pool: Pool,
        longest: int,
        burst: int,
    ):
        self.n, self.each, self.pool, self.longest, self._burst, self._row = n, each, pool, longest, burst, row
        self._tokens = [size.tokens for size in sizes]
        most = pool.row(max(self._tokens, default=1) + longest)
        self.own = most == 1 and pool.pages == rows  # a slot's page has its number
        # The longest first, as bins are packed; answers come in the prompts' order.
        order = sorted(range(len(sizes)), key=lambda i: (sum(sizes[i].images), sizes[i].tokens), reverse=True)
        self.waiting = deque(Entry(i, tuple(range(i * n, (i + 1) * n))) for i in order)
        self.running = np.full((shards, rows), -1)  # the response in each slot
        self.evicted = 0  # responses that had to wait
        self._held: list[dict[int, _Held]] = [{} for _ in range(shards)]  # by slot
        self._free = [list(range(pool.pages)) for _ in range(shards)]  # heaps: the lowest first
        self._stamp = 0

    # ------------------------------------------------------------------ what there is

    def unfinished(self) -> bool:
        """Whether responses are decoded or wait."""
        return bool(self.waiting) or bool((self.running >= 0).any())

    def free_slots(self) -> np.ndarray:
        """Of each device row [shards]."""
        return (self.running < 0).sum(1)

    def pages(self, shard: int, slot: int) -> list[int]:
        """Of the response in that slot, in the order of its tokens."""
        return self._held[shard][slot].pages

    def worthwhile(self) -> bool:
        """Whether a device row has room for as many prompts as a prefill takes, or all rows for all that wait; or
        whether one has nothing else to do."""
        if not self.waiting:
            return False
        fitting = [self._fitting(shard) for shard in range(len(self.running))]
        # Pages may be too few for so many at any time.
        return max(fitting) >= len(self._next()) or sum(fitting) >= len(self.waiting) or not all(self._held)

    def burst(self, most: int, waiting: bool) -> tuple[int, int, np.ndarray]:
        """Of the next burst its rows of a device row, how few responses may be left when it ends, and how many free
        rows of each device row [shards] end it.

        Args:
            most: responses of any device row that run.
            waiting: whether any process has prompts that wait.
        """
        rows, sizes = self.running.shape[1], burst_sizes(self.running.shape[1])
        size = min(size for size in sizes if size >= most)
        few = 0 if waiting else max((smaller for smaller in sizes if smaller < size), default=0)
        return size, few, self._wanted() - (rows - size)  # slots that are no row of the burst are free, too

    def _next(self) -> list[Entry]:
        """The first waiting prompts that a prefill of a device row takes together."""
        left, first = self._row, []
        for entry in itertools.islice(self.waiting, self.each):
            left -= self._tokens[entry.prompt]
            if left < 0:
                break
            first.append(entry)
        return first

    def _wanted(self) -> np.ndarray:
        """Free slots of each device row [shards] that are worth giving away. Where there are as many already, pages are
        what is missing, and where nobody waits nothing is: more than a row has."""
        rows = self.running.shape[1]
        first = self._next()
        wanted = min(sum(len(entry.responses) for entry in first), rows)
        return np.where((self.free_slots() >= wanted) | (not first), rows + 1, wanted)

    def _ahead(self, prompt: int, drawn: int) -> int:
        """Pages that a response needs until the next visit."""
        steps = min(self._burst, self.longest - drawn)
        return self.pool.of(self._tokens[prompt] + drawn - 1 + steps)

    def _missing(self, shard: int) -> int:
        """Pages that the running responses of a device row need before the next burst."""
        return sum(
            max(0, self._ahead(held.prompt, held.drawn) - len(held.pages)) for held in self._held[shard].values()
        )

    def _needed(self, prompt: int, responses: int) -> int:
        """Pages of so many new responses to a prompt."""
        whole = self._tokens[prompt] // self.pool.size
        return whole + responses * (self._ahead(prompt, 1) - whole)

    def _fitting(self, shard: int) -> int:
        """How many of the prompts that a prefill would take next the device row has room for now."""
        slots, pages, count = int(self.free_slots()[shard]), len(self._free[shard]) - self._missing(shard), 0
        for entry in self._next():
            slots -= len(entry.responses)
            pages -= self._needed(entry.prompt, len(entry.responses))
            if slots < 0 or pages < 0:
                break
            count += 1
        return count

    # ------------------------------------------------------------------ what changes

    def admit(self) -> list[list[Admitted]]:
        """As many prompts as there is room for, each to the device row that has the most free slots: what each row
        gets. A row that has nothing else to do takes what it can of a prompt's responses."""
        parts: list[list[Admitted]] = [[] for _ in self.running]
        missing = [self._missing(shard) for shard in range(len(parts))]  # what comes has what it needs at once
        left = [self._row] * len(parts)
        for _ in range(len(parts) * self.each):
            if not self.waiting:
                break
            free, entry = self.free_slots(), self.waiting[0]
            tokens = self._tokens[entry.prompt]
            open_ = [i for i, part in enumerate(parts) if len(part) < self.each and tokens <= left[i]]
            order = sorted(open_, key=lambda shard: (-free[shard], shard))
            room = {shard: self._room(shard, entry, missing[shard]) for shard in order}
            whole = [shard for shard in order if room[shard] == len(entry.responses)]
            idle = [shard for shard in order if not self._held[shard] and room[shard]]
            if not whole and not idle:
                break
            shard = (whole or idle)[0]
            left[shard] -= tokens
            self.waiting.popleft()
            if rest := entry.responses[room[shard] :]:
                self.waiting.appendleft(Entry(entry.prompt, rest))
            parts[shard].append(self._start(shard, Entry(entry.prompt, entry.responses[: room[shard]])))
        return parts

    def _room(self, shard: int, entry: Entry, missing: int) -> int:
        """How many of the entry's responses fit beside pages that others are missing."""
        pages = len(self._free[shard]) - missing
        count = min(len(entry.responses), int(self.free_slots()[shard]))
        while count and self._needed(entry.prompt, count) > pages:
            count -= 1
        return count

    def _start(self, shard: int, entry: Entry) -> Admitted:
        tokens, size = self._tokens[entry.prompt], self.pool.size
        whole = tokens // size
        shared, users = [self._take(shard) for _ in range(whole)], [len(entry.responses)]
        copies = [(i * size, page) for i, page in enumerate(shared)]
        slots = np.flatnonzero(self.running[shard] < 0)[: len(entry.responses)].tolist()
        for response, slot in zip(entry.responses, slots, strict=True):
            own = [self._take(shard, slot) for _ in range(self._ahead(entry.prompt, 1) - whole)]
            if tokens % size:
                copies.append((whole * size, own[0]))
            self.running[shard, slot] = response
            self._held[shard][slot] = _Held(entry.prompt, shared, users, own, self._stamp)
            self._stamp += 1
        return Admitted(entry.prompt, entry.responses, tuple(slots), tuple(copies))

    def reserve(self) -> list[int]:
        """Makes sure that every running response has pages for a burst; returns those that must wait for that."""
        out = []
        for shard, held in enumerate(self._held):
            while self._missing(shard) > len(self._free[shard]):
                slot = max(held, key=lambda slot: held[slot].stamp)
                out.append(int(self.running[shard, slot]))
                self._wait(held[slot].prompt, out[-1])
                self.release(shard, slot)
            for slot in sorted(held):
                mine = held[slot]
                lacking = self._ahead(mine.prompt, mine.drawn) - len(mine.pages)
                mine.own += [self._take(shard, slot) for _ in range(lacking)]
        self.evicted += len(out)
        return out

    def _wait(self, prompt: int, response: int) -> None:
        if self.waiting and self.waiting[0].prompt == prompt:
            response_list = sorted((*self.waiting.popleft().responses, response))
            self.waiting.appendleft(Entry(prompt, tuple(response_list)))
        else:
            self.waiting.appendleft(Entry(prompt, (response,)))

    def drew(self, shard: int, slot: int, tokens: int) -> None:
        """The response in that slot has so many tokens more."""
        self._held[shard][slot].drawn += tokens

    def release(self, shard: int, slot: int) -> None:
        """The response in that slot has ended, or waits."""
        held = self._held[shard].pop(slot)
        held.users[0] -= 1
        for page in held.own + (held.shared if not held.users[0] else []):
            heapq.heappush(self._free[shard], page)
        self.running[shard, slot] = -1

    def _take(self, shard: int, slot: int = 0) -> int:
        free = self._free[shard]
        if not self.own:
            return heapq.heappop(free)
        free.remove(slot)
        heapq.heapify(free)
        return slot
