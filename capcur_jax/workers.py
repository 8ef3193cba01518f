"""Limits of resources that worker processes set on themselves before they touch what is untrusted."""

from __future__ import annotations

import math
import resource
import time


def limit(kind: int, value: int) -> None:
    """Sets a soft and hard resource limit, no higher than the hard limit already there."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def roll_cpu_limit(timeout_s: float) -> None:
    """Allows the next request its time of CPU: ends this process if the parent died and cannot."""
    soft = math.ceil(time.process_time() + timeout_s) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
