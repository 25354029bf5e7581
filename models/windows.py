"""The windows of a Swin transformer without padding and masks, and attention within them.

Liu et al., https://arxiv.org/abs/2103.14030, pad a map until windows fit, and roll it by half a
window in every second block; a mask then hides from each other the tokens of a window that only the
roll has brought together. Most of that work is thrown away: of a map 16 tokens long in windows of 7
more than half is padding. Here only pairs of tokens that see each other are computed, with the same
result:

- Along an axis, windows cut where the mask cuts them are intervals of two or three kinds, so a map
  is made of boxes of equal windows: 8, or 27 if it is rolled. All windows of a box hold the same
  relative positions and share one bias.
- Padding is 0 where queries, keys and values are computed from it, so all its keys and values are
  those of the bias of that layer. What a window sees of it is one more key.
"""

from functools import lru_cache
from itertools import groupby, product
from typing import NamedTuple

import torch
import torch.nn.functional as F

NUM_SCORES = 2**18  # worked on at a time by each thread of a CPU, so that they stay in its cache


class Box(NamedTuple):
    """Equal windows. Places are counted within the whole window, row by row."""

    num_windows: int
    places: torch.Tensor  # (n,) of the tokens of every window
    padding: torch.Tensor  # (p,) of the padding that they see


class Windows(NamedTuple):
    """Where the N tokens of a map are, if they stand box by box and window by window."""

    order: torch.Tensor  # (N,) which token of the map is the first, the second, ...
    back: torch.Tensor  # (N,) the inverse
    boxes: list[Box]


class Intervals(NamedTuple):
    """Equal parts of windows along one axis."""

    tokens: list[list[int]]  # of each part
    places: list[int]  # of these tokens in the window
    padding: list[int]  # places of the padding that they see


@lru_cache(maxsize=64)
@torch.compiler.assume_constant_result
@torch.inference_mode(False)
def cut(size: tuple, window: tuple, shift: tuple, device: torch.device) -> Windows:
    """Cut a map of `size` tokens into windows, rolled by `shift`; all three along x, y, z."""
    ids = torch.arange(size[0] * size[1] * size[2]).view(size)
    places = torch.arange(window[0] * window[1] * window[2]).view(window)
    order, boxes = [], []
    for box in product(*(_cut_axis(*axis) for axis in zip(size, window, shift, strict=True))):
        tokens = [torch.tensor(part.tokens) for part in box]  # (windows, length) of each axis
        shape = [length for axis in tokens for length in axis.shape]
        windows = ids[_mesh([axis.flatten() for axis in tokens])].view(shape)
        windows = windows.permute(0, 2, 4, 1, 3, 5)  # windows along x, y, z, and their tokens
        x, y, z = windows.shape[3:]
        seen = places[_mesh([torch.tensor(part.places + part.padding) for part in box])]
        inside, padding = seen[:x, :y, :z].flatten(), (seen[x:], seen[:x, y:], seen[:x, :y, z:])
        padding = torch.cat([part.flatten() for part in padding])
        order.append(windows.flatten())
        boxes.append(Box(len(order[-1]) // len(inside), inside.to(device), padding.to(device)))
    order = torch.cat(order)
    return Windows(order.to(device), order.argsort().to(device), boxes)


def _cut_axis(size, window, shift):
    """Cut one axis into parts of windows that see each other; equal neighbours are one item."""
    padded = -(-size // window) * window
    parts = []
    for start in range(0, padded, window):
        for wrapped in (False, True):  # the last window holds both ends of a rolled axis
            at = [i for i in range(window) if (start + i + shift >= padded) == wrapped]
            tokens = [(start + i + shift) % padded for i in at]
            real = [(token, i) for token, i in zip(tokens, at, strict=True) if token < size]
            padding = [i for token, i in zip(tokens, at, strict=True) if token >= size]
            if real:
                parts.append(([token for token, _ in real], [i for _, i in real], padding))
    equal = [list(group) for _, group in groupby(parts, key=lambda part: part[1:])]
    return [Intervals([part[0] for part in group], *group[0][1:]) for group in equal]


def _mesh(axes):
    return torch.meshgrid(*axes, indexing="ij")


def reorder(x: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Return x[:, order] for a permutation and its inverse."""
    return _Reorder.apply(x, order, back)


class _Reorder(torch.autograd.Function):
    """Its gradient is a permutation too; that of indexing would add up, which is slow."""

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(back)
        return x[:, order]

    @staticmethod
    def backward(ctx, grad):
        return grad[:, ctx.saved_tensors[0]], None, None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return softmax(scale q k^T + bias) v.

    Args:
        q: (heads, W, n, d). k, v: (heads, W, m, d). bias: (heads, n, m), the same in all W windows.
    """
    if q.device.type == "cpu" and not torch.compiler.is_compiling():  # that would unroll the loop
        return _ChunkedAttention.apply(q, k, v, bias, scale)
    return attend_plainly(q, k, v, bias, scale)


def attend_plainly(q, k, v, bias, scale):
    mask = bias.to(q.dtype)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class _ChunkedAttention(torch.autograd.Function):
    """Attention whose backward pass computes the scores again, a few windows of a head at a time.

    So they stay in the cache and are never held. torch's fused kernel for CPUs, which is the
    forward pass here, does the same, but has no gradient for the bias.
    """

    @staticmethod
    def forward(ctx, queries, keys, values, bias, scale):
        ctx.save_for_backward(queries, keys, values, bias)
        ctx.scale = scale
        bias = bias.detach()  # torch's fused kernel refuses one that may need a gradient, even here
        return attend_plainly(queries, keys, values, bias, scale)

    @staticmethod
    def backward(ctx, grad):
        *qkv, bias = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv]
        bias_grad = torch.zeros_like(bias)
        for b, b_grad, *head in zip(bias, bias_grad, *qkv, grad, *grads, strict=True):
            for q, k, v, out_grad, q_grad, k_grad, v_grad in _chunks(b, *head):
                p = torch.baddbmm(b.to(q.dtype), q, k.transpose(1, 2), alpha=ctx.scale)
                p = torch.softmax(p, -1, out=p)
                p_grad = torch.bmm(out_grad, v.transpose(1, 2))
                how = {"dim": -1, "input_dtype": p.dtype, "grad_input": p_grad}
                scores_grad = torch._softmax_backward_data(p_grad, p, **how)
                b_grad += scores_grad[0] if len(q) == 1 else scores_grad.sum(0)
                torch.bmm(scores_grad, k, out=q_grad)
                torch.bmm(scores_grad.transpose(1, 2), q, out=k_grad)
                torch.bmm(p.transpose(1, 2), out_grad, out=v_grad)
        return grads[0].mul_(ctx.scale), grads[1].mul_(ctx.scale), grads[2], bias_grad, None


def _chunks(bias, *tensors):
    """Yield (windows, ., d) of all tensors of a head, whose bias is (n, m), for a few windows."""
    count = max(1, NUM_SCORES * torch.get_num_threads() // bias.numel())
    return zip(*(x.split(count) for x in tensors), strict=True)
