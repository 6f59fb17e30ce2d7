"""A projection's outputs, guessed from its largest singular vectors; made once, kept in a file.

SparseLoRA (ICML 2025), eq. 3: W' ~ A B with A = U sqrt(S) (in, rank) and B = sqrt(S) V' (rank,
out). The factors are float32 (the paper's are in 16 bits: half of very little).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)

_SAMPLE = 4096  # elements of a weight that tell it from others


@dataclass(frozen=True)
class Estimator:
    """`x W' + b` as `x A B + b`.

    Attributes:
        A: (in, rank). B: (rank, out). Both float32.
        bias: (out,) or None.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None = None

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), float32."""
        y = (x @ self.A.to(x.dtype)).float() @ self.B
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def norms(self, x: Tensor, counted: Tensor) -> Tensor:
        """Norm of each output channel over tokens, (out,) float32, without making the outputs.

        With z = x A, the square is b_c' (z'z) b_c for channel c; a bias is one more input, of 1.

        Args:
            x: (N, in).
            counted: (N, 1), 1 for tokens that count and 0 for others, dtype of x.
        """
        z = ((x @ self.A.to(x.dtype)) * counted).float()
        B = self.B
        if self.bias is not None:
            z, B = torch.cat([z, counted.float()], 1), torch.cat([B, self.bias.float()[None]])
        return ((z.t() @ z @ B) * B).sum(0).clamp(min=0).sqrt()


def side_by_side(parts: Sequence[Estimator]) -> Estimator:
    """One estimator of all outputs, in order, for projections of the same input: few operations on
    larger operands."""
    bias = None
    if any(part.bias is not None for part in parts):
        zeros = (part.B.new_zeros(part.B.shape[1]) for part in parts)
        pairs = zip(parts, zeros, strict=True)
        bias = torch.cat([zero if p.bias is None else p.bias.float() for p, zero in pairs])
    return Estimator(
        torch.cat([part.A for part in parts], 1), torch.block_diag(*(p.B for p in parts)), bias
    )


@torch.no_grad()
def decompose(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (in, rank) and B (rank, out), float32, of a `weight` (out, in): the best of this rank.

    Ranks far below the full one are found by a randomised range finder (Halko et al. 2011), always
    from the same seed.
    """
    weight = weight.float().t()
    if 8 * rank < min(weight.shape):
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            _generator(weight.device).manual_seed(0)
            U, S, V = torch.svd_lowrank(weight, q=rank + 8, niter=4)
    else:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        V = Vh.t()
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).contiguous(), (V[:, :rank] * root).t().contiguous()


def _generator(device: torch.device) -> torch.Generator:
    """What `device` draws from; `torch.manual_seed` would seed those of all devices."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


def estimators(
    weights: Mapping[str, Callable[[], Tensor]],
    biases: Mapping[str, Tensor | None],
    rank: int,
    cache: Path | None = None,
) -> dict[str, Estimator]:
    """An `Estimator` of each weight.

    Args:
        weights: `{name: a function that makes the dense weight (out, in)}`, called one at a time.
        biases: of the same names, (out,) or None.
        cache: folder of earlier results, found by name, rank and contents of the weights. One that
            cannot be written is passed over with a warning.
    """
    if cache is None:
        factors = {name: decompose(make(), rank) for name, make in weights.items()}
    else:
        path = cache / f"{_digest(weights, rank)}.safetensors"
        factors = _read(path)
        if factors is None:
            factors = {name: decompose(make(), rank) for name, make in weights.items()}
            _write(path, factors)
    devices = {name: make().device for name, make in weights.items()}
    return {
        name: Estimator(A.to(devices[name]), B.to(devices[name]), biases[name])
        for name, (A, B) in factors.items()
    }


def _digest(weights: Mapping[str, Callable[[], Tensor]], rank: int) -> str:
    found = hashlib.sha256(str(rank).encode())
    for name, make in weights.items():
        weight = make()
        sample = weight.flatten()[:: max(1, weight.numel() // _SAMPLE)].float().cpu().contiguous()
        found.update(f"{name} {tuple(weight.shape)}".encode())
        found.update(sample.numpy().tobytes())
    return found.hexdigest()[:32]


def _read(path: Path) -> dict[str, tuple[Tensor, Tensor]] | None:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None
    names = [name[:-2] for name in tensors if name.endswith(".A")]
    return {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}


def _write(path: Path, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    tensors = {}
    for name, (A, B) in factors.items():
        tensors |= {f"{name}.A": A.cpu(), f"{name}.B": B.cpu()}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        log.warning("The estimators could not be kept in %s: %s", path.parent, error)
