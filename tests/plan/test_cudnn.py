"""The workspace of cuDNN's backward pass, by the shapes of the calls in a compiled text."""

from capcur_jax.plan import cudnn

CALL = (
    '%x = (bf16[8,32,2048,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %v, %s), custom_call_target="__cudnn$fmhaSoftmax'
    'Backward", operand_layout_constraints={bf16[8,2048,32,128]{3,2,1,0}, bf16[8,2048,8,128]{3,2,1,0}, '
    "bf16[8,2048,8,128]{3,2,1,0}, f32[72,32,2048]{2,1,0}, s32[8,9]{1,0}}\n"
)
ALONE = CALL.replace("2048,8,128", "2048,32,128")


def test_the_largest_call_counts_and_grouped_heads_take_more():
    of_queries = 4 * 72 * 32 * 2048 * 129
    assert cudnn.workspace(ALONE) == of_queries
    assert cudnn.workspace(CALL) == of_queries + 4 * 72 * 32 * 2048 * 128
    assert cudnn.workspace(ALONE + CALL + ALONE) == cudnn.workspace(CALL)


def test_a_program_without_a_backward_pass_takes_none():
    assert cudnn.workspace(CALL.replace("Backward", "")) == 0
    assert cudnn.workspace("") == 0
