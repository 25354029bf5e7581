"""How much frozen features know about labels: kNN, linear and dense probes."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def label_probes(
    train_x: np.ndarray, train_y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray
) -> dict[str, float | None]:
    """Fit kNN and logistic regression on the train features and score them on the val features.

    Args:
        train_x, val_x: (N, D) float features. train_y, val_y: (N,) text; "" is a missing label.
    Returns:
        {knn_accuracy, knn_auc, linear_accuracy, linear_balanced_accuracy, linear_auc}, AUC as in
        `auc`; None where a score is undefined, because there is only one class.
    """
    train_x, train_y = train_x[train_y != ""], train_y[train_y != ""]
    keep = np.isin(val_y, train_y)  # a label, of a class that train has
    val_x, val_y = val_x[keep], val_y[keep]
    names = ["knn_accuracy", "knn_auc", "linear_accuracy", "linear_balanced_accuracy", "linear_auc"]
    if len(set(train_y)) < 2 or len(val_y) == 0:
        return dict.fromkeys(names)
    k = min(10, max(1, len(train_y) // 4))
    knn = KNeighborsClassifier(k, metric="cosine", weights="distance")
    linear = LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced")
    knn, linear = (make_pipeline(StandardScaler(), m).fit(train_x, train_y) for m in (knn, linear))
    values = [
        accuracy_score(val_y, knn.predict(val_x)),
        auc(val_y, knn.predict_proba(val_x), knn.classes_),
        accuracy_score(val_y, linear.predict(val_x)),
        balanced_accuracy_score(val_y, linear.predict(val_x)) if len(set(val_y)) > 1 else None,
        auc(val_y, linear.predict_proba(val_x), linear.classes_),
    ]
    return dict(zip(names, values, strict=True))


def auc(truth: np.ndarray, probabilities: np.ndarray, classes: np.ndarray) -> float | None:
    """Return the area under the ROC curve: binary, else the mean of one-vs-rest over the classes in
    `truth`; None if it has only one."""
    areas = [
        roc_auc_score(truth == c, probabilities[:, i])
        for i, c in enumerate(classes)
        if 0 < (truth == c).sum() < len(truth)
    ]
    return float(np.mean(areas[1:] if len(classes) == 2 else areas)) if areas else None


PENALTY = 1e-2  # of a ridge regression where there is nothing to choose it by


class Ridge:
    """Ridge regression from standardised inputs, kept as sums over groups of samples, so that each
    group can be left out of a fit without looking at the samples again."""

    def __init__(self):
        self.sums: dict[int, torch.Tensor] = {}  # (1 + D + K, 1 + D + K) products of 1, x and y

    def add(self, x: torch.Tensor, y: torch.Tensor, group: int = 0) -> None:
        """Add samples x (N, D) with targets y (N, K) to a group."""
        self.num_inputs = x.shape[1]
        z = torch.cat([torch.ones(len(x), 1), x, y], dim=1).double()
        self.sums[group] = self.sums.get(group, 0) + z.T @ z

    def fit(
        self, penalty: float = PENALTY, without: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights (K, D), for inputs as they were added, and biases (K,), float32.

        penalty: on the weights of standardised inputs, relative to the number of samples.
        without: the group that is left out.
        """
        total, d = sum(s for group, s in self.sums.items() if group != without), self.num_inputs
        mean = total[0, 1:] / total[0, 0]
        cov = total[1:, 1:] / total[0, 0] - torch.outer(mean, mean)
        std = cov.diagonal()[:d].clamp(min=1e-12).sqrt()
        gram = cov[:d, :d] / torch.outer(std, std) + penalty * torch.eye(d, dtype=cov.dtype)
        weight = torch.linalg.solve(gram, cov[:d, d:] / std[:, None]) / std[:, None]  # (D, K)
        return weight.T.float(), (mean[d:] - mean[:d] @ weight).float()


THRESHOLDS = torch.linspace(-0.2, 1.2, 57)  # of scores, which are near 0 and 1


