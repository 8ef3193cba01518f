"""Calls the user's reward function, in a process that its parent may kill at any time.

The program behind `function.Function`; its last argument is "module:function". Its requests and replies, one of
`workers.serve`'s lines each:

    parent: {"problems": [{"id": ...}, ...], "responses": ["...", ...]}
    worker: {"bytes": n}, then n bytes: the JSON that `function.answers` gives
"""

import json
import os
import sys
from typing import Any

from capcur_jax import workers
from capcur_jax.rewards import function

_called: list[function.RewardFunction] = []


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    try:
        problems = [function.from_json(fields) for fields in request["problems"]]
        found = function.answers(_called[0], problems, request["responses"])
    except MemoryError:
        os._exit(3)  # a fresh process is the only clean state; the parent counts the failure
    return {}, json.dumps(found).encode()


if __name__ == "__main__":
    workers.serve(_answer, lambda: _called.append(function.load(sys.argv[3])), trusted=True)
