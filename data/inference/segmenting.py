"""Run a segmenter over whole cases: predict, score and draw them."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import nn

from data.cases import Case
from data.inference.restore import decision_of, predict_case, read_truth, write_prediction
from data.readers import read_volume
from data.volume import voxel_sizes
from utils import distributed
from utils.classes import Classes
from utils.memory import explained
from utils.metrics.segmentation import by_class, case_dice, case_metrics, predicted_volumes
from utils.report.plots_segmentation import plot_overlay
from utils.report.segmentation import describe, file_name
from utils.sliding_window import averaged
from utils.training.run import Run
from utils.training.step import autocast, refuse_not_finite


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


def predict_and_score(
    run: Run, predict: Callable, case: Case, entry, classes, files: Path
) -> list[dict]:
    """Predict a case, write the prediction into `files` and score it: one row per class."""
    with explained("the test", run.cfg):
        found = segment(run, predict, entry)
    name = f"{file_name(case.patient, case.row)}.nii.gz"
    write_prediction(files / name, found, classes, case, entry)
    spacing, tolerance = voxel_sizes(entry.original_affine), run.cfg.inference.tolerance

    def measure(found, truth, names) -> list[dict]:
        if truth is None:
            return predicted_volumes(found, spacing, names)
        return case_metrics(found, truth, spacing, names, tolerance)

    truth = read_truth(case, entry, classes) if case.seg_path else None
    rows = by_class(measure, found, truth, classes, case.labelled)
    who = {"PatientID": case.patient, "csv_line": case.row, "prediction": name}
    return [who | row for row in rows]


def draw_case(path: Path, case: Case, entry, found, truth, classes: Classes) -> np.ndarray:
    """Draw prediction and truth (indices on the file's grid) as outlines on the image."""
    turn = nib.io_orientation(entry.original_affine)
    image = read_volume(case.path, case.series_uid, entry.uneven_slices).voxels
    volumes = (image, found, truth)
    in_ras = [nib.apply_orientation(voxels, turn) for voxels in volumes]
    rows = by_class(case_dice, found, truth, classes, case.labelled)
    title = f"line {case.row} of the CSV: {describe(rows)}"
    title += f"; drawn on {case.drawn}" * bool(case.drawn)
    indices = [classes.indices_of(name) for name in classes.names]
    return plot_overlay(path, *in_ras, entry.slice_spacing, classes.names, title, indices)
