"""Convolutions in bfloat16 on a CPU against the same in float32; groups of parameters."""

import pytest
import torch
from torch import nn

from models.backbones import build_backbone
from models.common import parameter_groups

SMALL = {
    "resunet": {"features": [16, 32], "blocks": [1, 2]},
    "unet": {"feature_size": 8},
    "segresnet": {"feature_size": 16},
}


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
