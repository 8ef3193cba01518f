"""Who has which slot and which pages, through whole calls of random sizes and without any device."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, strategies

from capcur_jax.errors import InputError
from capcur_jax.models.batching import PromptSize
from capcur_jax.rollout.local.places import Admitted, Places, Pool


class Case(NamedTuple):
    """A call, and when its responses end."""

    prompts: list[int]  # tokens of each
    ends: list[int]  # tokens of each response
    n: int
    shards: int
    rows: int
    each: int
    pool: Pool
    longest: int
    burst: int
    seed: int = 0  # of the lengths of bursts
    row: int = 1000  # tokens that a prefill reads of a device row, at most

    def places(self) -> Places:
        sizes = [PromptSize(tokens) for tokens in self.prompts]
        return Places(sizes, self.n, self.shards, self.rows, self.each, self.row, self.pool, self.longest, self.burst)


@strategies.composite
def cases(draw) -> Case:
    number, either = strategies.integers, strategies.one_of
    prompts, n = draw(strategies.lists(number(1, 20), min_size=1, max_size=10)), draw(number(1, 4))
    rows, longest, burst = draw(number(n, 10)), draw(number(1, 24)), draw(number(1, 30))
    alone = max(prompts) + longest  # tokens of a page that suffices a response
    size = draw(either(number(1, alone), strategies.just(alone)))
    least = -(-alone // size)
    pages = draw(either(number(least, least * rows), strategies.just(least * rows)))
    ends = draw(strategies.lists(number(1, longest), min_size=len(prompts) * n, max_size=len(prompts) * n))
    shards, each = draw(number(1, 3)), draw(number(1, rows // n))
    seed, row = draw(number(0, 99)), max(prompts) + draw(number(0, 40))
    return Case(prompts, ends, n, shards, rows, each, Pool(pages, size), longest, burst, seed, row)


@strategies.composite
def scarce(draw) -> Case:
    """Small pages, few of them, and long responses: many must wait, and some again."""
    number = strategies.integers
    prompts, n = draw(strategies.lists(number(1, 8), min_size=3, max_size=6)), draw(number(1, 4))
    rows, longest, size = draw(number(4, 10)), draw(number(12, 24)), draw(number(1, 4))
    least = -(-(max(prompts) + longest) // size)
    ends = draw(strategies.lists(number(longest // 2, longest), min_size=len(prompts) * n, max_size=len(prompts) * n))
    pool, burst = Pool(draw(number(least, 2 * least)), size), draw(number(1, 4))
    shards, each = draw(number(1, 2)), draw(number(1, rows // n))
    return Case(prompts, ends, n, shards, rows, each, pool, longest, burst, draw(number(0, 99)))


class Call:
    """A call as the engine makes it, with every rule held after each change."""

    def __init__(self, case: Case):
        self.case, self.places = case, case.places()
        self.answered: list[int] = []
        self.waited: list[int] = []
        self.begun: Counter[int] = Counter()  # how often each response was
        self.came: dict[int, int] = {}  # when each response began last
        self.drawn: dict[int, int] = {}  # tokens of each running one

    def play(self) -> Call:
        random = np.random.default_rng(self.case.seed)
        # Each turn brings a device row's oldest response nearer to its end: it never is the one that waits.
        turns = sum(self.case.ends) + 1
        while self.places.unfinished():
            self.admit()
            self.reserve()
            self.decode(int(random.integers(1, self.case.burst + 1)))  # a burst may end before its last step
            assert (turns := turns - 1) > 0
        return self

    def running(self) -> list[tuple[int, int, int]]:
        """(device row, slot, response) of those that are."""
        return [(*at, int(self.places.running[tuple(at)])) for at in np.argwhere(self.places.running >= 0).tolist()]

    def admit(self) -> None:
        first: list[tuple[int, int, int]] = []
        while self.places.worthwhile():
            parts = self.places.admit()
            assert any(parts) and max(map(len, parts)) <= self.case.each
            assert max(sum(self.case.prompts[one.prompt] for one in part) for part in parts) <= self.case.row
            for shard, one in ((shard, one) for shard, part in enumerate(parts) for one in part):
                self.copied(shard, one)
                for slot, response in zip(one.slots, one.responses, strict=True):
                    assert response // self.case.n == one.prompt and response not in self.drawn
                    self.came[response] = self.begun.total()
                    self.begun[response], self.drawn[response] = self.begun[response] + 1, 1
                    first.append((shard, slot, response))
            self.check()
            for shard in (shard for shard, part in enumerate(parts) if part):  # nobody must wait for who comes
                lacking = [
                    self.needed(r) - len(self.places.pages(s, slot)) for s, slot, r in self.running() if s == shard
                ]
                assert sum(lacking) <= len(self.places._free[shard])
        # No device row is empty while prompts wait.
        assert not self.places.waiting or (self.places.running >= 0).any(1).all()
        for place in first:
            self.ended(*place)

    def copied(self, shard: int, one: Admitted) -> None:
        """The copies are the prompt, once for those that share it and in pieces of a page; the rest once for each."""
        size, tokens = self.case.pool.size, self.case.prompts[one.prompt]
        to = defaultdict(list)
        for start, page in one.copies:
            to[start].append(page)
        assert list(to) == list(range(0, tokens, size))
        assert len({page for _, page in one.copies}) == len(one.copies)
        pages = [self.places.pages(shard, slot) for slot in one.slots]
        for start, found in to.items():
            assert len(found) == (1 if start + size <= tokens else len(one.responses))
            assert set(found) == {own[start // size] for own in pages}

    def reserve(self) -> None:
        before = {response: (shard, self.places.pages(shard, slot)) for shard, slot, response in self.running()}
        out = self.places.reserve()
        for shard in range(self.case.shards):
            here = {response: pages for response, (row, pages) in before.items() if row == shard}
            mine = [response for response in out if response in here]
            stayed = {int(response) for response in self.places.running[shard] if response >= 0}
            assert set(here) == stayed | set(mine) and len(set(mine)) == len(mine)
            # The youngest waits, and the last one to wait was one too many.
            assert mine == sorted(here, key=self.came.__getitem__, reverse=True)[: len(mine)]
            if mine:
                kept = {response: here[response] for response in (*stayed, mine[-1])}
                lacking = sum(self.needed(response) - len(pages) for response, pages in kept.items())
                assert len({page for pages in kept.values() for page in pages}) + lacking > self.case.pool.pages
        for response in out:
            del self.drawn[response]
            assert any(response in entry.responses for entry in self.places.waiting)
        self.waited += out
        for shard, slot, response in self.running():
            assert len(self.places.pages(shard, slot)) == self.needed(response)
        self.check()

    def needed(self, response: int) -> int:
        """Pages of a response that draws a whole burst, whose last token is in none yet."""
        drawn, tokens = self.drawn[response], self.case.prompts[response // self.case.n]
        last = tokens + min(drawn + self.case.burst, self.case.longest) - 2
        return last // self.case.pool.size + 1

    def decode(self, steps: int) -> None:
        for shard, slot, response in self.running():
            tokens = min(steps, self.case.ends[response] - self.drawn[response])
            self.places.drew(shard, slot, tokens)
            self.drawn[response] += tokens
            self.ended(shard, slot, response)
        self.check()

    def ended(self, shard: int, slot: int, response: int) -> None:
        assert self.places.running[shard, slot] == response
        if self.drawn[response] == self.case.ends[response]:
            self.places.release(shard, slot)
            self.answered.append(response)
            del self.drawn[response]

    def check(self) -> None:
        """Every response is somewhere, and every page is free or somebody's."""
        running = [response for *_, response in self.running()]
        waiting = [response for entry in self.places.waiting for response in entry.responses]
        assert sorted([*running, *waiting, *self.answered]) == list(range(len(self.case.ends)))
        assert sorted(running) == sorted(self.drawn)
        holders: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for shard, slot, response in self.running():
            pages = self.places.pages(shard, slot)
            assert len(set(pages)) == len(pages) and set(pages) <= set(range(self.case.pool.pages))
            assert not self.places.own or pages == [slot]
            for place, page in enumerate(pages):
                holders[shard, page].append((response // self.case.n, place))
        for found in holders.values():  # several have a page only if it is the same whole one of their prompt
            prompt, place = found[0]
            assert len(set(found)) == 1
            assert len(found) == 1 or (place + 1) * self.case.pool.size <= self.case.prompts[prompt]
        free = [(shard, page) for shard, pages in enumerate(self.places._free) for page in pages]
        assert sorted([*free, *holders]) == list(np.ndindex(self.case.shards, self.case.pool.pages))


@given(case=strategies.one_of(cases(), scarce()))
def test_every_response_is_answered_once_and_every_page_comes_back(case):
    call = Call(case).play()
    assert sorted(call.answered) == list(range(len(case.ends)))
    assert [sorted(free) for free in call.places._free] == [list(range(case.pool.pages))] * case.shards
    assert not call.drawn and not call.places.waiting and (call.places.running < 0).all()
    # Who waits begins anew, and nobody else does.
    assert call.places.evicted == len(call.waited)
    assert call.begun == Counter(range(len(case.ends))) + Counter(call.waited)


@pytest.mark.parametrize(("pages", "enough"), [(4, False), (15, False), (16, True)])
def test_responses_wait_only_where_pages_are_too_few_for_all_slots(pages, enough):
    """6 slots for 3 responses a prompt: its 2 pages, and 2 for each response."""
    case = Case([8] * 4, [8] * 12, n=3, shards=1, rows=6, each=2, pool=Pool(pages, 4), longest=8, burst=2)
    assert (Call(case).play().places.evicted == 0) is enough


def test_an_empty_device_row_does_not_wait_for_the_others():
    """A device row has pages for 2 of the 3 prompts of a prefill."""
    case = Case([8] * 7, [8, 8, 2, 2, 8, 8, 8], n=1, shards=2, rows=8, each=3, pool=Pool(9, 4), longest=8, burst=7)
    call = Call(case)
    call.admit()
    call.reserve()
    assert call.places.running[:, :2].tolist() == [[0, 2], [1, 3]]
    call.decode(1)
    assert call.answered == [2, 3] and not call.places.worthwhile()
    call.places.release(1, 0)
    assert call.places.worthwhile()
    assert [[one.prompt for one in part] for part in call.places.admit()] == [[5], [4, 6]]


def test_a_prefill_takes_as_many_prompts_as_its_row_has_tokens_for():
    """The longest first; the next prefill begins with the one that had no room."""
    case = Case([4, 9, 6, 2, 3], [1] * 5, n=1, shards=1, rows=5, each=3, pool=Pool(15, 4), longest=3, burst=3, row=16)
    places = case.places()
    assert [[one.prompt for one in part] for part in (places.admit()[0], places.admit()[0])] == [[1, 2], [0, 4, 3]]
    waiting = case._replace(rows=2).places()
    assert [one.prompt for one in waiting.admit()[0]] == [1, 2] and not waiting.worthwhile()
    waiting.release(0, 0)
    waiting.drew(0, 1, 1)
    assert not waiting.worthwhile()  # three would meet in the next one, and two slots are all that there are
    waiting.release(0, 1)
    assert waiting.worthwhile()


def test_the_last_prompts_do_not_wait_where_rows_have_room_for_one_each():
    """Three slots are free, one of each device row, and three prompts wait."""
    case = Case([4] * 9, [3] * 9, n=1, shards=3, rows=3, each=2, pool=Pool(9, 4), longest=3, burst=3)
    places, rounds = case.places(), 0
    while places.worthwhile():
        places.admit()
        rounds += 1
    assert rounds == 2 and not places.waiting


def three(pages: int) -> Places:
    """Three responses of a prompt (a page), with 5 tokens of 9 and a page of its own each; all want one more."""
    case = Case([4, 4], [9] * 6, n=3, shards=1, rows=3, each=1, pool=Pool(pages, 4), longest=9, burst=4)
    places = case.places()
    ((one,),) = places.admit()
    assert one.responses == (0, 1, 2) and one.copies == ((0, 0),)
    assert [places.pages(0, slot) for slot in range(3)] == [[0, 1], [0, 2], [0, 3]]
    for slot in range(3):
        places.drew(0, slot, 4)
    return places


def test_nobody_waits_while_there_are_pages():
    places = three(7)
    assert places.reserve() == [] and places.evicted == 0
    assert [places.pages(0, slot) for slot in range(3)] == [[0, 1, 4], [0, 2, 5], [0, 3, 6]]


@pytest.mark.parametrize(("pages", "wait", "entries"), [(6, [2], [(2,), (3, 4, 5)]), (4, [2, 1], [(1, 2), (3, 4, 5)])])
def test_the_youngest_waits_before_the_others_of_its_prompt_and_these_before_the_next_prompt(pages, wait, entries):
    places = three(pages)
    assert places.reserve() == wait and places.evicted == len(wait)
    assert [entry.responses for entry in places.waiting] == entries
    places.release(0, 0)
    ((again, *_),) = places.admit()
    assert again.responses == entries[0] and len(again.copies) == 1


@pytest.mark.parametrize(("pages", "size", "own"), [(3, 32, True), (4, 32, False), (6, 16, False)])
def test_a_slot_s_page_has_its_number_where_each_has_one(pages, size, own):
    case = Case([20, 10], [12] * 4, n=2, shards=2, rows=3, each=1, pool=Pool(pages, size), longest=12, burst=3)
    assert case.places().own is own
    Call(case).play()


@pytest.mark.parametrize(("pages", "tokens"), [(4, 9), (1, 1)])
def test_a_prompt_and_a_response_that_fit_no_pool_are_refused(pages, tokens):
    case = Case([1, tokens], [], n=1, shards=1, rows=9, each=1, pool=Pool(pages, 4), longest=8, burst=3)
    need = -(-(tokens + 8) // 4)
    message = rf"a prompt and a response of {tokens + 8} tokens need {need} pages of 4"
    with pytest.raises(InputError, match=rf"config\.rollout\.pages = {pages}: {message}"):
        case.places()
    case._replace(pool=Pool(need, 4)).places()
