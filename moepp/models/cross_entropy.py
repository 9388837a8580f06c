"""The head and the loss together, by chunks of tokens: logits of a large batch never exist as a whole.

Up to WHOLE logits they do: F.cross_entropy on float32, which autograd differentiates. Above, and on GPUs always, each
chunk's gradient is made together with its loss, which costs no further product, and backward only scales it (Liger
Kernel, arXiv 2410.10989, section 3.2). Both multiply in autocast's dtype and take the softmax in at least float32.

Shape suffixes: T tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.layers.dispatch import compute_dtype
from moepp.layers.kernels.base import first_derivative_only, takes_triton

# Logits that may exist at once: 256 MiB in bfloat16, and 1 GiB more where torch takes their softmax. Every chunk reads
# and writes the head's float32 gradient, so fewer and larger ones are faster: of 2,048 tokens each (65,536 entries of
# width 768), that is predicted to take a fifth of the products' time (600 TFLOP/s, 2.8 TB/s), of 512 four fifths.
WHOLE = 2**27


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Mean cross-entropy of the logits x W^T, in nats; `target_T` int64. By chunks it can be differentiated once.

    Without gradients `target_scores` does the same for less.
    """
    chunks = chunk_count(x_TD, weight_VD)
    if chunks == 1 and not takes_triton(x_TD):
        return F.cross_entropy(widened(F.linear(x_TD, weight_VD)), target_T)
    return ChunkedCrossEntropy.apply(x_TD, weight_VD, target_T, chunks)


@torch.no_grad()
def target_scores(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """The nats of every target, and whether its logit is the largest (bool), both [T]. Without gradients."""
    nats, right = [], []
    chunks = chunk_count(x_TD, weight_VD)
    for x_CD, target_C in zip(x_TD.chunk(chunks), target_T.chunk(chunks), strict=True):
        logits_CV = widened(F.linear(x_CD, weight_VD))
        nats.append(F.cross_entropy(logits_CV, target_C, reduction="none"))
        right.append(is_largest(logits_CV, target_C))
    return torch.cat(nats), torch.cat(right)


def is_largest(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Whether the target's logit is the largest, the first of equal ones. A CPU finds the value of the largest in a
    tenth of the time that its place takes, so the place is looked for only where the target has that value; a GPU would
    have to wait to learn where.
    """
    if not logits_CV.is_cpu:
        return logits_CV.argmax(-1) == target_C
    right_C = logits_CV.gather(1, target_C[:, None]).squeeze(1) == logits_CV.amax(-1)
    reached_R = right_C.nonzero().squeeze(1)
    right_C[reached_R] = logits_CV[reached_R].argmax(-1) == target_C[reached_R]
    return right_C


def chunk_count(x_TD: Tensor, weight_VD: Tensor) -> int:
    return max(1, -(-len(x_TD) * len(weight_VD) // WHOLE))


def widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Keeps the gradients of both inputs, where they are wanted, in place of logits. The head's is summed over chunks
    in its own dtype.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, chunks: int) -> Tensor:
        dtype, nats, tokens = compute_dtype(x_TD), [], len(target_T)
        dx_TD = torch.empty_like(x_TD) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        differentiate = loss_and_gradient_in_place if takes_triton(x_TD) else loss_and_gradient
        with torch.autocast(x_TD.device.type, enabled=False):
            narrow_TD, narrow_VD, size = x_TD.to(dtype), weight_VD.to(dtype), max(1, -(-tokens // chunks))
            for chunk in (slice(start, start + size) for start in range(0, max(1, tokens), size)):
                x_CD = narrow_TD[chunk]
                nats_C, dlogits_CV = differentiate(F.linear(x_CD, narrow_VD), target_T[chunk])
                nats.append(nats_C)
                if dx_TD is not None:
                    dx_TD[chunk] = dlogits_CV @ narrow_VD
                if dweight_VD is not None:
                    dweight_VD += dlogits_CV.t() @ x_CD
                del dlogits_CV  # before the next chunk's logits
        ctx.save_for_backward(dx_TD, dweight_VD)
        ctx.tokens = tokens
        return torch.cat(nats).mean()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_TD, dweight_VD = ctx.saved_tensors
        share = grad / ctx.tokens  # here and not in the logits' gradient: float16 does not hold it for many tokens
        return (*(None if d is None else d * share for d in (dx_TD, dweight_VD)), None, None)


def loss_and_gradient(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """The nats of a chunk's targets, [C], and the gradient of their sum, in the logits' dtype."""
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    logp_CV = F.log_softmax(logits_CV, -1, dtype=wide)
    nats_C = -logp_CV.gather(1, target_C[:, None]).squeeze(1)
    dlogits_CV = logp_CV.exp_()
    dlogits_CV.scatter_add_(1, target_C[:, None], dlogits_CV.new_full((len(target_C), 1), -1.0))
    return nats_C, dlogits_CV.to(logits_CV.dtype)


def loss_and_gradient_in_place(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """The same on a GPU; the gradient takes the logits' place."""
    from moepp.models.triton_cross_entropy import loss_and_gradient_

    return loss_and_gradient_(logits_CV, target_C)
