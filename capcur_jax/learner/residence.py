"""Where a stage's arrays lie while nothing reads them: on the devices, or in the host's pinned memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from capcur_jax.errors import InputError

MEMORIES = ("device", "pinned_host")


class Offload(NamedTuple):
    """Moves a tree of arrays between the devices and pinned host memory, for ever to the same places."""

    shardings: Any  # on the devices

    def to_device(self, tree: Any) -> Any:
        return jax.device_put(tree, self.shardings)

    def to_host(self, tree: Any) -> Any:
        return jax.device_put(tree, jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), self.shardings))

    @classmethod
    def of(cls, tree: Any) -> Offload:
        return cls(jax.tree.map(lambda leaf: leaf.sharding, tree))


class Residence:
    """One tree's home: `rest` brings it there, `work` to the devices. Raises InputError for an unknown memory."""

    def __init__(self, memory: str, tree: Any, key: str):
        if memory not in MEMORIES:
            raise InputError(f"{key} = {memory!r}; choose one of {', '.join(MEMORIES)}")
        self._offload = Offload.of(tree) if memory == "pinned_host" else None

    def rest(self, tree: Any) -> Any:
        return self._offload.to_host(tree) if self._offload else tree

    def work(self, tree: Any) -> Any:
        return self._offload.to_device(tree) if self._offload else tree


AT_HOME = Residence("device", None, "")  # stays on the devices
