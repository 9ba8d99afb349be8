"""Compile all of Triton's kernels for a compute capability such as 90, and print the sizes of their code in bytes."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ovis_model.network import kernels_triton

BLOCKS = {"BLOCK": 4096, "HEADS": 64, "HALF": 64}


def main() -> None:
    kernels = {name: kernel for name, kernel in vars(kernels_triton).items() if name.endswith("_kernel")}
    capability = int(sys.argv[1])
    if capability < 89:
        del kernels["_quantize_kernel"]
    for kernel in kernels.values():
        print(compile_kernel(kernel, capability))


def compile_kernel(kernel: Any, capability: int) -> int:
    blocks = {name: size for name, size in BLOCKS.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in blocks else _find_type(name) for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=blocks)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
    return len(compiled.asm["cubin"])


def _find_type(name: str) -> str:
    special = {"values_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "eps": "fp32"}
    return special.get(name, "*bf16" if name.endswith("_ptr") else "i32")


if __name__ == "__main__":
    main()
