import math

import pytest
import torch

from utils.training import collapse

HEALTHY = {
    "epoch": 3,
    "loss": 8.0,
    "teacher_entropy": 4.0,
    "dino_loss": 5.0,
    "feature_std": 0.8,
    "target_usage": 5.5,
}


def test_entropy_of_uniform_and_certain_rows():
    assert collapse.entropy(torch.full((3, 16), 1 / 16)).item() == pytest.approx(math.log(16))
    assert collapse.entropy(torch.eye(4)).item() == pytest.approx(0)


def test_feature_std_is_one_for_isotropic_and_zero_for_equal_features():
    torch.manual_seed(0)
    assert collapse.feature_std(torch.randn(2000, 64)).item() == pytest.approx(1, abs=0.02)
    assert collapse.feature_std(torch.ones(10, 64)).item() == pytest.approx(0, abs=1e-6)


def test_rankme_counts_directions():
    torch.manual_seed(0)
    low_rank = torch.randn(200, 3) @ torch.randn(3, 50)
    assert 1 < collapse.rankme(low_rank) < 3.2
    assert collapse.rankme(torch.eye(20)) == pytest.approx(20, rel=0.01)


def test_a_healthy_run_is_not_warned_of():
    assert collapse.collapse_warnings(HEALTHY, HEALTHY, 1024, 64, 0) == {}


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"teacher_entropy": 6.92}, "uniform"),
        ({"dino_loss": 6.93}, "dino_loss"),
        ({"feature_std": 0.1}, "features"),
        ({"loss": 10.1}, "loss rises"),
        ({"teacher_entropy": 0.01, "target_usage": 0.02}, "point"),
        (
            {"patch_loss": 3.0, "patch_teacher_entropy": 4.15, "patch_target_usage": 4.1},
            "patch_uniform",
        ),
        (
            {"patch_loss": 0.1, "patch_teacher_entropy": 0.1, "patch_target_usage": 0.1},
            "patch_point",
        ),
    ],
)
def test_collapse_is_named(change, kind):
    assert list(collapse.collapse_warnings(HEALTHY | change, HEALTHY, 1024, 64, 0)) == [kind]


def test_a_high_loss_means_nothing_during_warmup():
    row = HEALTHY | {"dino_loss": 7.2}
    assert collapse.collapse_warnings(row, HEALTHY, 1024, 64, warmup_epochs=3) == {}


def test_usage_is_the_entropy_of_the_mean():
    assert collapse.usage(torch.eye(8), over_ranks=True).item() == pytest.approx(math.log(8))
    assert collapse.usage(torch.eye(8)[:1].expand(5, 8), True).item() == pytest.approx(0, abs=1e-6)
    assert collapse.usage(torch.zeros(0, 8), over_ranks=False).isnan()
