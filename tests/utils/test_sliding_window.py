"""The sliding window: MONAI's answer, constant windows once, slabs, less memory, mirror images."""

import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from utils import sliding_window as module
from utils.sliding_window import averaged, mirrored, sliding_window, window_slabs

DEVICE = torch.device("cpu:0")  # is the CPU, but not known as such: batches, memory that runs out


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = nn.Conv3d(1, 6, 5, padding=2), nn.ReLU(), nn.Conv3d(6, 3, 3, padding=1)
    return nn.Sequential(*layers).eval()


def image_of(*shape):
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
    image[:, : shape[0] // 2] = 0.25  # constant windows among them
    return image


def monai(network, image, roi, overlap):
    with torch.no_grad():
        return sliding_window_inference(image[None], roi, 3, network, overlap, mode="gaussian")[0]


@pytest.mark.parametrize("overlap", [0.5, 0.3, 0])
@pytest.mark.parametrize(
    "shape, roi", [((40, 37, 21), (16, 12, 8)), ((9, 30, 10), (16, 12, 8)), ((5, 6, 7), (8, 9, 8))]
)
def test_same_as_monai(network, shape, roi, overlap):
    image = image_of(*shape)
    expected = monai(network, image, roi, overlap)
    assert torch.allclose(sliding_window(network, image, roi, overlap), expected, atol=1e-6)
    batched = sliding_window(network, image, roi, overlap, 4, device=DEVICE)
    assert torch.allclose(batched, expected, atol=1e-6)
    for axis in range(3):
        end, parts = 0, []
        for start, slab in window_slabs(network, image, roi, overlap, 3, axis, device=DEVICE):
            assert start == end and slab.shape[0] == 3
            end = start + slab.shape[1 + axis]
            parts.append(slab)
        assert len(parts) > 1 or shape[axis] <= roi[axis]
        assert torch.allclose(torch.cat(parts, 1 + axis), expected, atol=1e-6)


def test_padding_has_the_value_of_air(network):
    image = image_of(10, 10, 10)
    expected = monai(network, nn.functional.pad(image, [3] * 6, value=0.7), (16,) * 3, 0.5)
    found = sliding_window(network, image, (16,) * 3, background=0.7)
    assert torch.allclose(found, expected[:, 3:-3, 3:-3, 3:-3], atol=1e-6)


@pytest.mark.parametrize("device, largest", [(None, 1), (DEVICE, 4)])
def test_constant_windows_are_evaluated_once(network, device, largest):
    image = torch.rand(1, 64, 16, 16)
    image[:, :32], image[:, 40:56] = 0.0, 0.5
    batches = []

    def counted(x):
        batches.append(len(x))
        return network(x)

    found = sliding_window(counted, image, (8, 8, 8), 0.5, 4, device=device)
    # starts 0, 4, ..., 56 along x: 7 see only 0.0, 3 only 0.5; 3 x 3 windows at each
    assert sum(batches) == 5 * 9 + 2 and max(batches) == largest
    assert torch.allclose(found, monai(network, image, (8, 8, 8), 0.5), atol=1e-6)


def test_less_memory_is_used_when_it_runs_out(network, monkeypatch):
    """First smaller batches, then sums on the CPU; the answer stays."""
    image, said, sizes = image_of(24, 16, 16), [], []
    reserve = module._Sums._reserve

    def small_device(x):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return network(x)

    def no_room(self, channels, stop):
        if self.device != module.CPU and stop > 20:
            raise torch.OutOfMemoryError
        return reserve(self, channels, stop)

    monkeypatch.setattr(module._Sums, "_reserve", no_room)
    options = {"device": DEVICE, "log": said.append}
    slabs = list(window_slabs(small_device, image, (8,) * 3, 0.5, 8, 0, **options))
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2
    assert [text.rpartition(" ")[2] for text in said] == ["time", "time", "CPU"]
    assert slabs[-1][1].device == module.CPU
    found = torch.cat([slab for _, slab in slabs], 1)
    assert torch.allclose(found, monai(network, image, (8,) * 3, 0.5), atol=1e-6)


def test_a_network_that_fits_only_without_the_sums(network):
    """One window is too much as long as sums are on the device."""
    image, said = image_of(24, 16, 16), []

    def crowded(x):
        if not said or "CPU" not in said[-1]:
            raise torch.OutOfMemoryError
        return network(x)

    found = sliding_window(crowded, image, (8,) * 3, 0.5, 2, device=DEVICE, log=said.append)
    assert torch.allclose(found, monai(network, image, (8,) * 3, 0.5), atol=1e-6)


def test_too_little_memory_for_one_window_is_an_error():
    def hopeless(x):
        raise torch.OutOfMemoryError("too little")

    with pytest.raises(torch.OutOfMemoryError, match="too little"):
        sliding_window(hopeless, torch.rand(1, 16, 16, 16), (8,) * 3, 0.5, 4, device=DEVICE)


def test_low_precision_is_summed_in_full():
    image = image_of(24, 16, 16)
    rounded = sliding_window(lambda x: x.bfloat16(), image, (8,) * 3)
    assert rounded.dtype == torch.float32
    expected = monai(lambda x: x.bfloat16().float(), image, (8,) * 3, 0.5)
    assert torch.allclose(rounded, expected, atol=1e-6)


def test_outputs_are_not_changed():
    kept = torch.rand(1, 2, 8, 8, 8)
    before = kept.clone()
    found = sliding_window(lambda x: kept, torch.rand(1, 8, 8, 8), (8,) * 3)
    assert torch.equal(kept, before) and torch.allclose(found, kept[0])


def test_wrong_overlap_is_refused(network):
    with pytest.raises(ValueError, match="overlap is 1"):
        sliding_window(network, torch.rand(1, 8, 8, 8), (8,) * 3, 1)


def test_average_of_networks():
    x = torch.rand(2, 1, 4, 4, 4)
    parts = [lambda x, k=k: torch.cat([x, 1 - x], 1) ** k for k in (1, 2, 3)]
    assert torch.allclose(averaged(parts)(x), torch.stack([p(x) for p in parts]).mean(0))
    assert averaged(parts[:1])(x).equal(parts[0](x))


def test_mirror_images_are_turned_back():
    """A network that tells bright and dark is the same in the mirror; one that shifts is not."""
    x = torch.rand(2, 1, 6, 6, 6)

    def pointwise(x):
        return torch.cat([x, 1 - x], 1)

    def shifting(x):
        return pointwise(x).roll(1, 2)

    calls = []
    predict = mirrored(lambda x: calls.append(1) or pointwise(x), (0, 1, 2))
    assert torch.allclose(predict(x), pointwise(x)) and len(calls) == 8
    expected = (pointwise(x).roll(1, 2) + pointwise(x).roll(-1, 2)) / 2
    assert torch.allclose(mirrored(shifting, (0,))(x), expected)
    assert torch.allclose(mirrored(shifting, (1, 2))(x), shifting(x))
    assert mirrored(shifting, ()) is shifting


def test_left_and_right_trade_places_in_the_mirror():
    """Classes 1 and 2 are the same structure at lower and higher x; class 3 has no side."""

    def sides(x):
        at = torch.arange(x.shape[2]).view(1, 1, -1, 1, 1)
        low = (at < x.shape[2] // 2).expand_as(x)
        return torch.cat([x * 0, x * low, x * ~low, 1 - x], 1)

    x = torch.rand(1, 1, 6, 4, 4)
    for axes in [(0,), (0, 1), (0, 1, 2)]:
        assert torch.allclose(mirrored(sides, axes, [(1, 2)])(x), sides(x))
    assert not torch.allclose(mirrored(sides, (0,))(x), sides(x))


def test_channels_are_padded_and_compared_each_by_itself():
    """Windows of one value in every channel are evaluated once for each set of values."""
    calls = []

    def network(x):
        calls.extend(x)
        return x.sum(dim=1, keepdim=True)

    image = torch.zeros(2, 32, 8, 5)
    image[1, 16:], image[0, 24:] = 3.0, 7.0
    found = sliding_window(network, image, (8, 8, 8), 0.0, background=[1.0, 2.0])
    torch.testing.assert_close(found, image.sum(dim=0, keepdim=True))
    assert len(calls) == 4 and {(x[0, 0, 0, 0].item(), x[1, 0, 0, 0].item()) for x in calls} == {
        (1.0, 2.0)
    }
    calls.clear()
    sliding_window(network, image.repeat(1, 1, 1, 2)[..., :8], (8, 8, 8), 0.0)
    assert len(calls) == 3
