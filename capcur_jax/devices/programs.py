"""Compiled programs by argument shape."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax


class Programs:
    """A jitted function with one ahead-of-time executable for each combination of argument shapes.

    A run compiles what it will need before a stage starts; a call with another shape still works, compiles late, and
    shows in the run's compilation counter.
    """

    def __init__(self, function: Callable, **jit_arguments: Any):
        self._jitted = jax.jit(function, **jit_arguments)
        self._compiled: dict[Any, Any] = {}

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        """The program for these shapes, not compiled."""
        return self._jitted.trace(*arguments)

    def compile(self, *arguments: Any) -> Any:
        """The executable for these shapes, compiled unless done; nothing runs and nothing is donated."""
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self._compiled:
            self._compiled[key] = in_background(self.trace(*arguments).lower().compile)
        return self._compiled[key]

    def __call__(self, *arguments: Any) -> Any:
        return self.compile(*arguments)(*arguments)


def in_background(compile: Callable[[], Any]) -> Any:
    """What `compile` returns. XLA can take minutes, and the main thread, which alone hears a signal, must not wait in
    there."""
    result: Future = Future()

    def run() -> None:
        try:
            result.set_result(compile())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="compile", daemon=True).start()
    return result.result()
