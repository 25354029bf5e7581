"""Run a segmenter over whole cases: predict, score and draw them."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import nn

from data.cache import VolumeCache
from data.cases import Case
from data.inference.restore import (
    decision_of,
    predict_case,
    read_shown,
    read_truth,
    write_prediction,
)
from data.standard import StandardForm
from data.volume import voxel_sizes
from utils import distributed
from utils.classes import Classes
from utils.config.segmentation import OF_THE_TEST
from utils.files import replacing
from utils.memory import explained
from utils.metrics.segmentation import by_class, case_dice, case_metrics, predicted_volumes
from utils.report.plots_segmentation import plot_overlay
from utils.report.segmentation import describe, file_name
from utils.report.slices import pack
from utils.sliding_window import averaged, mirrored
from utils.training.run import Run
from utils.training.step import autocast, refuse_not_finite
from utils.training.tested import about, checkpoints_of, facts_of, refuse_unlike
from utils.training.tested import open_tested as open_checkpoint


class Tested:
    """A checkpoint to be tested.

    Attributes:
        path, cfg: its config, but with the fields OF_THE_TEST of the current config.
        cache: a cache in its standard form. classes, weights: of the segmenter.
        seen_patients, chosen_by, fingerprint: see `utils.training.tested.facts_of`. about: see
            `about` there.
    """

    def __init__(self, path: str, cfg):
        """cfg: the current config. Raises CheckpointError for a file not of segmentation.py."""
        saved, self.cfg = open_checkpoint(path, "segmentation", cfg, OF_THE_TEST)
        self.path, self.classes = path, Classes.from_dict(saved["classes"])
        self.cache = VolumeCache(cfg.cache_dir, StandardForm.from_config(self.cfg.data))
        self.weights = saved["modules"]["segmenter"]
        self.seen_patients, self.chosen_by, self.fingerprint = facts_of(saved)
        self.about = about(path, saved)


def open_tested(cfg) -> list[Tested]:
    """Open the checkpoints of test_ckpt. Raises CheckpointError if they cannot be averaged."""
    tested = [Tested(path, cfg) for path in checkpoints_of(cfg.test_ckpt)]
    alike = [
        {"classes": one.classes, "data": one.cfg.data, "patches.size": one.cfg.patches.size}
        for one in tested
    ]
    refuse_unlike([one.path for one in tested], alike)
    return tested


def ensemble(run: Run, tested: Sequence[Tested], networks: Sequence[nn.Module]) -> tuple:
    """Return what predicts probabilities, the mean over networks and the mirror images that
    inference.mirror asks for; and warnings for the report."""
    mirror, classes = tested[0].cfg.inference.mirror, tested[0].classes
    axes, notes = [axis for axis, mirrored in enumerate(mirror) if mirrored], []
    unlike = [a for a in axes if not all(one.cfg.augment.flip[a] for one in tested)]
    if unlike:
        where = ", ".join("xyz"[axis] for axis in unlike)
        notes.append(f"inference.mirror along {where}, but trained without augment.flip there")
    pairs = classes.channels(tested[0].cfg.augment.mirror_pairs)
    return mirrored(probabilities(run, networks), axes, pairs), notes


def probabilities(run: Run, networks: Sequence[nn.Module]) -> Callable:
    """Return a function (B, C, x, y, z) -> (B, K, x, y, z), the mean of the networks' softmax or,
    of regions that overlap, of their sigmoids."""
    overlap = _classes(run).overlap

    def of(network: nn.Module) -> Callable:
        def predict(x: torch.Tensor) -> torch.Tensor:
            with autocast(run.device, run.cfg.precision):
                logits = network(x)
            return logits.float().sigmoid() if overlap else logits.float().softmax(dim=1)

        return predict

    return averaged([of(network.eval()) for network in networks])


def segment(run: Run, predict: Callable, entry) -> np.ndarray:
    """Return indices of `Classes` on the grid of the volume as read."""
    cfg, i = run.cfg, run.cfg.inference
    return predict_case(
        predict,
        entry,
        roi=cfg.patches.size,
        overlap=i.overlap,
        batch=i.batch,
        hu_window=cfg.data.hu_window,
        device=run.device,
        log=run.say,
        decide=decision_of(_classes(run)),
    )


def _classes(run: Run) -> Classes:
    return Classes.from_config(run.cfg.classes, run.cfg.ignore_labels)


def own_share(run: Run, cases: Sequence[Case]) -> Iterator[Case]:
    """Yield this rank's cases until a signal comes."""
    mine = cases[distributed.rank() :: distributed.world_size()]
    return itertools.takewhile(lambda _: not run.stop, mine)


def rows_of_all(run: Run, rows: list[dict], bad: list[str]) -> list[dict]:
    """Return the rows of all ranks. Raises NotFinite on all ranks if one has bad patients."""
    run.stop.raise_if_received()
    refuse_not_finite(bad)
    return list(itertools.chain(*distributed.gather_objects(rows)))


def predict_to(
    run: Run, predict: Callable, case: Case, entry, classes: Classes, path: Path
) -> np.ndarray:
    """Predict a case and write the prediction; return it as class indices."""
    with explained("the test", run.cfg):
        found = segment(run, predict, entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_prediction(path, found, classes, case, entry)
    return found


def predict_and_score(
    run: Run, predict: Callable, case: Case, entry, classes, files: Path
) -> list[dict]:
    """Predict a case, write the prediction into `files` and score it: one row per class."""
    name = f"{file_name(case.patient, case.row)}.nii.gz"
    found = predict_to(run, predict, case, entry, classes, files / name)
    spacing, tolerance = voxel_sizes(entry.original_affine), run.cfg.inference.tolerance

    def measure(found, truth, names) -> list[dict]:
        if truth is None:
            return predicted_volumes(found, spacing, names)
        return case_metrics(found, truth, spacing, names, tolerance)

    truth = read_truth(case, entry, classes) if case.seg_path else None
    rows = by_class(measure, found, truth, classes, case.labelled)
    who = {"PatientID": case.patient, "csv_line": case.row, "fold": case.fold, "prediction": name}
    return [who | row for row in rows]


def draw_case(path: Path, case: Case, entry, found, truth, classes: Classes) -> np.ndarray:
    """Draw prediction and truth (indices on the file's grid) as outlines on the image; beside the
    picture, *.json is what the report's viewer of slices is given."""
    turn = nib.io_orientation(entry.original_affine)
    image = read_shown(case, entry).voxels
    volumes = (image, found, truth)
    in_ras = [nib.apply_orientation(voxels, turn) for voxels in volumes]
    rows = by_class(case_dice, found, truth, classes, case.labelled)
    title = f"line {case.row} of the CSV: {describe(rows)}"
    title += f"; drawn on {case.drawn}" * bool(case.drawn)
    indices = [classes.indices_of(name) for name in classes.names]
    told = (entry.slice_spacing, classes.names, title)
    slices = pack(*in_ras, *told, {row["class"]: row["dice"] for row in rows}, indices)
    with replacing(path.with_suffix(".json")) as file:
        json.dump(slices, file)
    return plot_overlay(path, *in_ras, *told, indices)
