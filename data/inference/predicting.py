"""Predictions of trained classifiers, and of the control, for cases."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

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
from utils.config.command_line import save_resolved
from utils.memory import in_parts
from utils.metrics.predictions import Predictions, pool, write_inputs
from utils.report.classification import in_words, write_test_report
from utils.report.plots import plot_crops, views_of
from utils.report.plots_classification import writable
from utils.training.run import Run
from utils.training.step import autocast, refuse_not_finite
from utils.training.tested import about, checkpoints_of, facts_of, joined, refuse_unlike
from utils.training.tested import open_tested as open_checkpoint


class Tested:
    """A checkpoint to be tested.

    Attributes:
        path, cfg: its config, but with the fields OF_THE_TEST of the current config.
        cache: a cache in its standard form.
        targets: of its training. weights: of the classifier.
        seen_patients, chosen_by, fingerprint: see `utils.training.tested.facts_of`. about: see
            `about` there.
    """

    def __init__(self, path: str, cfg):
        """cfg: the current config. Raises CheckpointError for a file not of classification.py."""
        saved, self.cfg = open_checkpoint(path, "classification", cfg, OF_THE_TEST)
        self.path, self.targets = path, Targets.from_dict(saved["classes"])
        self.cache = VolumeCache(cfg.cache_dir, standard_form(self.cfg))
        self.seen_patients, self.chosen_by, self.fingerprint = facts_of(saved)
        self.about = about(path, saved)
        self.weights = saved["modules"]["classifier"]
        self._control = Control.from_dict(saved["control"])

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
    tested = [Tested(path, cfg) for path in checkpoints_of(cfg.test_ckpt)]
    learned = [{"classes": x.targets.classes, "numbers": [*x.targets.moments]} for x in tested]
    refuse_unlike([x.path for x in tested], learned)
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


def pooled(tests: Sequence[dict]) -> dict:
    """Join what `write_test_report` was given for the tests of the folds."""
    content = dict(tests[0])
    for name in ("predictions", "control"):
        content["cases"], content[name] = pool([(t["cases"], t[name]) for t in tests])
    content["notes"] = list(dict.fromkeys(note for t in tests for note in t["notes"]))
    content["about"] = joined([t["about"] for t in tests])
    return content


def report_test(cfg, folder: Path, content: dict, by_fold: bool = False) -> None:
    """Write a test to `folder`, on the main rank, and print its scores.

    cfg: the config that is saved with it. content, by_fold: what `write_test_report` is given.
    """
    if distributed.is_main():
        title = f"{'Cross-validation' if by_fold else 'Test'} of {cfg.experiment}"
        print(in_words(write_test_report(folder, title, **content, by_fold=by_fold)))
        save_resolved(cfg, folder / "config.yaml")


def report_inputs(
    one: Tested, folder: Path, cases: Sequence[Case], predictions: Predictions, unlike: Mapping
) -> None:
    """Write predictions without a truth to `folder`, on the main rank.

    one: the first checkpoint. unlike: of `data.table.inputs.load_inputs`.
    """
    if distributed.is_main():
        write_inputs(folder / "predictions.csv", one.targets, cases, predictions, unlike)
        save_resolved(one.cfg, folder / "config.yaml")


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


def draw_inputs(run: Run, loaders: dict) -> None:
    """Draw plots/inputs.png: what the network sees of some cases, and their labels."""
    views, texts, cfg = {}, {}, run.cfg
    targets = [*cfg.cls_targets, *cfg.reg_targets]
    for name, loader in loaders.items():
        items = [loader.dataset[key] for key in loader.sampler.global_keys()[:3]]
        images = cut_images(collate(items), cfg.image.size, run.device)
        shown = views_of(images, name, cfg.data.channels)
        labels = [loader.dataset.data[item["index"]].labels for item in items]
        told = [[writable(f"{t}: {of.get(t) or '–'}") for t in targets] for of in labels]
        texts |= dict.fromkeys(shown, ["\n".join(lines) for lines in told])
        views |= shown
    picture = plot_crops(run.folder / "plots" / "inputs.png", views, texts=texts)
    run.log.image("inputs", picture, 0)
