"""From the config to cases that can be trained on: the demo, the CSV, the check, the cache."""

from collections.abc import Sequence
from pathlib import Path

from data.cache import VolumeCache
from data.cases import Case, CasesError, Problem, read_cases, split_bad
from data.check import check_volumes
from data.demo import make_demo
from utils import distributed

DEMO_CSV = Path("demo_data/demo.csv")  # what the shipped YAML files point at


def load_cases(
    cfg, cache: VolumeCache, label_columns: Sequence[str], path_columns: Sequence[str], check: bool
) -> tuple[dict[str, list[Case]], list[Problem]]:
    """Read and check the CSV and bring its volumes into the cache; every rank gets the same cases.

    Args:
        cfg: csv_path, the three lists of folds, test_ckpt, n_workers, data.
        check: read every row, whatever its fold, and write no volumes to the cache.
    Returns:
        {"train": cases, "val": cases, "test": cases} in the order of the rows; test is left empty
        unless test_ckpt is set. The problems of the cases that were left out.
    Raises:
        CasesError: with all problems, when they are more than data.max_bad_cases allows or leave no
            case to train on.
    """
    found, error = None, None
    if distributed.is_main():
        try:
            found = _load(cfg, cache, label_columns, path_columns, check, cfg.n_workers)
        except CasesError as e:
            error = e
    error = distributed.gather_objects(error)[0]  # the others wait here until all is built
    if error is not None:
        raise error
    return found or _load(cfg, cache, label_columns, path_columns, check, 0)


def _load(cfg, cache, label_columns, path_columns, check, n_workers):
    """What `load_cases` says, on one rank."""
    if Path(cfg.csv_path) == DEMO_CSV:
        make_demo(DEMO_CSV.parent)
    folds = {"train": cfg.train_folds, "val": cfg.val_folds, "test": cfg.test_folds}
    cases, problems = read_cases(cfg.csv_path, folds, label_columns, path_columns)
    if not check:
        unused = [] if cfg.test_ckpt else cfg.test_folds
        wanted = {fold for name in folds.values() for fold in name} - set(unused)
        cases = [case for case in cases if case.fold in wanted]
    progress = distributed.is_main()
    problems += check_volumes(cases, cache, not check, n_workers, cfg.data.modality, progress)
    good, skipped = split_bad(cases, problems, cfg.data.max_bad_cases)
    cases = {name: [c for c in good if c.fold in wanted] for name, wanted in folds.items()}
    needed = ["train", "test"] if cfg.test_ckpt else ["train"]
    empty = [f"{name}_folds: no case is left" for name in needed if not cases[name]]
    if empty:
        raise CasesError([*(Problem(0, "", what, "folds") for what in empty), *skipped])
    return cases, skipped
