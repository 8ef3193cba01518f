"""Which response is in which slot, and which prompt comes next: what the host decides, without a device.

The engine follows it, and a plan follows it too, with lengths in the place of responses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from capcur_jax.models.batching import PromptSize

LOOK = 256  # steps after which the host looks at the slots even if none is needed, for `health`


class Places:
    """The slots of a call. Response i of prompt p has the number p x n + i.

    Args:
        sizes: of the prompts.
        n: responses of each.
        shards: device rows.
        rows: slots of a device row.
        each: prompts of a device row that one prefill takes.
    """

    def __init__(self, sizes: Sequence[PromptSize], n: int, shards: int, rows: int, each: int):
        self.n, self.each = n, each
        # Prompts of like length meet in a prefill, which is as long as its longest; answers come in the prompts' order.
        order = sorted(range(len(sizes)), key=lambda i: (sum(sizes[i].images), sizes[i].tokens), reverse=True)
        self.waiting = deque(order)
        self.running = np.full((shards, rows), -1)  # the response in each slot

    def unfinished(self) -> bool:
        """Whether responses are decoded or wait."""
        return bool(self.waiting) or bool((self.running >= 0).any())

    def room(self) -> int:
        """Waiting prompts that free slots can take now."""
        free = (self.running < 0).sum(1) // self.n
        return min(len(self.waiting), int(np.minimum(free, self.each).sum()))

    def worthwhile(self) -> bool:
        """Whether a device row has room for as many prompts as a prefill takes, or for all waiting ones."""
        return bool(self.waiting) and int((self.running < 0).sum(1).max()) >= self.wanted()

    def wanted(self) -> int:
        """Free slots of a device row that end a call of decoding while prompts wait."""
        return self.n * min(self.each, len(self.waiting))

    def admit(self) -> list[list[tuple[int, np.ndarray]]]:
        """As many prompts as there is room for, each to the device row that has the most free slots: of each row
        (prompt, its slots [n])."""
        parts: list[list[tuple[int, np.ndarray]]] = [[] for _ in self.running]
        for _ in range(self.room()):
            free = (self.running < 0).sum(1)
            free[[len(part) == self.each for part in parts]] = 0
            shard = int(free.argmax())
            prompt, slots = self.waiting.popleft(), np.flatnonzero(self.running[shard] < 0)[: self.n]
            self.running[shard, slots] = prompt * self.n + np.arange(self.n)
            parts[shard].append((prompt, slots))
        return parts
