"""Compiles every Triton kernel for Hopper as it is launched, with every tile it may be tuned to and at the
paper's 0.6B sizes, without a GPU. Prints kernel, tile, tensor-core instructions, shared memory and spilled bytes.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.autotuner import Autotuner

from moepp.layers.kernels import grouped, triton_affine, triton_experts, triton_kernels, triton_rows
from moepp.layers.kernels.base import Affine, RoutedTokens
from moepp.models import triton_cross_entropy

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
PTXAS = Path(triton.__file__).with_name("backends") / "nvidia/bin/ptxas"


class CompileOnly:
    """Stands for a kernel; a launch compiles it for the arguments' types and computes nothing."""

    def __init__(self, kernel):
        tuned = isinstance(kernel, Autotuner)
        self.kernel = kernel.fn if tuned else kernel
        self.tuner = kernel if tuned else None
        self.seen = set()

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=None, num_stages=None, **constants):
        for config in self.suited(args, constants):
            options = {"num_warps": num_warps or config.num_warps, "num_stages": num_stages or config.num_stages}
            self.compile(args, constants | config.kwargs, options)

    def suited(self, args, constants):
        if self.tuner is None:
            return [triton.Config({})]
        named = dict(zip(self.kernel.arg_names, args, strict=False))
        return self.tuner.early_config_prune(self.tuner.configs, named, **constants)

    def compile(self, args, constants, options):
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
        signature, constexprs, aligned = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constexprs[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], aligned[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        variant = str((signature, constexprs, options))
        if variant in self.seen:
            return
        self.seen.add(variant)
        compiled = compile(
            ASTSource(self.kernel, signature, constexprs, aligned), target=GPUTarget("cuda", 90, 32), options=options
        )
        tile = "x".join(str(value) for name, value in values.items() if name.startswith("BLOCK"))
        wgmma = compiled.asm["ptx"].count("wgmma.mma_async")
        print(self.kernel.__name__, tile, wgmma, compiled.metadata.shared, spilled_bytes(compiled.asm["ptx"]))


def spilled_bytes(ptx):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [PTXAS, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", report)[1])


def step(kernel):
    experts, dim, hidden, tokens, top_k, constants = 8, 768, 2048, 40, 2, 2
    w_in, w_out = torch.empty(experts, 2 * hidden, dim), torch.empty(experts, dim, hidden)
    x_TD, gate_TK, ids = torch.ones(tokens, dim), torch.ones(tokens, top_k), torch.zeros(tokens, top_k).long()
    leaves = [w_in.bfloat16(), w_out.bfloat16(), x_TD, gate_TK, torch.ones(tokens), torch.ones(tokens, constants)]
    leaves = [leaf.requires_grad_() for leaf in [*leaves, torch.ones(constants, dim)]]
    y_TD = kernel(*leaves[:2], RoutedTokens(leaves[2], ids, leaves[3], Affine(*leaves[4:])))
    torch.autograd.grad(y_TD.sum(), leaves)


def affine_step(dtype):
    gate_TK, expert_TK = torch.ones(40, 2), torch.zeros(40, 2).long()
    leaves = [torch.ones(40, 768, dtype=dtype), torch.ones(4, 768), gate_TK]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    ids = triton_affine.AffineIds(range(10, 11), range(8, 10))
    scale_T, mix_TC = triton_affine.AffineSums.apply(*leaves, expert_TK, ids)
    torch.autograd.grad(scale_T.sum() + mix_TC.sum(), leaves)


def loss_step(dtype):
    logits_CV, target_C = torch.zeros(2, 65536, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    triton_cross_entropy.loss_and_gradient_(logits_CV, target_C)


def main():
    loss = CompileOnly(triton_cross_entropy.loss_and_gradient_kernel)
    kernels = {name: CompileOnly(kernel) for name, kernel in vars(triton_kernels).items() if name.endswith("_kernel")}
    with (
        mock.patch.multiple(triton_kernels, **kernels),
        mock.patch.object(triton_cross_entropy, "loss_and_gradient_kernel", loss),
        mock.patch.object(triton_experts, "_refuse_unsupported", lambda weights: None),
        mock.patch.object(grouped, "_row_passes", lambda weights: triton_rows),
        mock.patch("torch.nn.functional.grouped_mm", lambda a, b, offs: torch.zeros(
            (len(a), b.shape[2]) if b.dim() == 3 else (len(offs), len(a), b.shape[1]), dtype=a.dtype
        )),
    ):  # fmt: skip
        step(triton_experts.dispatch)
        step(grouped.dispatch)
        for dtype in (torch.bfloat16, torch.float32):
            affine_step(dtype)
            loss_step(dtype)


if __name__ == "__main__":
    main()
