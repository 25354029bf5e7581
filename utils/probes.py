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


class DenseProbe:
    """Ridge regression from frozen, upsampled feature maps to one-hot voxel labels.

    Fitted on voxels drawn from a few cases, half of them background and the other half shared by
    the classes. Upsampling and regression are both linear, so `predict` applies each map's weights
    at the map's own resolution and upsamples the few class scores, not the many features.

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

    def calibrate(self, scores: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
        """Choose the background's offset by the mean Dice on the windows it was fitted on: where
        voxels were drawn evenly, the regression alone finds far too much foreground; where a
        lesion is so small that all its voxels were drawn, it finds none."""

        def mean_dice(offset: float) -> float:
            found = [
                dice(self.label(s + offset * background), t, c)
                for s, t in zip(scores, truth, strict=True)
                for c in self.classes[1:]
            ]
            found = [d for d in found if d is not None]
            return sum(found) / max(len(found), 1)

        background = (torch.arange(len(self.classes)) == 0).float()[:, None, None, None]
        self.bias[0] += max(torch.linspace(-1.0, 0.6, 33).tolist(), key=mean_dice)

    def label(self, scores: torch.Tensor) -> torch.Tensor:
        """Label values (X, Y, Z) of scores (classes, X, Y, Z)."""
        return torch.tensor(self.classes)[scores.argmax(dim=0)]


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


def dice(prediction: torch.Tensor, truth: torch.Tensor, label: int) -> float | None:
    """Dice of one label; None where neither has it."""
    p, t = prediction == label, truth == label
    total = p.sum() + t.sum()
    return float(2 * (p & t).sum() / total) if total else None
