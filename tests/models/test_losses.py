"""The losses against plainly written loops of the published formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.losses import (
    TeacherTargets,
    dino_loss,
    koleo_loss,
    patch_loss,
    reconstruction_loss,
    sinkhorn_knopp,
)


@pytest.mark.parametrize("num_student", [2, 5])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("temps", [(0.04, 0.1), (0.07, 0.2)])
def test_dino_loss_is_the_papers_double_loop(num_student, batch_size, temps):
    teacher_temp, student_temp = temps
    torch.manual_seed(0)
    teacher = torch.randn(2, batch_size, 16)
    student = torch.randn(num_student, batch_size, 16)
    center = torch.randn(16)
    total, pairs = 0.0, 0
    for t in range(2):
        for s in range(num_student):
            if s == t:
                continue
            for b in range(batch_size):
                p = torch.softmax((teacher[t, b] - center) / teacher_temp, dim=0)
                q = torch.softmax(student[s, b] / student_temp, dim=0)
                total -= (p * q.log()).sum() / batch_size
            pairs += 1
    targets = TeacherTargets(16, "center")
    targets.center.copy_(center)
    p = targets(teacher.flatten(0, 1), teacher_temp).unflatten(0, (2, batch_size))
    torch.testing.assert_close(dino_loss(p, student, student_temp), total / pairs)


def test_uniform_outputs_give_ln_k():
    p = torch.full((2, 3, 32), 1 / 32)
    assert dino_loss(p, torch.zeros(4, 3, 32), 0.1).item() == pytest.approx(math.log(32), abs=1e-5)


def test_center_is_a_moving_average_moved_only_by_update():
    targets = TeacherTargets(4, "center", center_momentum=0.9)
    logits = torch.arange(8.0).reshape(2, 4)
    targets(logits, 0.04)
    assert targets.center.abs().sum() == 0
    targets.update_center()
    torch.testing.assert_close(targets.center, 0.1 * logits.mean(dim=0))
    targets(logits + 100, 0.04)
    targets.forget()
    targets(logits, 0.04)
    targets.update_center()
    torch.testing.assert_close(targets.center, 0.19 * logits.mean(dim=0))


def test_center_stays_where_no_position_was_masked():
    targets = TeacherTargets(4, "center")
    targets.center.fill_(3)
    targets(torch.zeros(0, 4), 0.04)
    targets.update_center()
    assert targets.center.eq(3).all()


def test_center_over_accumulated_batches_is_that_of_the_whole_batch():
    whole, parts = TeacherTargets(4, "center"), TeacherTargets(4, "center")
    logits = torch.randn(6, 4)
    whole(logits, 0.1)
    parts(logits[:2], 0.1), parts(logits[2:], 0.1)
    whole.update_center(), parts.update_center()
    torch.testing.assert_close(whole.center, parts.center)


def test_sinkhorn_is_the_published_algorithm():
    """Against DINOv2's algorithm (prototypes as rows) in numpy, float64."""
    rng = np.random.default_rng(0)
    logits, temp = rng.uniform(-1, 1, (12, 8)), 0.07
    q = np.exp(logits / temp).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(axis=1, keepdims=True)
        q /= q.shape[0]
        q /= q.sum(axis=0, keepdims=True)
        q /= q.shape[1]
    expected = (q * q.shape[1]).T
    result = sinkhorn_knopp(torch.from_numpy(logits).float(), temp)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.sum(dim=1).numpy(), 1, rtol=1e-5)


def test_sinkhorn_uses_prototypes_equally_and_survives_large_and_no_logits():
    q = sinkhorn_knopp(torch.randn(64, 4), 0.5, num_iterations=50)
    np.testing.assert_allclose(q.sum(dim=0).numpy(), 16, rtol=1e-3)
    assert torch.isfinite(sinkhorn_knopp(torch.randn(6, 4) * 1000, 0.04)).all()
    assert sinkhorn_knopp(torch.empty(0, 4), 0.04).shape == (0, 4)


def test_patch_loss_weighs_crops_equally():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    logits, targets = torch.randn(4, 8), torch.softmax(torch.randn(4, 8), dim=-1)
    ce = [-(targets[i] * F.log_softmax(logits[i] / 0.1, dim=0)).sum() for i in range(4)]
    expected = (sum(ce[:3]) / 3 + ce[3]) / 2  # the second crop has no mask
    positions = torch.tensor([0, 1, 3, 9])
    torch.testing.assert_close(patch_loss(targets, logits, mask, positions, 0.1), expected)


def test_patch_loss_without_masks_is_zero_with_a_gradient():
    logits = torch.zeros(0, 8, requires_grad=True)
    mask = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    loss = patch_loss(torch.zeros(0, 8), logits, *mask, 0.1)
    loss.backward()
    assert loss.item() == 0


def test_reconstruction_is_the_error_of_hidden_voxels_alone_and_weighs_crops_equally():
    torch.manual_seed(0)
    images, output = torch.rand(3, 1, 4, 4, 4), torch.randn(3, 1, 4, 4, 4)
    hidden = torch.zeros(3, 1, 4, 4, 4, dtype=torch.bool)
    hidden[0, 0, :2], hidden[2, 0, 1, 1, 1] = True, True  # nothing of the second
    errors = []
    for i in (0, 2):
        x, where = images[i].double().numpy(), hidden[i].numpy()
        target = (x - x.mean()) / x.std(ddof=1)
        errors.append(((output[i].double().numpy() - target)[where] ** 2).mean())
    expected = torch.tensor(sum(errors) / 2, dtype=torch.float32)
    torch.testing.assert_close(reconstruction_loss(output, images, hidden), expected)


def test_reconstruction_of_several_channels_is_of_those_that_are_there():
    torch.manual_seed(0)
    images, output = torch.rand(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4)
    images[0, 1], images[1, :2] = 0, 0  # missing or dropped
    hidden = torch.zeros(2, 1, 4, 4, 4, dtype=torch.bool)
    hidden[:, :, 1:3] = True
    alone = [
        [
            reconstruction_loss(output[i : i + 1, [c]], images[i : i + 1, [c]], hidden[:1])
            for c in there
        ]
        for i, there in enumerate(([0, 2], [2]))
    ]
    expected = (sum(alone[0]) / 2 + alone[1][0]) / 2
    torch.testing.assert_close(reconstruction_loss(output, images, hidden), expected)


def test_reconstruction_of_air_is_easy_and_without_masks_zero_with_a_gradient():
    output = torch.zeros(2, 1, 4, 4, 4, requires_grad=True)
    air = 1e-4 * torch.randn(2, 1, 4, 4, 4)
    assert reconstruction_loss(output, air, torch.ones_like(air, dtype=torch.bool)) < 1e-3
    loss = reconstruction_loss(output, air, torch.zeros_like(air, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and output.grad is not None


def test_koleo_is_minus_log_distance_to_the_nearest_other():
    x = F.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    distances = torch.cdist(x, x) + 10 * torch.eye(5)
    expected = -distances.min(dim=1).values.log().mean()
    torch.testing.assert_close(koleo_loss(x), expected, rtol=1e-4, atol=1e-4)
    assert koleo_loss(x[:1]) == 0, "one sample has no neighbour"


def test_losses_are_in_fp32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = TeacherTargets(8, "center")(torch.randn(4, 8).bfloat16(), 0.04)
        loss = dino_loss(p.unflatten(0, (2, 2)), torch.randn(2, 2, 8).bfloat16(), 0.1)
    assert p.dtype == loss.dtype == torch.float32
