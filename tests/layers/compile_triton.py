"""Compiles every Triton kernel for Hopper as the backend launches it, without a GPU; prints each one's name and the
number of its tensor-core instructions.
"""

from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from moepp.layers.experts import Affine
from moepp.layers.kernels import triton_experts, triton_kernels

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


class CompileOnly:
    """Stands for a kernel; a launch compiles it for the arguments' types and computes nothing."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, num_stages=3, **constants):
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | constants
        signature, constexprs, aligned = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constexprs[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], aligned[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32"
        options = {"num_warps": num_warps, "num_stages": num_stages}
        source = ASTSource(self.kernel, signature, constexprs, aligned)
        ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        print(self.kernel.__name__, ptx.count("wgmma.mma_async"))


def main():
    kernels = {name: CompileOnly(kernel) for name, kernel in vars(triton_kernels).items() if name.endswith("_kernel")}
    triton_experts.load_kernels = lambda w_in: SimpleNamespace(**kernels)
    experts, dim, hidden, tokens, top_k, constants = 4, 64, 128, 40, 2, 2
    w_in, w_out = torch.ones(experts, 2 * hidden, dim), torch.ones(experts, dim, hidden)
    x_TD, gate_TK, ids = torch.ones(tokens, dim), torch.ones(tokens, top_k), torch.zeros(tokens, top_k).long()
    leaves = [w_in.bfloat16(), w_out.bfloat16(), x_TD, gate_TK, torch.ones(tokens), torch.ones(tokens, constants)]
    leaves = [leaf.requires_grad_() for leaf in [*leaves, torch.ones(constants, dim)]]
    y_TD = triton_experts.dispatch(*leaves[:3], ids, leaves[3], Affine(*leaves[4:]))
    torch.autograd.grad(y_TD.sum(), leaves)


if __name__ == "__main__":
    main()
