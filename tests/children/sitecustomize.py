"""Python reads this when a process starts that has this folder on its path: those that tests start (../environment.py).

They don't find PyTorch, as in an environment without the extra `test`: transformers would import it whole, 4 of the 11
seconds of processor time that a tiny run takes.
"""

import importlib.machinery
import os
import sys

HIDDEN = set()
_found = importlib.machinery.PathFinder.find_spec


def _find(_, name, path=None, target=None):
    return None if name in HIDDEN else _found(name, path, target)


if os.environ.get("CAPCUR_TESTS") == sys.prefix:  # and not another environment's Python, such as the one of SGLang
    HIDDEN.add("torch")
    # As it was, a method of the class: pytest keeps it as an attribute of a class of its own.
    importlib.machinery.PathFinder.find_spec = classmethod(_find)
