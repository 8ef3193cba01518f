"""The letters of axes, one meaning each, and the check of the shapes that public functions declare with them.

    A  rows of any kind, for what treats them alike (attention's, a softmax's); packed rows
    B  prompts of a batch
    C  slots that the local engine decodes in
    D  width of the residual stream
    F  merged features of images
    G  responses of a prompt
    H  dimension of a head
    I  images of a row of patches
    J  rows of patches, in which images lie
    K  heads of keys and values
    L  layers
    M  segments of tokens, that a kernel computes by themselves
    N  heads of queries
    P  patches of a row of patches
    R  responses: G of each of the B prompts, row r of prompt r // G
    S  keys: the tokens that a query may look at, or places of a cache
    T  tokens of a row: prompt, response, or queries
    V  vocabulary
    W  tokens of a packed row

A name ends with its axes (`q_AxTxNxH`), an annotation has them in a string (`Float[Array, "A T N H"]`). Letters that a
few lines define for themselves (a block, a window) are theirs alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key, jaxtyped

__all__ = ["Array", "Bool", "Float", "Int", "Key", "checked"]

Array = jax.Array | np.ndarray
Function = TypeVar("Function", bound=Callable)


def checked(function: Function) -> Function:
    """Checks shapes and types of arguments and result at each call, where CAPCUR_CHECK_SHAPES is set: in the tests.

    Of a jitted function that is once a program, when it is traced. Raises jaxtyping.TypeCheckError.
    """
    if not os.environ.get("CAPCUR_CHECK_SHAPES"):
        return function
    from beartype import BeartypeConf, beartype  # of the extra `test`

    return jaxtyped(function, typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))