class DenseProbe:
    """Ridge regression from frozen, upsampled feature maps to one-hot voxel labels.

    It is fitted on voxels drawn from a few cases: half of them are background, and the classes
    share the other half evenly. A voxel belongs to a class if its score is at least the threshold
    of the class, chosen by Dice on the windows of the fit. One threshold for all, or the largest
    score, would not do: classes are drawn evenly, but some organs fill a window and others hardly
    appear in it. As upsampling and regression are both linear, the weights of a map are applied at
    its own resolution, and only the few class scores are upsampled instead of the many features.

    Args:
        classes: label values, background (0) first.
    """

    def __init__(self, classes: list[int]):
        self.classes, self.ridge = classes, Ridge()

    def add(
        self,
        maps: list[torch.Tensor],
        labels: torch.Tensor,
        shape: tuple[int, int, int],
        seed: int,
        num_voxels: int = 6000,
        group: int = 0,
    ) -> None:
        """Draw voxels of one window for the fit. A group can be left out of it.

        maps: (C_i, x_i, y_i, z_i) each, over a window of `shape` voxels. labels: int, on the CPU,
        of that shape or, where the volume ends inside the window, smaller.
        """
        generator = torch.Generator().manual_seed(seed)
        for c in self.classes:
            voxels = (labels == c).nonzero()  # (n, 3)
            share = num_voxels // 2 if c == 0 else num_voxels // 2 // max(len(self.classes) - 1, 1)
            voxels = voxels[torch.randperm(len(voxels), generator=generator)[:share]]
            if len(voxels):
                y = torch.zeros(len(voxels), len(self.classes))
                y[:, self.classes.index(c)] = 1
                self.ridge.add(_at_voxels(maps, voxels, shape), y, group)

    def fit(self, penalty: float = PENALTY, without: int | None = None) -> None:
        """Fit the regression to the voxels that `add` has drawn, but for those of one group."""
        self.weight, self.bias = self.ridge.fit(penalty, without)

    def scores(self, maps: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        """Return the regression outputs of one window, (classes, X, Y, Z) on the CPU."""
        weights = self.weight.to(maps[0].device).split([len(m) for m in maps], dim=1)
        total = 0
        for w, m in zip(weights, maps, strict=True):
            coarse = torch.einsum("kc,cxyz->kxyz", w, m.float())[None]
            total = total + F.interpolate(coarse, size=shape, mode="trilinear")[0]
        return total.cpu() + self.bias[:, None, None, None]

    def counts(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Count voxels at each threshold: of the class and found, all found, all of the class.

        Returns (3, classes without background, thresholds) int64, which windows can add up.
        """
        out = torch.zeros(3, len(self.classes) - 1, len(THRESHOLDS), dtype=torch.int64)
        for k, label in enumerate(self.classes[1:]):
            passed = torch.bucketize(scores[k + 1].flatten(), THRESHOLDS, right=True)
            truth = (labels == label).flatten()
            for row, voxels in ((0, passed[truth]), (1, passed)):
                number = torch.bincount(voxels, minlength=len(THRESHOLDS) + 1)
                out[row, k] = number.flip(0).cumsum(0).flip(0)[1:]  # at this threshold or above
            out[2, k] = truth.sum()
        return out

    def calibrate(self, counts: torch.Tensor) -> None:
        """Choose the threshold of each class by the `counts` of the windows of the fit."""
        self.chosen = dice(counts).nan_to_num(-1).argmax(dim=1)

    def dice(self, counts: torch.Tensor) -> list[float | None]:
        """Return the Dice of each class at its threshold; None if the labels lack the class."""
        at = dice(counts)[torch.arange(len(self.chosen)), self.chosen].tolist()
        return [d if n else None for d, n in zip(at, counts[2, :, 0].tolist(), strict=True)]


def dice(counts: torch.Tensor) -> torch.Tensor:
    """Return 2 |found and true| / (|found| + |true|) of counts (3, ...); NaN if both are empty."""
    both, found, true = counts.double()
    return 2 * both / (found + true)


def _at_voxels(
    maps: list[torch.Tensor], voxels: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """Features (N, sum of C_i) at voxels, equal to those of F.interpolate(mode="trilinear")."""
    grid = (2 * voxels.to(maps[0].device) + 1) / torch.tensor(shape, device=maps[0].device) - 1
    grid = grid.flip(-1)[None, :, None, None].float()  # grid_sample wants z, y, x
    options = {"padding_mode": "border", "align_corners": False}
    sampled = [F.grid_sample(m[None].float(), grid, **options) for m in maps]
    return torch.cat([features[0, :, :, 0, 0].T for features in sampled], dim=1).cpu()
