"""The standard control: predict a target from size, spacing and mean intensity of a volume alone.

A network that is no better than this may have learnt how the scans were acquired and cropped, and
nothing of their content.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from nibabel.orientations import io_orientation
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from data.cache import VolumeCache
from data.cases import Case
from data.prepare.fingerprint import body_values
from data.prepare.targets import Targets
from utils import distributed


def control_features(entry) -> np.ndarray:
    """Return (6 + C,): logarithms of the file's voxels and mm per voxel along x, y, z; mean
    intensities of the channels.

    Sums of the logarithms are logarithms of lengths and volumes in mm. An intensity is the body's
    mean, in HU for CT, else relative to the percentiles; 0 if the channel is missing. In a large
    volume it is taken from a few chunks, spread evenly over those that hold body.
    """
    axes = io_orientation(entry.original_affine)[:, 0].astype(int)  # x, y or z of each file axis
    voxels = np.empty(3)
    voxels[axes] = entry.original_shape
    total, count = 0.0, 0
    for values in body_values(entry):
        total, count = total + values.sum(axis=1, dtype=np.float64), count + values.shape[1]
    background, scale, offset = np.transpose(
        [(c.background, c.scale, c.offset) for c in entry.channels]
    )
    stored = total / count if count else background
    # rounded, as spacings that differ by less than 0.1 % differ only in the file's last digits
    lengths = np.log([*voxels, *entry.slice_spacing]).round(3)
    return np.array([*lengths, *(stored * scale + offset)])


def control_features_of(cases: Sequence[Case], cache: VolumeCache) -> np.ndarray:
    """Return `control_features` (N, F). The cases are split over ranks; all ranks get all rows."""
    rank, world = distributed.rank(), distributed.world_size()
    own = [control_features(cache.get(case)) for case in cases[rank::world]]
    parts = distributed.gather_objects(own)
    return np.stack([parts[i % world][i // world] for i in range(len(cases))])


@dataclass(frozen=True)
class Control:
    """Logistic regressions (ridge regressions for numbers) on standardised features.

    mean, scale: (F,) of the train cases. weights: {target: (outputs, F)}; bias: {target:
    (outputs,)}. All are lists, so that a checkpoint can hold them.
    """

    mean: list[float]
    scale: list[float]
    weights: dict[str, list[list[float]]]
    bias: dict[str, list[float]]

    @classmethod
    def fit(cls, features: np.ndarray, targets: Targets, cases: Sequence[Case]) -> "Control":
        """Fit the regressions on features (N, F) of the train cases."""
        scaler = StandardScaler().fit(features)
        x, labels = scaler.transform(features), [targets.encode(case) for case in cases]
        weights, bias = {}, {}
        for name in targets.names:
            y = np.array([label[name] for label in labels], float)
            known = ~np.isnan(y) & ~((y < 0) & (name in targets.classes))
            model = LogisticRegression(max_iter=2000) if name in targets.classes else Ridge()
            model.fit(x[known], y[known])
            weights[name] = np.atleast_2d(model.coef_).tolist()
            bias[name] = np.atleast_1d(model.intercept_).tolist()
        return cls(scaler.mean_.tolist(), scaler.scale_.tolist(), weights, bias)

    @classmethod
    def from_dict(cls, values: dict) -> "Control":
        return cls(**values)

    def to_dict(self) -> dict:
        return asdict(self)

    def predict(self, features: np.ndarray, targets: Targets) -> dict[str, np.ndarray]:
        """Return {target: (N, K) probabilities, or (N,) numbers in the column's units}."""
        x = (np.asarray(features) - self.mean) / self.scale
        outputs = {}
        for name in targets.names:
            z = x @ np.array(self.weights[name]).T + self.bias[name]  # (N, outputs)
            if name in targets.moments:
                outputs[name] = targets.to_units(name, z[:, 0])
                continue
            if z.shape[1] == 1:  # two classes: log-odds of the second
                z = np.concatenate([np.zeros_like(z), z], axis=1)
            outputs[name] = softmax(z, axis=1)
        return outputs
