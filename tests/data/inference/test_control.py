import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from data.cache import VolumeCache
from data.cases import Case, read_cases
from data.entry import Channel
from data.inference.control import Control, control_features
from data.prepare.targets import Targets
from data.standard import StandardForm
from tests.places import SHARED

HIPPOCAMPUS = SHARED / "data" / "hippocampus"


def entry_of(shape, value=1.0, body=255):
    """A cached volume of one value, as `control_features` sees it."""
    blocks = np.full([-(-n // 8) for n in shape], body, np.uint8)
    reads = []

    def read_region(start, size):
        reads.append(start)
        box = [min(s, n - a) for a, s, n in zip(start, size, shape, strict=True)]
        return np.full((1, *box), value)

    return SimpleNamespace(
        shape=shape,
        original_shape=shape,
        original_affine=np.eye(4),
        slice_spacing=np.ones(3),
        body=blocks,
        read_region=read_region,
        channels=[Channel(2.0, -1.0, -7, "CT", "CT")],
        reads=reads,
    )


def test_features_are_of_the_file_along_x_y_z(tmp_path):
    """A file whose axes are z, x, y: 30 x 20 x 10 voxels of 3 x 1 x 2 mm."""
    rng = np.random.default_rng(0)
    voxels = rng.normal(100, 10, (30, 20, 10)).astype(np.float32)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = 3, -1, 2, 1
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "a.nii")
    for spacing in (None, (2.0, 2.0, 2.0)):  # of the cache
        cache = VolumeCache(tmp_path / "cache", StandardForm(spacing, "CT"))
        features = control_features(cache.get(Case("p", str(tmp_path / "a.nii"), "0", 2)))
        np.testing.assert_allclose(features[:6], np.log([20, 10, 30, 1, 2, 3]), atol=1e-3)
        assert features[6] == pytest.approx(voxels.mean(), abs=1)


def test_mean_intensity_is_of_the_body():
    entry = entry_of((64, 64, 64))
    voxels = np.zeros((64, 64, 64))
    voxels[:32], voxels[32:] = 3.0, 500.0
    entry.body[4:] = 100
    entry.read_region = lambda start, size: voxels[None]
    assert control_features(entry)[6] == 3.0 * 2 - 1
    assert control_features(entry_of((9, 9, 9), body=0))[6] == -7 * 2 - 1


def test_of_a_large_volume_a_few_chunks_are_read():
    entry = entry_of((200, 300, 500))
    assert control_features(entry)[6] == 1.0
    assert len(entry.reads) == 8 and {tuple(s)[2] // 64 for s in entry.reads} >= {0, 7}


def cases_and_features(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(80, 7)) * [3, 2, 1, 1, 1, 1, 50] + 4
    x[:, 3] = 0.4  # the same for all
    names = np.array(["a", "b", "c"])[np.digitize(x[:, 0] + rng.normal(size=80), [3, 6])]
    labels = [
        {"three": n, "two": "ab"[n == "a"], "number": f"{2 * v:.4f}"}
        for n, v in zip(names, x[:, 1], strict=True)
    ]
    labels[3] |= {"three": "", "two": "NA", "number": "?"}
    return [Case(f"p{i}", "/x", "0", i + 2, labels=d) for i, d in enumerate(labels)], x


def test_predictions_are_those_of_scikit_learn():
    cases, x = cases_and_features()
    targets, problems = Targets.fit(cases, ["three", "two"], ["number"])
    assert not problems
    control = Control.fit(x, targets, cases)
    again = Control.from_dict(json.loads(json.dumps(control.to_dict())))
    found = again.predict(x, targets)
    known = np.arange(80) != 3
    scaled = StandardScaler().fit(x)
    for name in ("three", "two"):
        y = np.array([c.labels[name] for c in cases])
        model = LogisticRegression(max_iter=2000).fit(scaled.transform(x[known]), y[known])
        np.testing.assert_allclose(found[name], model.predict_proba(scaled.transform(x)))
    y = np.array([float(c.labels["number"]) for c in np.array(cases, object)[known]])
    ridge = Ridge().fit(scaled.transform(x[known]), (y - y.mean()) / y.std())
    expected = ridge.predict(scaled.transform(x)) * y.std() + y.mean()
    np.testing.assert_allclose(found["number"], expected)
    assert np.corrcoef(found["number"][known], y)[0, 1] > 0.99


def test_a_feature_that_train_never_varied_says_nothing():
    cases, x = cases_and_features()
    targets, _ = Targets.fit(cases, ["two"])
    control, other = Control.fit(x, targets, cases), x.copy()
    other[:, 3] = 9
    np.testing.assert_allclose(
        control.predict(other, targets)["two"], control.predict(x, targets)["two"]
    )
    entry = entry_of((10, 10, 10))
    entry.slice_spacing = np.array([1.0, 1.00001, 0.99999])
    assert (control_features(entry)[3:6] == 0).all()


@pytest.mark.skipif(not HIPPOCAMPUS.exists(), reason=f"no {HIPPOCAMPUS}")
def test_hippocampal_volume_shows_in_the_size_of_the_crop(tmp_path):
    cases, problems = read_cases(
        HIPPOCAMPUS / "classification.csv", {}, ["hippocampal_volume", "anterior_share"]
    )
    assert not problems
    cache = VolumeCache(tmp_path, StandardForm(None, "MR"))
    x = np.array([control_features(cache.get(case)) for case in cases])
    areas = {"hippocampal_volume": [], "anterior_share": []}
    for fold in "01234":
        train, test = ([i for i, c in enumerate(cases) if (c.fold == fold) == t] for t in (0, 1))
        targets, _ = Targets.fit([cases[i] for i in train], list(areas))
        control = Control.fit(x[train], targets, [cases[i] for i in train])
        found, truth = control.predict(x[test], targets), targets.truth([cases[i] for i in test])
        for name, p in found.items():
            k = {"multi_class": "ovr"} if p.shape[1] > 2 else {}
            areas[name].append(roc_auc_score(truth[name], p if k else p[:, 1], **k))
    assert 0.7 < np.mean(areas["hippocampal_volume"]) < 0.85
    assert 0.4 < np.mean(areas["anterior_share"]) < 0.62
