"""Which channels to keep, from scores: pure functions.

SparseLoRA (ICML 2025), section 3.2, with these corrections: under grouped queries, query head
`h` belongs to key head `h // group`; rotary positions turn channel d together with channel
d + head_dim / 2, so those are kept or left out together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kept(n: int, sparsity: float) -> int:
    """How many of `n` channels remain at a sparsity in [0, 1]; at least one."""
    return max(1, round(n * (1 - sparsity)))


def top(scores: Tensor, sparsity: float, block: int = 1) -> Tensor:
    """Indices of the highest scores (n,), ascending, int64; `block` neighbours stay together.

    A block that does not fill up (n no multiple of `block`) counts with what it has.
    """
    if block == 1:
        return scores.topk(kept(len(scores), sparsity), sorted=False).indices.sort().values
    blocks = torch.nn.functional.pad(scores, (0, -len(scores) % block)).view(-1, block).sum(1)
    first = top(blocks, sparsity) * block
    every = (first.unsqueeze(1) + torch.arange(block, device=scores.device)).flatten()
    return every[every < len(scores)]


def qk_channels(
    q: Tensor, k: Tensor, head_dim: int, sparsity: float, *, rotary: bool
) -> tuple[Tensor, Tensor]:
    """Output channels of the query and of the key projection to keep, by |q| |k|.

    Args:
        q: (heads * head_dim,) norms of the query channels over tokens.
        k: (kv_heads * head_dim,) the same of the keys.
        rotary: whether channels d and d + head_dim / 2 of a head are one pair.

    Returns:
        int64 indices into q and into k, ascending: of each chosen key channel, the same channel of
        every query head of its group.
    """
    k = k.view(-1, head_dim)
    q = q.view(len(k), -1, head_dim)  # (kv_heads, group, head_dim)
    score = (q * k.unsqueeze(1)).sum(1)
    if rotary:
        score = score.view(len(k), 2, -1).sum(1)
    units = score.shape[1]
    chosen = top(score.flatten(), sparsity)
    channel = (chosen % units).unsqueeze(0)
    if rotary:
        channel = torch.cat([channel, channel + units])
    return _of_heads(chosen // units, channel, head_dim, q.shape[1])


def vo_channels(v: Tensor, heads: int, head_dim: int, sparsity: float) -> tuple[Tensor, Tensor]:
    """Output channels of the value projection, and input channels of the output projection.

    Args:
        v: (kv_heads * head_dim,) norms of the value channels over tokens.

    Returns:
        int64 indices into v and into the heads * head_dim inputs of the output projection.
    """
    chosen = top(v, sparsity)
    channel = (chosen % head_dim).unsqueeze(0)
    return _of_heads(chosen // head_dim, channel, head_dim, heads * head_dim // len(v))[::-1]


def _of_heads(kv_head: Tensor, channel: Tensor, head_dim: int, group: int) -> tuple[Tensor, Tensor]:
    """Flat indices among all query heads, and among key heads, of `channel` (m, n) of `kv_head`."""
    members = torch.arange(group, device=channel.device).view(-1, 1, 1)
    of_queries = (kv_head * group + members) * head_dim + channel
    of_keys = kv_head * head_dim + channel
    return of_queries.flatten().sort().values, of_keys.flatten().sort().values
