"""Errors that the user can mend, and those of rollout servers."""


class InputError(Exception):
    """A file, a checkpoint or a config value can't be used. The message names it and the remedy; main prints that
    alone, without a traceback."""


class RolloutError(RuntimeError):
    """No engine can answer any more: every retry and every restart was used up. Names the server and its log."""
