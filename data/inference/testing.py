"""What a segmenter's test leaves behind, and its predictions without a CSV."""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from data.cache import VolumeCache
from data.cases import Case, Problem
from data.inference.restore import read_picture
from data.inference.segmenting import own_share, predict_and_score, predict_to, rows_of_all
from data.volume import voxel_sizes
from utils import distributed
from utils.classes import Classes
from utils.config.command_line import save_resolved
from utils.errors import NotFinite
from utils.metrics.segmentation import by_class, predicted_volumes
from utils.report.segmentation import in_words, write_predicted_report, write_test_report
from utils.training.run import Run
from utils.training.tested import joined


def test_cases(
    run: Run, predict: Callable, cases: Sequence[Case], cache: VolumeCache, classes, folder: Path
) -> list[dict]:
    """Predict the cases into <folder>/predictions and score them; return the rows of all ranks.

    Raises NotFinite on all ranks, with the patients.
    """
    files = folder / "predictions"
    files.mkdir(parents=True, exist_ok=True)

    def score(case: Case) -> list[dict]:
        return predict_and_score(run, predict, case, cache.get(case), classes, files)

    return _each(run, cases, score)


def _each(run: Run, cases: Sequence[Case], do: Callable[[Case], list[dict]]) -> list[dict]:
    """Return the rows of all cases, each by the rank whose share it is in."""
    rows, bad, total = [], [], -(-len(cases) // distributed.world_size())
    for case in tqdm(own_share(run, cases), "test", total, disable=distributed.no_bar()):
        try:
            rows += do(case)
        except NotFinite:
            bad.append(case.patient)
    return rows_of_all(run, rows, bad)


def report_test(
    run: Run,
    folder: Path,
    title: str,
    rows: Sequence[dict],
    cases: Sequence[Case],
    cache: VolumeCache,
    classes: Classes,
    notes: Sequence[str],
    **options,
) -> None:
    """Write all but the predictions to `folder`, on the main rank, and print the scores.

    rows: of `test_cases`; `prediction` is a path from <folder>/predictions. options: by_fold,
    about, num_pictures of `write_test_report`.
    """
    if not distributed.is_main():
        return
    cfg, case_of = run.cfg, {case.row: case for case in cases}
    file_of = {row["csv_line"]: row["prediction"] for row in rows}

    def read(line: int) -> dict:
        path = os.path.normpath(folder / "predictions" / file_of[line])
        return read_picture(case_of[line], cache.get(case_of[line]), classes, path)

    options |= {"notes": notes, "settings": cfg.model_dump(mode="json"), "classes": classes}
    content = (rows, classes.names, cfg.inference.tolerance, read)
    print(in_words(write_test_report(folder, title, *content, **options)))
    save_resolved(cfg, folder / "config.yaml")


def pooled(tests: Sequence[Mapping], folder: Path, places: Sequence[Path]) -> dict:
    """Join what `report_test` was given for the tests of the folds, whose predictions stay there.

    folder: of the pooled test. places: of the folds' tests.
    """
    rows, files = [], folder / "predictions"
    for found, place in zip(tests, places, strict=True):
        for row in found["rows"]:
            path = os.path.relpath(place / "predictions" / row["prediction"], files)
            rows.append(row | {"prediction": path})
    notes = dict.fromkeys(note for found in tests for note in found["notes"])
    cases = [case for found in tests for case in found["cases"]]
    about = joined([found["about"] for found in tests])
    return {**tests[0], "rows": rows, "notes": list(notes), "cases": cases, "about": about}


def predict_inputs(
    run: Run,
    predict: Callable,
    cases: Sequence[Case],
    cache: VolumeCache,
    classes: Classes,
    folder: Path,
    notices: Sequence[Problem],
    unlike: Mapping[int, Sequence[str]],
    about: Mapping,
) -> None:
    """Write a mask of each case into `folder`, named as its `patient` says; the volumes of all to
    volumes.csv, and pictures to report.html.

    notices, unlike: of `data.table.inputs.load_inputs`. about: of the network.
    """

    def one(case: Case) -> list[dict]:
        entry, path = cache.get(case), folder / f"{case.patient}.nii.gz"
        found = predict_to(run, predict, case, entry, classes, path)
        spacing = voxel_sizes(entry.original_affine)

        def measure(found, _, names) -> list[dict]:
            return predicted_volumes(found, spacing, names)

        volumes = by_class(measure, found, None, classes)
        row = {"name": case.patient, "path": case.path, "series_uid": case.series_uid or ""}
        row |= {f"{v['class']}_ml": round(v["volume_ml"], 4) for v in volumes}
        return [row | {"unlike_training": "; ".join(unlike.get(case.row, ()))}]

    rows = sorted(_each(run, cases, one), key=lambda row: row["name"])
    if not distributed.is_main():
        return
    with open(folder / "volumes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    case_of = {case.patient: case for case in cases}

    def read(name: str) -> dict:
        path = folder / f"{name}.nii.gz"
        return read_picture(case_of[name], cache.get(case_of[name]), classes, path)

    unlike = [f"{row['name']}: {row['unlike_training']}" for row in rows if row["unlike_training"]]
    told = [f"{problem.patient}: " * bool(problem.patient) + problem.what for problem in notices]
    title = f"Predictions of {run.cfg.experiment}"
    write_predicted_report(folder, title, rows, classes.names, read, unlike, told, about)
    save_resolved(run.cfg, folder / "config.yaml")
