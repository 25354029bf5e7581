"""How much frozen features already know: kNN, linear and dense probes."""

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
    """kNN and logistic regression fitted on train, scored on val.

    Args:
        train_x, val_x: (N, D) float features. train_y, val_y: (N,) text; "" is a missing label.
    Returns:
        knn_accuracy, knn_auc, linear_accuracy, linear_balanced_accuracy, linear_auc (binary, or
        macro one-vs-rest); None where undefined (one class only).
    """
    train_x, train_y = train_x[train_y != ""], train_y[train_y != ""]
    keep = np.isin(val_y, train_y)  # neither missing nor a class that was never seen
    val_x, val_y = val_x[keep], val_y[keep]
    names = ["knn_accuracy", "knn_auc", "linear_accuracy", "linear_balanced_accuracy", "linear_auc"]
    if len(set(train_y)) < 2 or len(val_y) == 0:
        return dict.fromkeys(names)
    k = min(10, max(1, len(train_y) // 4))
    knn = make_pipeline(
        StandardScaler(), KNeighborsClassifier(k, metric="cosine", weights="distance")
    )
    linear = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced")
    )
    knn.fit(train_x, train_y)
    linear.fit(train_x, train_y)
    values = [
        accuracy_score(val_y, knn.predict(val_x)),
        auc(val_y, knn.predict_proba(val_x), knn.classes_),
        accuracy_score(val_y, linear.predict(val_x)),
        balanced_accuracy_score(val_y, linear.predict(val_x)) if len(set(val_y)) > 1 else None,
        auc(val_y, linear.predict_proba(val_x), linear.classes_),
    ]
    return dict(zip(names, values, strict=True))


def auc(truth: np.ndarray, probabilities: np.ndarray, classes: np.ndarray) -> float | None:
    """Area under the ROC curve: binary, else macro one-vs-rest over the classes in `truth`."""
    areas = [
        roc_auc_score(truth == c, probabilities[:, i])
        for i, c in enumerate(classes)
        if 0 < (truth == c).sum() < len(truth)
    ]
    return float(np.mean(areas[1:] if len(classes) == 2 else areas)) if areas else None


THRESHOLDS = torch.linspace(-0.2, 1.2, 57)  # one-hot targets are regressed: scores around 0 and 1


class DenseProbe:
    """Ridge regression from frozen, upsampled feature maps to one-hot voxel labels.

    Fitted on voxels drawn from a few cases, half of them background and the other half shared by
    the classes. A class is then where its score is above its own threshold, chosen by Dice on the
    windows it was fitted on: voxels were drawn evenly, while some organs fill a window and others
    hardly show in it, so that neither one threshold nor the largest score would find both.
    Upsampling and regression are both linear, so each map's weights are applied at the map's own
    resolution, and the few class scores are upsampled, not the many features.

    Args:
        classes: label values, background (0) first.
        ridge: penalty on the weights of standardised features, relative to the number of voxels.
    """

    def __init__(self, classes: list[int], ridge: float = 1e-2):
        self.classes, self.ridge = classes, ridge
        self.x: list[torch.Tensor] = []
        self.y: list[torch.Tensor] = []

    def add(
        self,
        maps: list[torch.Tensor],
        labels: torch.Tensor,
        shape: tuple[int, int, int],
        seed: int,
        num_voxels: int = 6000,
    ) -> None:
        """Collect voxels of one window.

        maps: (C_i, x_i, y_i, z_i) each, over a window of `shape` voxels; labels: int on the CPU, of
        that shape or, where the volume ends inside the window, smaller.
        """
        generator = torch.Generator().manual_seed(seed)
        for c in self.classes:
            voxels = (labels == c).nonzero()  # (n, 3)
            share = num_voxels // 2 if c == 0 else num_voxels // 2 // max(len(self.classes) - 1, 1)
            voxels = voxels[torch.randperm(len(voxels), generator=generator)[:share]]
            if len(voxels):
                self.x.append(_at_voxels(maps, voxels, shape))
                self.y.append(torch.full((len(voxels),), self.classes.index(c)))

    def fit(self) -> None:
        x = torch.cat(self.x).double()  # (N, D)
        y = F.one_hot(torch.cat(self.y), len(self.classes)).double()
        self.mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
        x = (x - self.mean) / std
        gram = x.T @ x / len(x) + self.ridge * torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.solve(gram, x.T @ (y - y.mean(dim=0)) / len(x))  # (D, classes)
        self.weight = (weight / std[:, None]).T.float()  # (classes, D), for features as they are
        self.bias = (y.mean(dim=0) - self.weight.double() @ self.mean).float()
        self.x, self.y = [], []

    def scores(self, maps: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        """(classes, X, Y, Z) regression outputs of one window, on the CPU."""
        weights = self.weight.to(maps[0].device).split([len(m) for m in maps], dim=1)
        total = 0
        for w, m in zip(weights, maps, strict=True):
            coarse = torch.einsum("kc,cxyz->kxyz", w, m.float())[None]
            total = total + F.interpolate(coarse, size=shape, mode="trilinear")[0]
        return total.cpu() + self.bias[:, None, None, None]

    def counts(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(3, classes without background, thresholds) int64: voxels of the class that are found,
        all that are found, all of the class. Sums over windows; scores as of `scores`."""
        out = torch.zeros(3, len(self.classes) - 1, len(THRESHOLDS), dtype=torch.int64)
        for k, label in enumerate(self.classes[1:]):
            passed = torch.bucketize(scores[k + 1].flatten(), THRESHOLDS, right=True)
            truth = (labels == label).flatten()
            for row, voxels in ((0, passed[truth]), (1, passed)):
                number = torch.bincount(voxels, minlength=len(THRESHOLDS) + 1)
                out[row, k] = number.flip(0).cumsum(0).flip(0)[1:]  # that pass it or a higher one
            out[2, k] = truth.sum()
        return out

    def calibrate(self, counts: torch.Tensor) -> None:
        """Choose the thresholds, by the `counts` of the windows that were fitted."""
        self.chosen = dice(counts).nan_to_num(-1).argmax(dim=1)

    def dice(self, counts: torch.Tensor) -> list[float | None]:
        """Dice of each class at its threshold; None where the labels have none of it."""
        at = dice(counts)[torch.arange(len(self.chosen)), self.chosen].tolist()
        return [d if n else None for d, n in zip(at, counts[2, :, 0].tolist(), strict=True)]


def dice(counts: torch.Tensor) -> torch.Tensor:
    """2 |found and true| / (|found| + |true|) of (3, ...) counts; NaN where there is neither."""
    both, found, true = counts.double()
    return 2 * both / (found + true)


def _at_voxels(
    maps: list[torch.Tensor], voxels: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """Features (N, sum of C_i), as F.interpolate(mode="trilinear") would have them there."""
    grid = (2 * voxels.to(maps[0].device) + 1) / torch.tensor(shape, device=maps[0].device) - 1
    grid = grid.flip(-1)[None, :, None, None].float()  # grid_sample wants z, y, x
    columns = [
        F.grid_sample(m[None].float(), grid, padding_mode="border", align_corners=False)[
            0, :, :, 0, 0
        ].T
        for m in maps
    ]
    return torch.cat(columns, dim=1).cpu()
