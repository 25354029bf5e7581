"""Order and content of batches: a function of seed and epoch, whatever runs them."""

from collections import Counter, namedtuple

import numpy as np
import pytest
import torch

from data.inference.windows import fixed_view, window_starts
from data.loading import EpochSampler, make_loader
from data.views.crops import RegionDataset, ViewSettings
from data.views.intensity import IntensitySettings
from tests.data.views.test_crops import FakeEntry
from utils.errors import InputError

SETTINGS = ViewSettings(
    region_size=(24, 24, 24),
    global_size=(16, 16, 16),
    global_zoom=(0.7, 1.3),
    num_local=3,
    local_size=(8, 8, 8),
    local_zoom=(0.4, 1.0),
    aspect=1.3,
    flip=(True, True, True),
    rotate=(15, 15, 15),
    intensity=IntensitySettings(scale=0.2, noise=0.05, window_prob=0.3),
)


class FakeCache:
    """Entries made from the case's name (a number)."""

    def get(self, case):
        rng = np.random.default_rng(case)
        return FakeEntry(rng.integers(-1000, 1000, (30, 26, 20 + case), dtype=np.int16))


def dataset(num=11):
    return RegionDataset(list(range(num)), FakeCache(), SETTINGS, seed=5)


def flat(item, prefix=""):
    """Nested dictionaries of tensors -> one dictionary."""
    out = {}
    for key, value in item.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def equal(one, two):
    one, two = flat(one), flat(two)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def batches(batch_size, n_workers=0, epoch=3, start_batch=0, **options):
    data = dataset()
    sampler = EpochSampler(len(data), batch_size, seed=5, **options)
    sampler.set_epoch(epoch, start_batch)
    return list(make_loader(data, sampler, n_workers))


def test_item_has_a_padded_region_and_its_views():
    item = dataset()[(0, 2, 0)]
    assert item["region"].shape == (1, 24, 24, 24) and item["region"].dtype == torch.int16
    assert torch.equal(item["region"][..., 22], item["region"][..., 21])  # 22 voxels, then repeated
    assert item["global"]["matrix"].shape == (2, 3, 4)
    assert item["local"]["matrix"].shape == (3, 3, 4) and item["local"]["body"].shape == (3,)
    assert item["index"] == 2


def test_items_depend_on_every_part_of_the_key_and_on_the_seed():
    data = dataset()
    first = data[(0, 2, 0)]["global"]["matrix"]
    assert torch.equal(first, data[(0, 2, 0)]["global"]["matrix"])
    for other in (data[(1, 2, 0)], data[(0, 3, 0)], data[(0, 2, 1)]):
        assert not torch.equal(first, other["global"]["matrix"])
    reseeded = RegionDataset(list(range(11)), FakeCache(), SETTINGS, seed=6)
    assert not torch.equal(first, reseeded[(0, 2, 0)]["global"]["matrix"])


def test_batches_do_not_depend_on_the_workers():
    for one, two in zip(batches(4), batches(4, n_workers=2), strict=True):
        assert equal(one, two)


def test_a_shared_memory_that_batches_would_fill_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("data.loading.SHARED_MEMORY", tmp_path)
    used = namedtuple("Usage", "free")
    # a region of 24^3 int16 per item (and a little more), 2 batches of 4 per worker
    monkeypatch.setattr("shutil.disk_usage", lambda path: used(2 * 2 * 4 * 24**3 * 2))
    with pytest.raises(InputError, match=r"0.442 MB are free.*take 0.\d+ MB.*--shm-size=1g"):
        batches(4, n_workers=2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: used(10**6))
    data = dataset()
    make_loader(data, EpochSampler(len(data), 4, seed=5), 2)  # starts no process yet
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match="16 processes"):
        batches(4, n_workers=2)


def test_two_ranks_see_together_what_one_process_sees():
    whole = batches(4)
    ranks = [batches(2, rank=r, world_size=2) for r in range(2)]
    assert len(whole) == len(ranks[0]) == len(ranks[1]) == 2
    for batch, one, two in zip(whole, *ranks, strict=True):
        both = [{k: torch.cat([f[k] for f in (flat(one), flat(two))]) for k in flat(one)}]
        assert equal(batch, both[0])


def test_resuming_inside_an_epoch_gives_the_rest_of_it():
    whole, rest = batches(3), batches(3, start_batch=2)
    assert len(whole) == 3 and len(rest) == 1 and equal(whole[2], rest[0])


def test_iterating_leaves_torchs_random_state_alone():
    data = dataset()
    for n_workers in (0, 1):
        loader = make_loader(data, EpochSampler(len(data), 4), n_workers)
        state = torch.random.get_rng_state()
        next(iter(loader))
        assert torch.equal(torch.random.get_rng_state(), state)


