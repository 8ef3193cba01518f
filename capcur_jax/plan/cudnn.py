"""The memory that cuDNN takes for attention's backward pass, which no compiler without a card counts.

cuDNN plans its calls on the card, and XLA then gives each the workspace that it asks for. Its open frontend shows how
much that is (NVIDIA/cudnn-frontend, CompositeSDPABackwardNode): the queries' gradient in float32 while it is summed up,
a number a query, and the gradients of grouped keys and values for each head of queries.
"""

from __future__ import annotations

import re

_BACKWARD = re.compile(
    r'custom_call_target="__cudnn\$fmha\w*Backward", operand_layout_constraints=\{'
    r"\w+\[([\d,]+)\]\{[\d,]+\}, \w+\[([\d,]+)\]\{[\d,]+\}, \w+\[[\d,]+\]\{[\d,]+\}, f32\[([\d,]+)\]"
)


def workspace(text: str) -> int:
    """Bytes of the call that takes the most, in `compiled.as_text()`; calls follow one another. 0 without any."""
    most = 0
    for call in _BACKWARD.finditer(text):
        (*_, head), (_, keys, kv_heads, _), (segments, heads, queries) = (
            [int(size) for size in shape.split(",")] for shape in call.groups()
        )
        taken = 4 * segments * heads * queries * (head + 1)
        if kv_heads < heads:
            taken += 2 * 2 * segments * heads * keys * head
        most = max(most, taken)
    return most
