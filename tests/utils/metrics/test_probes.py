import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.metrics import probes


def test_label_probes_find_a_linear_label_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8)).astype(np.float32)
    y = np.where(x[:, 0] > 0, "yes", "no")
    scores = probes.label_probes(x[:120], y[:120], x[120:], y[120:])
    assert scores["linear_auc"] > 0.95 and scores["knn_auc"] > 0.7
    noise = rng.permutation(y)
    assert probes.label_probes(x[:120], noise[:120], x[120:], noise[120:])["linear_auc"] < 0.7


def test_missing_and_unseen_labels_are_left_out_and_undefined_is_none():
    x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    y = np.array(["a", "b", ""] * 4)
    scores = probes.label_probes(x, y, x[:3], np.array(["a", "b", "c"]))
    assert scores["linear_accuracy"] is not None
    one_class = probes.label_probes(x, np.array(["a"] * 12), x, y)
    assert set(one_class.values()) == {None}
    assert probes.label_probes(x, y, x[:2], np.array(["a", "a"]))["linear_auc"] is None


def test_auc_is_sklearns_for_two_and_more_classes():
    truth = np.array(["a", "b", "b", "a"])
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    assert probes.auc(truth, p, np.array(["a", "b"])) == 1.0
    three = np.array(["a", "b", "c"])
    assert probes.auc(three, np.eye(3), three) == 1.0


def test_dense_probe_is_ridge_on_upsampled_maps():
    """Labels that are a threshold of a coarse map's upsampling are found from that map."""
    torch.manual_seed(0)
    coarse, fine = torch.randn(3, 4, 4, 4), torch.randn(2, 8, 8, 8)
    up = F.interpolate(coarse[None], size=(8, 8, 8), mode="trilinear")[0]
    labels = (up[1] > 0.2).long() * 7
    probe = probes.DenseProbe([0, 7])
    probe.add([fine, coarse], labels, (8, 8, 8), seed=0)
    probe.fit()
    counts = probe.counts(probe.scores([fine, coarse], (8, 8, 8)), labels)
    probe.calibrate(counts)
    assert probe.dice(counts)[0] > 0.85


def test_each_class_has_its_own_threshold():
    """Two classes whose scores are on different scales, and one that the labels lack."""
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (6, 6, 6))
    scores = torch.stack([torch.zeros(6, 6, 6), (labels == 1) * 0.1, (labels == 2) * 0.5 + 0.4])
    scores = torch.cat([scores, torch.rand(1, 6, 6, 6)])
    probe = probes.DenseProbe([0, 1, 2, 5])
    counts = probe.counts(scores, labels)
    probe.calibrate(counts)
    assert probe.dice(counts) == [1, 1, None]
    for k, label in enumerate((1, 2)):  # against a plain count at one threshold
        for t in (10, 30):
            found, true = scores[k + 1] >= probes.THRESHOLDS[t], labels == label
            plain = torch.stack([(found & true).sum(), found.sum(), true.sum()])
            assert torch.equal(counts[:, k, t], plain)


def test_features_at_voxels_are_those_of_interpolate():
    maps = [torch.randn(3, 4, 4, 2), torch.randn(2, 8, 8, 4)]
    up = torch.cat([F.interpolate(m[None], size=(8, 8, 4), mode="trilinear")[0] for m in maps])
    voxels = torch.tensor([[0, 0, 0], [3, 5, 2], [7, 7, 3]])
    expected = torch.stack([up[:, x, y, z] for x, y, z in voxels.tolist()])
    torch.testing.assert_close(probes._at_voxels(maps, voxels, (8, 8, 4)), expected)


def test_dice():
    counts = torch.tensor([[1, 0], [2, 0], [1, 0]])
    assert probes.dice(counts)[0] == pytest.approx(2 / 3)
    assert probes.dice(counts)[1].isnan()


def test_ridge_is_the_solution_on_the_samples_of_the_other_groups():
    torch.manual_seed(0)
    x, y = torch.randn(60, 5) * torch.tensor([1, 10, 0.1, 3, 1]) + 7, torch.randn(60, 2)
    ridge = probes.Ridge()
    for group in (0, 1, 2):
        ridge.add(x[group::3], y[group::3], group)
    kept = torch.arange(60) % 3 != 1
    for rows, without in ((slice(None), None), (kept, 1)):
        weight, bias = ridge.fit(0.3, without)
        own, target = x[rows].double(), y[rows].double()
        z = (own - own.mean(0)) / own.std(0, correction=0)
        gram = z.T @ z + 0.3 * len(z) * torch.eye(5)
        expected = z @ torch.linalg.solve(gram, z.T @ (target - target.mean(0))) + target.mean(0)
        torch.testing.assert_close((own.float() @ weight.T + bias), expected.float())
