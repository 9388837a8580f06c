"""A chunk's loss and its gradient in one Triton kernel, which writes the gradient over the logits: three passes over
them, where torch takes nine, most in float32. Importing this module needs the package `triton`.

Shape suffixes: C tokens of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits at a time, of one token


def loss_and_gradient_(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """The nats of the targets, [C] in float32, and the gradient of their sum, in the logits' memory. Every target
    counts; one that is no id of the vocabulary makes its nats no number.
    """
    rows, vocabulary = logits_CV.shape
    nats_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    loss_and_gradient_kernel[(rows,)](logits_CV, target_C.contiguous(), nats_C, V=vocabulary, BLOCK=block, num_warps=8)
    return nats_C, logits_CV


@triton.jit
def loss_and_gradient_kernel(logits_CV, target_C, nats_C, V: tl.constexpr, BLOCK: tl.constexpr):
    """nats = log sum exp(logits) - the target's; logits become softmax(logits) - 1 at the target."""
    row = tl.program_id(0).to(tl.int64)
    logits_V, target = logits_CV + row * V, tl.load(target_C + row)
    known = (target >= 0) & (target < V)
    wanted = tl.load(logits_V + target, mask=known, other=float("nan")).to(tl.float32)
    highest, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_V + v, mask=v < V, other=float("-inf")).to(tl.float32)
        before, highest = highest, tl.maximum(highest, tl.max(logits, 0))
        total = total * tl.exp(before - highest) + tl.sum(tl.exp(logits - highest), 0)
    log_total = highest + tl.log(total)
    tl.store(nats_C + row, log_total - wanted)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_V + v, mask=v < V, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(logits - log_total) - tl.where(v == target, 1.0, 0.0)
        tl.store(logits_V + v, gradient.to(logits_CV.dtype.element_ty), mask=v < V)