def test_each_epoch_is_another_permutation_of_all_cases_and_draws():
    sampler = EpochSampler(5, 2, draws=4)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler) == 20 and sampler.num_batches == 10
        assert sorted(keys) == [(epoch, i, d) for i in range(5) for d in range(4)]
        orders.append([key[1:] for key in keys])
    assert orders[0] != orders[1]
    sampler.set_epoch(0)
    assert [key[1:] for key in sampler] == orders[0]
    sampler.set_epoch(0, start_batch=7)
    assert [key[1:] for key in sampler] == orders[0][14:] and len(sampler) == 6


def test_the_order_is_the_one_it_has_always_been():
    """A run that was begun with an earlier version goes on in the same order."""
    sampler = EpochSampler(2, 5, seed=1, draws=2)
    sampler.set_epoch(3)
    assert list(sampler) == [(3, 0, 0), (3, 1, 1), (3, 1, 0), (3, 0, 1), (3, 1, 2)]


@pytest.mark.parametrize("num, batches", [(5, 7), (5, 1), (1, 3), (3, 4), (40, 3)])
def test_a_number_of_batches_takes_all_cases_equally_often_over_the_epochs(num, batches):
    def keys(epoch, start_batch=0, batch_size=4, seed=0, **options):
        sampler = EpochSampler(num, batch_size, seed, draws=3, batches=batches, **options)
        sampler.set_epoch(epoch, start_batch)
        assert sampler.num_batches == batches
        return list(sampler)

    drawn = []
    for epoch in range(6):
        found = keys(epoch)
        assert len(found) == 4 * batches == len(set(found))  # a case seen again is another view
        assert {key[0] for key in found} == {epoch}
        assert keys(epoch, start_batch=1) == found[4:]
        ranks = [keys(epoch, batch_size=2, rank=r, world_size=2) for r in range(2)]
        both = [key for i in range(0, 2 * batches, 2) for rank in ranks for key in rank[i : i + 2]]
        assert both == found
        drawn += [index for _, index, _ in found]
        counts = np.bincount(drawn, minlength=num)
        assert counts.max() - counts.min() <= 1
    assert num == 1 or [key[1:] for key in keys(0)] != [key[1:] for key in keys(1)]
    assert num == 1 or keys(0) != keys(0, seed=1)


def test_a_number_of_batches_keeps_the_weights():
    sampler = EpochSampler(3, 4, weights=[1, 1, 2], batches=5)
    keys = list(sampler)
    assert len(set(keys)) == 20 and Counter(index for _, index, _ in keys) == {0: 5, 1: 5, 2: 10}


def test_ragged_last_batch_is_dropped_and_small_sets_fill_one():
    assert len(EpochSampler(11, 4)) == 8
    keys = list(EpochSampler(3, 8))
    assert len(keys) == 8 == len(set(keys))  # drawn again with other views
    counts = np.bincount([index for _, index, _ in keys])
    assert counts.max() - counts.min() <= 1
    ranks = [list(EpochSampler(3, 4, rank=r, world_size=2)) for r in range(2)]
    assert ranks[0] + ranks[1] == keys
    with pytest.raises(ValueError, match="no cases"):
        EpochSampler(0, 4)


@pytest.mark.parametrize("num, world_size", [(11, 1), (11, 2), (3, 4), (8, 2)])
def test_evaluation_takes_every_case_once_with_fixed_views(num, world_size):
    keys = []
    for rank in range(world_size):
        sampler = EpochSampler(num, 2, train=False, rank=rank, world_size=world_size)
        sampler.set_epoch(7)
        assert -(-len(sampler) // 2) <= sampler.num_batches
        keys += list(sampler)
    assert sorted(keys) == [(0, index, 0) for index in range(num)]


def test_windows_tile_the_volume():
    assert window_starts((96, 96, 50), (96, 96, 96)) == [(0, 0, 0)]
    assert [s[0] for s in window_starts((20, 8, 8), (8, 8, 8))] == [0, 8, 12]
    for shape in ((20, 17, 5), (16, 8, 24)):
        seen = np.zeros(shape, int)
        starts = window_starts(shape, (8, 8, 8))
        for start in starts:
            seen[tuple(slice(a, a + 8) for a in start)] += 1
        assert seen.min() >= 1 and len(set(starts)) == len(starts)


def test_fixed_view_is_the_window_of_the_volume_with_air_beyond_it():
    entry = FakeCache().get(0)  # (30, 26, 20)
    view = fixed_view(entry, (10, 0, 0), (16, 16, 24), (-1000, 1000))
    assert view.shape == (1, 16, 16, 24) and view.dtype == torch.float32
    want = (entry.voxels[10:26, :16] + 1000.0) / 2000
    np.testing.assert_allclose(view[0, :, :, :20], want, atol=1e-6)
    assert (view[..., 20:] == 0).all()
