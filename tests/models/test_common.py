"""Fast layers against PyTorch's; convolutions in bfloat16 on a CPU against the same in float32;
groups of parameters.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.backbones import build_backbone
from models.common import Conv3d, InstanceNorm3d, parameter_groups, with_fast_layers

SMALL = {
    "resunet": {"features": [16, 32], "blocks": [1, 2]},
    "unet": {"feature_size": 8},
    "segresnet": {"feature_size": 16},
}


LAYERS = {
    "1x1x1": nn.Conv3d(3, 5, 1),
    "1x1x1 without bias": nn.Conv3d(3, 5, 1, bias=False),
    "1x1x1, strided": nn.Conv3d(3, 5, 1, stride=2),
    "1x1x1, in groups": nn.Conv3d(3, 3, 1, groups=3),
    "1x1x1, padded": nn.Conv3d(3, 5, 1, padding=1),
    "3x3x3": nn.Conv3d(3, 5, 3, padding=1),
    "norm": nn.InstanceNorm3d(3),
    "norm with weights": nn.InstanceNorm3d(3, affine=True),
    "norm that counts": nn.InstanceNorm3d(3, track_running_stats=True),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fast_layers_are_pytorchs(name, dtype):
    torch.manual_seed(0)
    plain = copy.deepcopy(LAYERS[name])
    for p in plain.parameters():  # those of a norm are 1 and 0, which would hide mistakes
        nn.init.normal_(p)
    plain = plain.double() if dtype == torch.float64 else plain
    fast = with_fast_layers(nn.Sequential(copy.deepcopy(plain)))[0]
    runs = []
    for layer in (plain, fast):
        x = torch.rand(2, 3, 6, 4, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = F.leaky_relu(layer(x), inplace=True)
        out.float().cos().sum().backward()
        runs.append([out, x.grad, *(p.grad for p in layer.parameters())])
    allowed = 1e-7 if dtype == torch.float64 else 2**-7  # another order of rounding
    for ours, expected in zip(*runs, strict=True):
        assert ours.dtype == expected.dtype
        assert (ours - expected).abs().max() <= allowed * expected.abs().max()
    assert fast.state_dict().keys() == plain.state_dict().keys()


def test_layers_are_fast_where_they_can_be():
    layers = with_fast_layers(nn.Sequential(*copy.deepcopy(list(LAYERS.values()))))
    assert [type(layer) for layer in layers] == [Conv3d] * 6 + [InstanceNorm3d] * 2 + [
        nn.InstanceNorm3d  # eval() would take its running statistics
    ]


def test_what_follows_a_norm_in_place_copies_nothing():
    out = with_fast_layers(nn.Sequential(nn.InstanceNorm3d(2)))(torch.rand(1, 2, 4, 4, 4) * 1)
    assert not out._is_view()


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_right_where_the_deepest_map_is_two_voxels_long(name):
    torch.manual_seed(0)
    network, gradients = build_backbone(name, **SMALL[name]), []
    x = torch.rand(1, 1, *[n * network.stride for n in (2, 2, 1)])
    for enabled in (False, True, True, True):
        network.zero_grad()
        # the memory that a wrong gradient would show
        junk = [torch.full((n,), float("nan")) for n in (10**3, 10**4, 10**5, 10**6)]
        del junk
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = network.decode(x, network.encode(x))
        (out.float() * torch.linspace(-1, 1, out.shape[-1])).mean().backward()
        gradients.append({key: p.grad.clone() for key, p in network.named_parameters()})
    expected, *others = gradients
    least = 1e-3 * max(grad.norm() for grad in expected.values())  # others are rounding
    for found in others:
        for key, grad in found.items():
            assert torch.isfinite(grad).all(), key
            assert grad.norm() < 3 * max(expected[key].norm(), least), key


def test_vectors_get_no_weight_decay():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    decayed, others = parameter_groups(model)
    assert [p.shape for p in decayed["params"]] == [model[0].weight.shape]
    assert len(others["params"]) == 3 and others["weight_decay"] == 0
