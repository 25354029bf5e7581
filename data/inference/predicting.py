"""Predictions of trained classifiers, and of the control, for cases."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from data.cache import VolumeCache
from data.cases import Case
from data.inference.control import Control, control_features_of
from data.loading import EpochSampler
from data.prepare.load import PATH_COLUMNS, load_cases
from data.prepare.targets import Targets
from data.views.images import (
    PLAIN,
    ImageDataset,
    ImageSettings,
    collate,
    cut_images,
    placements,
    standard_form,
)
from utils import distributed
from utils.config.classification import OF_THE_TEST
from utils.memory import in_parts
from utils.metrics.predictions import Predictions
from utils.training.run import Run
from utils.training.step import autocast, refuse_not_finite
from utils.training.tested import open_tested as open_checkpoint
from utils.training.tested import refuse_unlike


class Tested:
    """A checkpoint to be tested.

    Attributes:
        cfg: its config, but with the fields OF_THE_TEST of the current config.
        cache: a cache in its standard form.
        saved: what it says of its training. targets, seen_patients: of that.
        weights: of the classifier.
    """

    def __init__(self, path: str, cfg):
        """cfg: the current config. Raises CheckpointError for a file not of classification.py."""
        saved, self.cfg = open_checkpoint(path, "classification", cfg, OF_THE_TEST)
        self.targets = Targets.from_dict(saved["classes"])
        self.cache = VolumeCache(cfg.cache_dir, standard_form(self.cfg))
        self.seen_patients, self.weights = saved["seen_patients"], saved["modules"]["classifier"]
        self._control = Control.from_dict(saved["control"])
        self.saved = {name: x for name, x in saved.items() if name not in ("modules", "optimizer")}

    def views(self, cases: Sequence[Case]) -> tuple[ImageDataset, EpochSampler]:
        """Return all fixed views of the cases, for `make_loader`."""
        at = placements(self.cfg.test.flip, self.cfg.test.shift)
        settings = ImageSettings.from_config(self.cfg, augment=False)
        order = (0, 1, False, distributed.rank(), distributed.world_size())
        sampler = EpochSampler(len(cases), max(1, self.cfg.batch_size // len(at)), *order)
        return ImageDataset(cases, self.cache, settings, 0, at), sampler

    def image(self, case: Case) -> np.ndarray:
        """Return the plain view of a case, (X, Y, Z) in 0..1, of several channels `case.drawn`."""
        settings = ImageSettings.from_config(self.cfg, augment=False)
        item = ImageDataset([case], self.cache, settings, 0, [PLAIN])[0, 0, 0]
        channels = cut_images(collate([item]), settings.size, torch.device("cpu"))[0]
        return channels[[*case.channels, ""].index(case.drawn)].numpy()

    def control(self, cases: Sequence[Case]) -> Predictions:
        """Return the predictions of the control that was fitted when the network was trained."""
        return self._control.predict(control_features_of(cases, self.cache), self.targets)


def open_tested(cfg) -> list[Tested]:
    """Open the checkpoints of test_ckpt. Raises CheckpointError if their targets differ."""
    tested = [Tested(path, cfg) for path in cfg.test_ckpt]
    learned = [{"classes": x.targets.classes, "numbers": [*x.targets.moments]} for x in tested]
    refuse_unlike(cfg.test_ckpt, learned)
    return tested


def load_to_test(tested: Sequence[Tested], check: bool):
    """Return what `load_cases` returns. The CSV need not have the columns of the targets."""
    for one in tested:  # each brings the volumes into its own cache
        cases, skipped = load_cases(
            one.cfg,
            one.cache,
            one.cfg.report_by,
            PATH_COLUMNS,
            check,
            optional_columns=one.targets.names,
            needed=["test"],
            find_problems=lambda parts, targets=one.targets: targets.check(parts["test"]),
        )
    return cases, skipped


def average(predictions: Sequence[Predictions]) -> Predictions:
    """Return the mean over several checkpoints."""
    return {k: np.mean([found[k] for found in predictions], axis=0) for k in predictions[0]}


@torch.no_grad()
def predict(run: Run, network, loader, targets: Targets) -> dict[str, np.ndarray]:
    """Return predictions as `Control.predict`, means over the views of each case.

    The cases of `loader` are split over ranks; all ranks get all predictions, in their order.

    Raises:
        NotFinite: on all ranks.
    """
    network.eval()
    own = {name: {} for name in targets.names}

    def look(batch: dict) -> dict:
        images = cut_images(batch, run.cfg.image.size, run.device)
        with autocast(run.device, run.cfg.precision):
            return network(images)

    batches = itertools.takewhile(lambda _: not run.stop, loader)
    for batch, outputs in in_parts(look, batches, run.say):
        for name, y in outputs.items():
            y = y.softmax(dim=1) if name in targets.classes else y
            y = y.unflatten(0, (-1, len(batch["index"]))).mean(dim=0)  # (views * B, K) -> (B, K)
            own[name].update(zip(batch["index"].tolist(), y.cpu().numpy(), strict=True))
    network.train()
    run.stop.raise_if_received()
    cases, parts, found = loader.dataset.data, distributed.gather_objects(own), {}
    for name in targets.names:
        rows = {i: row for part in parts for i, row in part[name].items()}
        found[name] = np.stack([rows[i] for i in range(len(cases))])
        pairs = zip(cases, found[name], strict=True)
        refuse_not_finite([case.patient for case, row in pairs if not np.isfinite(row).all()])
    return found | {name: targets.to_units(name, found[name][:, 0]) for name in targets.moments}
