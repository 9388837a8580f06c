"""Experts without rows, in every pass: grouped_mm's backward is reported to hang on them (pytorch issue 152668). In a
file of its own, so that it can be run first and be given up.
"""

import pytest
import torch
from test_kernels import ASSIGNMENTS, EXPERTS, assert_close, evaluate, make_case, on_gpu, reference

EMPTY = {
    "first": torch.tensor([[1, 2]]).repeat(40, 1),
    "last": torch.tensor([[0, 1]]).repeat(40, 1),
    "all but one": torch.tensor([[2, EXPERTS]]).repeat(40, 1),
    "all": ASSIGNMENTS["none to an FFN"],
}


@pytest.mark.parametrize("expert_TK", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("backend", [pytest.param(name, marks=on_gpu) for name in ("grouped", "triton")])
def test_experts_without_rows_give_values_and_zero_gradients(backend, expert_TK):
    case = make_case(expert_TK, "scale and vectors", torch.bfloat16, "cuda")
    assert_close(evaluate(backend, case, expert_TK), reference(case, expert_TK), torch.bfloat16)
