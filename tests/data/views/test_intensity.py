"""Intensity changes against their formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from data.views.intensity import (
    MIN_WINDOW_HU,
    PROB_BLUR,
    PROB_GAMMA,
    PROB_NOISE,
    SOFT_TISSUE_HU,
    IntensitySettings,
    apply_intensity,
    blur,
    lower_resolution,
    normalise,
    random_window,
    sample_intensity,
)

SETTINGS = IntensitySettings(
    scale=0.2, shift=0.1, gamma=(0.5, 2.0), noise=0.05, blur=1.0, window_prob=0.3
)
UNCHANGED = {"gamma": 1.0, "scale": 1.0, "shift": 0.0, "blur": 0.0, "noise": 0.0}


def params(num, window=(-1000.0, 1000.0), **changes):
    values = {k: torch.full((num,), v) for k, v in (UNCHANGED | changes).items()}
    seeds = torch.arange(num, dtype=torch.int64)
    return values | {"window": torch.tensor([window] * num), "seed": seeds}


def apply(x, changes, scale=1.0, offset=0.0):
    n = len(x)
    return apply_intensity(x.clone(), torch.full((n,), scale), torch.full((n,), offset), changes)


@pytest.fixture
def hu():
    return torch.linspace(-1200, 1200, 2 * 6 * 5 * 4).view(2, 1, 6, 5, 4)


def test_normalise_maps_the_window_for_ct_and_keeps_0_to_1_for_the_rest():
    stored = torch.tensor([-3000, -1000, 0, 500, 3000], dtype=torch.int16)
    ct = normalise(stored, 1.0, 0.0, "CT", (-1000, 1000))
    torch.testing.assert_close(ct, torch.tensor([0, 0, 0.5, 0.75, 1.0]))
    mr = normalise(stored, 1e-3, 0.5, "other", (-1000, 1000))
    torch.testing.assert_close(mr, torch.tensor([0, 0, 0.5, 1.0, 1.0]))


def test_changes_follow_their_formulas(hu):
    base = ((hu + 1000) / 2000).clamp(0, 1)
    torch.testing.assert_close(apply(hu, params(2)), base)
    torch.testing.assert_close(apply(hu / 2 - 10, params(2), scale=2.0, offset=20.0), base)
    torch.testing.assert_close(
        apply(hu, params(2, window=(-160.0, 240.0))), ((hu + 160) / 400).clamp(0, 1)
    )
    torch.testing.assert_close(apply(hu, params(2, gamma=0.7)), base**0.7)
    torch.testing.assert_close(
        apply(hu, params(2, scale=1.2, shift=-0.1)), (base * 1.2 - 0.1).clamp(0, 1)
    )


def test_a_change_touches_only_the_views_it_was_drawn_for(hu):
    changes = params(2)
    for name, value in {"gamma": 0.5, "blur": 1.0, "noise": 0.1}.items():
        one = changes | {name: torch.tensor([UNCHANGED[name], value])}
        got, plain = apply(hu, one), apply(hu, changes)
        assert torch.equal(got[0], plain[0]) and not torch.equal(got[1], plain[1])


def test_blur_is_scipys_gaussian():
    x = torch.rand(2, 1, 24, 22, 26)
    got = blur(x, torch.tensor([0.6, 1.3]))
    for i, sigma in enumerate((0.6, 1.3)):
        want = gaussian_filter(x[i, 0].double().numpy(), sigma, truncate=8)
        inside = (slice(6, -6),) * 3  # ours treats the border by renormalising, scipy by mirroring
        np.testing.assert_allclose(got[i, 0][inside], want[inside], atol=1e-5)
    torch.testing.assert_close(
        blur(torch.ones(1, 1, 5, 4, 3), torch.ones(1)), torch.ones(1, 1, 5, 4, 3)
    )


def test_noise_has_its_standard_deviation_and_depends_on_its_seed_alone():
    x = torch.zeros(3, 1, 20, 20, 20)  # HU 0 is 0.5
    changes = params(3, noise=0.05) | {"seed": torch.tensor([7, 8, 7])}
    state = torch.random.get_rng_state()
    got = apply(x, changes)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert abs(float((got - 0.5).std()) - 0.05) < 0.002 and abs(float(got.mean()) - 0.5) < 0.002
    assert torch.equal(got[0], got[2]) and not torch.equal(got[0], got[1])
    alone = apply(x[:1], {k: v[:1] for k, v in changes.items()})
    assert torch.equal(alone[0], got[0])


@pytest.mark.parametrize("full", [(-1000, 1000), (-160, 240), (0, 200), (200, 2000)])
def test_random_windows_lie_in_the_full_one_and_hold_soft_tissue(full):
    rng = np.random.default_rng(0)
    windows = np.array([random_window(rng, *full) for _ in range(500)])
    low, high = windows.T
    assert (low >= full[0] - 1e-6).all() and (high <= full[1] + 1e-6).all()
    assert (high - low >= min(MIN_WINDOW_HU, full[1] - full[0]) - 1e-6).all()
    if full[0] <= SOFT_TISSUE_HU:
        assert ((low <= SOFT_TISSUE_HU + 1e-6) & (high >= SOFT_TISSUE_HU - 1e-6)).all()


def test_changes_are_drawn_as_often_and_as_large_as_stated():
    rng, num = np.random.default_rng(0), 4000
    drawn = {k: v.numpy() for k, v in sample_intensity(rng, num, "CT", SETTINGS).items()}
    for name, prob in (("gamma", PROB_GAMMA), ("blur", PROB_BLUR), ("noise", PROB_NOISE)):
        assert abs((drawn[name] != UNCHANGED[name]).mean() - prob) < 0.03
    assert 0.5 <= drawn["gamma"].min() < 0.55 and 1.9 < drawn["gamma"].max() <= 2
    assert 0.8 <= drawn["scale"].min() < 0.82 and 1.18 < drawn["scale"].max() <= 1.2 + 1e-6
    assert 0.09 < np.abs(drawn["shift"]).max() <= 0.1 + 1e-6
    assert 0.95 < drawn["blur"].max() <= 1 and 0.045 < drawn["noise"].max() <= 0.05
    narrower = (drawn["window"] != [-1000, 1000]).any(1)
    assert abs(narrower.mean() - 0.3) < 0.03
    assert len(np.unique(drawn["seed"])) == num


def test_only_ct_has_random_windows_and_zeros_switch_all_changes_off():
    drawn = sample_intensity(np.random.default_rng(0), 50, "other", SETTINGS)
    assert (drawn["window"] == torch.tensor([0.0, 1.0])).all()
    drawn = sample_intensity(np.random.default_rng(0), 50, "CT", IntensitySettings())
    for name, value in UNCHANGED.items():
        assert (drawn[name] == value).all(), name
    assert (drawn["window"] == torch.tensor([-1000.0, 1000.0])).all()


def test_lower_resolution_is_torch_pooling_and_interpolation():
    x = torch.randn(2, 1, 24, 12, 16, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([[2.0, 3.0, 4.0], [1.0, 1.0, 2.0]])
    got = lower_resolution(x, factors)
    for one, factor, out in zip(x, factors.int().tolist(), got, strict=True):
        want = F.avg_pool3d(one[None], factor)
        want = F.interpolate(want, scale_factor=[float(f) for f in factor], mode="trilinear")
        torch.testing.assert_close(out[None], want)
    torch.testing.assert_close(lower_resolution(x, torch.ones(2, 3)), x)


def test_lower_resolution_by_fractions_keeps_flat_images_and_removes_detail():
    x = torch.randn(1, 1, 23, 17, 19, generator=torch.Generator().manual_seed(0))
    spread = [
        lower_resolution(x, torch.full((1, 3), f)).std().item() for f in (1.0, 1.3, 1.9, 2.7, 30.0)
    ]
    assert spread == sorted(spread, reverse=True) and spread[-1] < 0.02
    flat = torch.full((1, 1, 23, 17, 19), 5.0)
    torch.testing.assert_close(lower_resolution(flat, torch.tensor([[1.7, 2.6, 40.0]])), flat)
