import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.backbones import build_backbone
from models.dino import (
    POOLINGS,
    BatchNorm,
    DINOHead,
    DINONetwork,
    Mask,
    Prototypes,
    random_masks,
    update_teacher,
)
from models.losses import TeacherTargets, dino_loss, koleo_loss, patch_loss
from tests.conftest import equal
from utils.training import collapse

aten = torch.ops.aten


class TinyBackbone(torch.nn.Module):
    """Two maps at strides 1 and 2."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Conv3d(1, 4, 3, 1, 1), torch.nn.Conv3d(4, 6, 2, 2)

    def encode(self, x):
        fine = self.one(x).relu()
        return [fine, self.two(fine)]


def tiny_network(batchnorm=True):
    torch.manual_seed(0)
    heads = [DINOHead(6, 16, hidden=8, bottleneck=4, batchnorm=batchnorm) for _ in range(2)]
    return DINONetwork(TinyBackbone(), "max", heads[0], heads[1], patch_level=1)


def test_batchnorm_agrees_with_torch():
    ours, theirs = BatchNorm(5), torch.nn.BatchNorm1d(5, affine=False)
    for _ in range(3):
        x = torch.randn(7, 5) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_batchnorm_learns_nothing_from_no_samples():
    norm = BatchNorm(5)
    norm(torch.randn(7, 5) * 3 + 1)
    before = copy.deepcopy(norm.state_dict())
    norm(torch.zeros(0, 5))
    assert equal(norm.state_dict(), before)


def test_prototypes_agree_with_torchs_weight_norm():
    ours = Prototypes(4, 6, fixed_length=False)
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 6, bias=False))
    with torch.no_grad():
        ours.length.uniform_(0.5, 2)
        theirs.parametrizations.weight.original0.copy_(ours.length)
        theirs.parametrizations.weight.original1.copy_(ours.direction)
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), theirs(x))


def test_head_outputs_cosines():
    head = DINOHead(6, 16, hidden=8, bottleneck=4)
    logits = head(torch.randn(10, 6) * 100)
    assert logits.abs().max() <= 1 + 1e-5
    x = F.normalize(head.mlp(torch.randn(2, 6)).float(), dim=-1)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_give_one_vector_per_sample(pooling):
    x = torch.rand(2, 3, 4, 5, 6)
    assert POOLINGS[pooling](x).shape == (2, 6 if pooling == "meanmax" else 3)


def test_gem_lies_between_mean_and_max():
    x = torch.rand(2, 3, 4, 4, 4)
    gem = POOLINGS["gem"](x)
    assert (gem >= x.mean(dim=(2, 3, 4))).all() and (gem <= x.amax(dim=(2, 3, 4))).all()


def test_teacher_shares_no_storage_and_follows_the_moving_average():
    student = tiny_network()
    teacher = copy.deepcopy(student)
    own = {p.data_ptr() for p in student.state_dict().values()}
    assert own.isdisjoint(p.data_ptr() for p in teacher.state_dict().values())
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    update_teacher(teacher, student, 0.9)
    for b, t in zip(before, teacher.parameters(), strict=True):
        torch.testing.assert_close(t, b + 0.1)
    assert all(not t.requires_grad or t.grad is None for t in teacher.parameters())


def test_output_shapes_and_order():
    network = tiny_network().eval()
    glob, local = torch.rand(4, 1, 8, 8, 8), torch.rand(6, 1, 4, 4, 4)
    mask = torch.zeros(4, 4, 4, 4, dtype=torch.bool)
    mask[0, 1, 2, 3] = mask[2, 0, 0, 0] = True
    out = network(glob, local, mask=Mask.of(mask))
    assert out["pooled"].shape == (10, 6)
    assert out["logits"].shape == (10, 16)
    torch.testing.assert_close(out["pooled"][4:], network(local)["pooled"])
    features = network.backbone.encode(glob)[1]
    positions = torch.stack([features[0, :, 1, 2, 3], features[2, :, 0, 0, 0]])
    torch.testing.assert_close(out["patch_logits"], network.patch_head(positions))


def test_hidden_voxels_do_not_reach_the_student_but_the_teacher_sees_them():
    network = tiny_network().eval()
    mask = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    mask[0, 1, 2, 3] = True
    a = torch.rand(1, 1, 8, 8, 8)
    b = a.clone()
    b[:, :, 2:4, 4:6, 6:8] += 1  # exactly the voxels of that position
    hidden = [network(x, mask=Mask.of(mask), hide=True)["patch_logits"] for x in (a, b)]
    torch.testing.assert_close(*hidden)
    seen = [network(x, mask=Mask.of(mask))["patch_logits"] for x in (a, b)]
    assert not torch.allclose(*seen)


@pytest.mark.parametrize("name", ["resunet", "swinunetr", "unet", "segresnet"])
def test_hidden_voxels_do_not_reach_the_reconstruction(name):
    """Neither by skips, nor by a decoder that looks at the image."""
    torch.manual_seed(0)
    options = {
        "resunet": {"features": [4, 8], "blocks": [1, 1]},
        "swinunetr": {"feature_size": 12},
        "unet": {"feature_size": 4},
        "segresnet": {"feature_size": 8, "blocks": [1, 1]},
    }
    backbone = build_backbone(name, **options[name])
    network = DINONetwork(backbone, "max", None, reconstructing=1).eval()
    side = 64 if name == "swinunetr" else 16
    x = torch.rand(1, 1, side, side, side)
    mask = torch.zeros(1, *network.backbone.encode(x)[0].shape[2:], dtype=torch.bool)
    mask[0, 2:6, 4:8, 4:8] = True
    out = network(x, mask=Mask.of(mask), hide=True)
    assert out["hidden"].shape == out["reconstruction"].shape == x.shape
    assert torch.equal(out["hidden"], F.interpolate(mask[:, None].float(), x.shape[2:]) > 0)
    other = network(x + out["hidden"], mask=Mask.of(mask), hide=True)
    torch.testing.assert_close(other["reconstruction"], out["reconstruction"])
    other = network(x + ~out["hidden"] * torch.rand_like(x), mask=Mask.of(mask), hide=True)
    assert not torch.allclose(other["reconstruction"], out["reconstruction"], atol=1e-3)
    assert "logits" not in out and "reconstruction" not in network(x, mask=Mask.of(mask))


def test_every_parameter_gets_a_gradient_even_without_a_masked_crop():
    network = tiny_network()
    mask = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    out = network(
        torch.rand(2, 1, 8, 8, 8), torch.rand(2, 1, 4, 4, 4), mask=Mask.of(mask), hide=True
    )
    (out["logits"].sum() + out["patch_logits"].sum()).backward()
    assert all(p.grad is not None for p in network.parameters())


class Waits(TorchDispatchMode):
    """Note the operations for which the CPU would wait if the tensors were on a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func.overloadpacket in (aten.index, aten.index_put_) else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        if by_mask or func.overloadpacket in (aten.nonzero, aten._local_scalar_dense, aten.equal):
            self.seen.append(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
def test_nothing_of_a_step_waits_for_the_device(centering):
    student = tiny_network()
    teacher = copy.deepcopy(student).requires_grad_(False)
    targets = [TeacherTargets(16, centering) for _ in range(2)]
    grid = torch.zeros(4, 4, 4, 4, dtype=torch.bool)
    grid[0, 1, 2, 3] = grid[2, 0, 0, 0] = True
    mask, globals_ = Mask.of(grid), torch.rand(4, 1, 8, 8, 8)
    with Waits() as waits:
        t = teacher(globals_, mask=mask)
        s = student(globals_, torch.rand(6, 1, 4, 4, 4), mask=mask, hide=True)
        p = targets[0](t["logits"], 0.04).unflatten(0, (2, 2))
        loss = dino_loss(p, s["logits"].unflatten(0, (5, 2)), 0.1)
        where = mask.grid.flatten(1), mask.positions
        loss = loss + patch_loss(
            targets[1](t["patch_logits"], 0.04), s["patch_logits"], *where, 0.1
        )
        loss = loss + koleo_loss(s["pooled"][:2]) + collapse.usage(p.flatten(0, 1), True)
        loss.backward()
        update_teacher(teacher, student, 0.9)
        for target in targets:
            target.update_center()
    assert not waits.seen
    assert not any(x.requires_grad for x in t.values()), "the teacher keeps no graph"
    with Waits() as waits:
        globals_[grid[:, 0, 0, 0]], grid.any().item()
    assert len(waits.seen) == 2, "the test sees what it looks for"


def test_masks_hide_what_is_asked():
    rng = np.random.default_rng(0)
    masks = random_masks(rng, 400, (6, 6, 4), prob=0.5, ratio=(0.2, 0.4)).flatten(1).float().mean(1)
    assert 0.4 < (masks > 0).float().mean() < 0.6
    hidden = masks[masks > 0]
    assert 0.15 < hidden.min() and hidden.max() < 0.5
    assert abs(hidden.mean() - 0.3) < 0.05
    again = random_masks(np.random.default_rng(0), 400, (6, 6, 4), 0.5, (0.2, 0.4))
    assert torch.equal(again.flatten(1).float().mean(1), masks)
