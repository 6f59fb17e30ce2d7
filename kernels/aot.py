"""Compile kernels ahead of time, without a GPU, and read what they take from the binary.

The launchers of `tinyft.kernels.gpu` are called with tensors that have no storage, while `dispatch`
records instead of launching: what is compiled is what ships, with its own block sizes and types.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyft.kernels.dispatch import recording

# Ampere server and consumer, Ada, Hopper, Blackwell consumer; RDNA 3.
TARGETS = {
    **{f"sm_{arch}": ("cuda", arch, 32) for arch in (80, 86, 89, 90, 120)},
    "gfx1100": ("hip", "gfx1100", 32),
}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one target; `spill_bytes` per thread, `shared_bytes` per program."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int


def compile_for(target: str, call: Callable[[], Any]) -> list[Usage]:
    """Compile for one of `TARGETS` every kernel that `call` launches, once a kernel and types.

    `call` uses launchers of `tinyft.kernels.gpu` on tensors of torch's `meta` device. Triton must
    not be in its interpreter (`TRITON_INTERPRET` when it is first imported).
    """
    import triton
    from triton.backends.compiler import GPUTarget

    with recording() as launches:
        call()
    found = {}
    for kernel, args, options in launches:
        source, options = _source(kernel, args, options)
        key = (kernel.__name__, str(source.signature), str(source.constants))
        if key not in found:
            compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
            found[key] = _usage(kernel.__name__, target, compiled)
    return list(found.values())


def _source(kernel: Any, args: tuple, options: dict) -> tuple[Any, dict]:
    """The kernel specialised as the just-in-time compiler would for these arguments."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in options.items() if name in kernel.arg_names}
    for at, name in enumerate(kernel.arg_names):
        value, parameter = values[name], kernel.params[at]
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name], aligned = "*" + _TYPES[value.dtype], True
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(at,)] = [["tt.divisibility", 16]]
    rest = {name: value for name, value in options.items() if name not in kernel.arg_names}
    return ASTSource(kernel, signature, constants, attributes), rest


def _usage(name: str, target: str, compiled: Any) -> Usage:
    read = _read_amd if target.startswith("gfx") else _read_cuda
    registers, spill_bytes = read(compiled)
    metadata = compiled.metadata
    return Usage(name, target, registers, spill_bytes, metadata.shared, metadata.num_warps)


def _read_cuda(compiled: Any) -> tuple[int, int]:
    """From `cuobjdump --dump-resource-usage`: a cubin's stack holds nothing but spills here."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    registers = re.search(r"REG:(\d+)", done.stdout)
    stack = re.search(r"STACK:(\d+)", done.stdout)
    local = re.search(r"LOCAL:(\d+)", done.stdout)
    return int(registers[1]), int(stack[1]) + int(local[1])


def _read_amd(compiled: Any) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return int(registers[1]), int(scratch[1])
