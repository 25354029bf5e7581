"""Attention without padding and masks against MONAI's with both."""

import math

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask

from models import windows
from models.swinunetr import WindowAttention, _run_block
from models.windows import attend, attend_plainly, cut

CPU = torch.device("cpu")
# size, window, shift: windows that fit, are padded, are one along an axis, are mostly padding
MAPS = [
    ((6, 6, 3), (3, 3, 3), (0, 0, 0)),
    ((6, 6, 3), (3, 3, 3), (1, 1, 0)),
    ((5, 4, 7), (3, 3, 3), (0, 0, 0)),
    ((5, 4, 7), (3, 3, 3), (1, 1, 1)),
    ((9, 2, 4), (4, 2, 4), (2, 0, 0)),
    ((5, 8, 5), (4, 3, 4), (2, 1, 2)),
]


@pytest.mark.parametrize("size, window, shift", MAPS)
def test_a_block_is_monais(size, window, shift):
    """Window 4 at size 5, rolled by 2: padding on both sides of the seam."""
    torch.manual_seed(0)
    monai = SwinTransformerBlock(12, 3, window, shift).double()
    monai.attn.relative_position_bias_table.data.normal_()  # they start near 0, which would hide
    monai.attn.qkv.bias.data.normal_()  # mistakes
    ours = SwinTransformerBlock(12, 3, window, shift).double()
    ours.attn = WindowAttention(12, 3, window, qkv_bias=True).double()
    ours.load_state_dict(monai.state_dict())
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    tokens = x.detach().flatten(1, 3).requires_grad_()
    padded = [-(-n // w) * w for n, w in zip(size, window, strict=True)]
    expected = monai(x, compute_mask(padded, window, shift, CPU))
    out = _run_block(ours, tokens, cut(size, window, shift, CPU))
    torch.testing.assert_close(out, expected.flatten(1, 3))
    out.cos().sum().backward(), expected.cos().sum().backward()
    torch.testing.assert_close(tokens.grad, x.grad.flatten(1, 3))
    for (name, a), b in zip(ours.named_parameters(), monai.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("size, window, shift", MAPS)
def test_every_token_stands_in_one_window(size, window, shift):
    order, back, boxes = cut(size, window, shift, CPU)
    assert torch.equal(order.sort().values, torch.arange(math.prod(size)))
    assert torch.equal(order[back], torch.arange(math.prod(size)))
    assert sum(box.num_windows * len(box.places) for box in boxes) == math.prod(size)


def queries(dtype):
    torch.manual_seed(0)
    shapes = (2, 5, 6, 4), (2, 5, 7, 4), (2, 5, 7, 4), (2, 6, 7)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("num_scores", [1, 2 * 6 * 7, 2**17])  # in windows: 1, 2, all 5
def test_attention_in_chunks_is_the_plain_one(num_scores, monkeypatch):
    monkeypatch.setattr(windows, "NUM_SCORES", num_scores)
    ours, plain = queries(torch.float64), queries(torch.float64)
    out, expected = attend(*ours, 0.3), attend_plainly(*plain, 0.3)
    torch.testing.assert_close(out, expected)
    out.cos().sum().backward(), expected.cos().sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_attention_in_bf16_sums_the_gradient_of_the_bias_in_fp32(monkeypatch):
    monkeypatch.setattr(windows, "NUM_SCORES", 1)
    *half, bias = [x.detach().bfloat16().requires_grad_() for x in queries(torch.float32)]
    half.append(bias.detach().float().requires_grad_())
    exact = [x.detach().float().requires_grad_() for x in half]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*half, 0.3)
    expected = attend_plainly(*exact, 0.3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    out.sum().backward(), expected.sum().backward()
    assert half[-1].grad.dtype == torch.float32
    for a, b in zip(half, exact, strict=True):
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=0.05, atol=0.05)


def test_no_scores_are_held():
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.shape) or x, lambda x: x):
        attend(*queries(torch.float32), 0.3)
    assert sorted(held) == sorted(x.shape for x in queries(torch.float32))
