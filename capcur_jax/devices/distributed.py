"""Several processes as one run: which of them owns what, and small values between hosts (cluster.py joins them).

Process 0 is the owner: servers, records and refill decisions are its own, and the others are told what it decided.
`exchange`, `gather`, `agree`, `broadcast`, `by_owner`, `by_host`, `barrier` and `describe` are collective: every
process calls the same ones in the same order, from one thread. They go through JAX's coordination service (the one that
`jax.distributed` starts) and not through the devices: a device collective waits behind the step that is running, is
compiled for each shape, and without x64 cuts 64-bit values.

A run ends well with `barrier("end")`: at exit JAX waits half a minute for the other processes and then ends them all,
so that an error in one of them isn't waited out by the rest.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed as jax_distributed

from capcur_jax.errors import InputError

_WAIT_S = 3 * 3600  # a dead process ends the others within minutes by its heartbeat; this is for one that is slow

_PIECE = 1 << 20  # bytes that the coordination service gets at once
_Value = TypeVar("_Value")

_turns = itertools.count()
_lock = threading.Lock()


# ---------------------------------------------------------------------- who is who


def process_id() -> int:
    """This process's number, from 0; starts no backend, as jax.process_index() would."""
    return _state().process_id


def process_count() -> int:
    """Processes of the run; starts no backend, as jax.process_count() would."""
    return _state().num_processes


def is_owner() -> bool:
    """Whether this is process 0, which owns servers, records and refill decisions."""
    return process_id() == 0


def describe() -> dict[str, str]:
    """What the plan printed at start says about processes. Collective, and it starts the backend."""
    hosts = [value.decode() for value in _gather("describe", socket.gethostname().encode())]
    devices = jax.local_devices()
    return {
        "process": f"{process_id()} of {process_count()} on {hosts[process_id()]}",
        "local devices": f"{len(devices)} x {devices[0].device_kind} of {jax.device_count()}",
        "owner of records and servers": f"process 0 on {hosts[0]}",
    }


# ---------------------------------------------------------------------- small values between processes


def exchange(values: Any) -> np.ndarray:
    """Everybody's `values`, [processes, ...], bit for bit; a small array of numbers, of one shape in all processes.

    One process gets `values[None]`. Collective; nothing is compiled and no device waits.

    Raises:
      ValueError: shapes or dtypes differ between processes, or the values are no numbers.
    """
    values = np.asarray(values)
    parts = [_unpack(part) for part in _gather("exchange", _pack(values))]
    kinds = {(part.shape, part.dtype) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"exchange: the processes have different shapes or dtypes: {sorted(map(str, kinds))}")
    return np.stack(parts)


def agree(flag: bool) -> bool:
    """True if any process says True. Collective."""
    return any(part == b"1" for part in _gather("agree", b"1" if flag else b"0"))


def broadcast(values: Any) -> np.ndarray:
    """The owner's `values`, bit for bit; what the others pass is ignored (None will do). Collective."""
    return _unpack(_gather("broadcast", _pack(np.asarray(values)) if is_owner() else b"")[0])


def gather(payload: bytes) -> list[bytes]:
    """Everybody's bytes, in the processes' order; lengths may differ. Collective."""
    sizes = exchange(np.array(len(payload))).tolist()
    parts = [b""] * len(sizes)
    for at in range(0, max(sizes), _PIECE):
        pieces = _gather("gather", payload[at : at + _PIECE])
        parts = [part + piece for part, piece in zip(parts, pieces, strict=True)]
    return parts


def by_owner(act: Callable[[], _Value], where: str) -> _Value | None:
    """What `act` gives in process 0; None in the others. Collective.

    Raises:
      InputError: it did there; `where`, for the others' messages, is what it was about.
    """
    given = refused = None
    if is_owner():
        try:
            given = act()
        except InputError as error:
            refused = error
    if agree(refused is not None):
        raise refused or InputError(f"process 0 refuses {where}, and says why")
    return given


def by_host(act: Callable[[], _Value], where: str) -> _Value:
    """What `act` gives in this process. One process of each host does it first, and the others find its work done.
    Collective.

    Raises:
      InputError: it did in some process; `where` is as in `by_owner`.
    """
    hosts = _gather("by_host", socket.gethostname().encode())
    first = hosts.index(hosts[process_id()]) == process_id()
    given: list[_Value] = []
    for turn in (True, False):
        refused = None
        if turn == first:
            try:
                given.append(act())
            except InputError as error:
                refused = error
        if agree(refused is not None):
            raise refused or InputError(f"another process refuses {where}, and says why")
    return given[0]


def barrier(name: str) -> None:
    """Waits until every process has come here. Collective; raises RuntimeError where one waits at another name."""
    _gather(f"barrier {name}", b"")


def _state():
    """JAX's process-wide state: ids without a backend, and the coordination service's client.

    No public name gives either before the backend starts; orbax reaches for the same one. All use of it is in here.
    """
    return jax_distributed.global_state


def _gather(kind: str, payload: bytes) -> list[bytes]:
    """Payloads of all processes in their order. `kind` has to be the same in all of them.

    Raises:
      RuntimeError: the processes aren't doing the same thing; better than waiting for each other for ever.
    """
    state = _state()
    if state.num_processes == 1:
        return [payload]
    with _lock:
        turn = next(_turns)
        folder = f"capcur_jax/{turn}"
        state.client.key_value_set_bytes(f"{folder}/{state.process_id}", kind.encode() + b"\0" + payload)
        state.client.wait_at_barrier(folder, _WAIT_S * 1000)
        found = {
            int(key.rpartition("/")[2]): value.split(b"\0", 1)
            for key, value in state.client.key_value_dir_get_bytes(folder)
        }
        if state.process_id == 0 and turn:  # everybody is past reading the turn before
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # a little memory, no reason to end a run
                state.client.key_value_delete(f"capcur_jax/{turn - 1}")
    kinds = {process: found[process][0].decode() for process in sorted(found)}
    if set(kinds.values()) != {kind}:
        raise RuntimeError(f"the processes have lost step with each other; they are at {kinds}")
    return [found[process][1] for process in range(state.num_processes)]


def _pack(values: np.ndarray) -> bytes:
    if values.dtype.kind not in "biufc":
        raise ValueError(f"only arrays of numbers can be sent to other processes, not {values.dtype}")
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _unpack(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)
