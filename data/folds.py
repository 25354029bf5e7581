"""The classifier's cases by fold, also for the runs of a cross-validation, and their targets."""

import re
from collections.abc import Collection, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from data.cache import VolumeCache
from data.cases import Case, Problem
from data.prepare import Parts, load_cases, seen_problems
from data.targets import Targets

PATH_COLUMNS = ("path", "img_path")  # a segmentation CSV will do


def split(cases: Sequence[Case], cfg) -> Parts:
    """Cases by the lists of folds of a config."""
    folds = {"train": cfg.train_folds, "val": cfg.val_folds, "test": cfg.test_folds}
    return {name: [case for case in cases if case.fold in wanted] for name, wanted in folds.items()}


def all_folds(cfg) -> list[str]:
    return [*cfg.train_folds, *cfg.val_folds, *cfg.test_folds]


def load_to_train(cfg, runs: Sequence, cache: VolumeCache, check: bool, seen: Collection[str]):
    """What `load_cases` returns, of several runs (`rotations`) all cases as "train".

    seen: hashes of the patients that the weights to start from have seen.
    """
    whole = cfg
    if len(runs) > 1:
        changes = {"train_folds": all_folds(cfg), "val_folds": [], "test_folds": []}
        whole = cfg.model_copy(update=changes)
    columns = [*cfg.cls_targets, *cfg.reg_targets, *cfg.report_by]
    find = partial(target_problems, runs, () if cfg.allow_seen_patients else seen)
    return load_cases(whole, cache, columns, PATH_COLUMNS, check, find_problems=find)


def rotations(cfg) -> list:
    """A config for each run of a cross-validation over all folds that the config lists.

    Run i tests fold i, chooses its best epoch by the next one in the list (after the last: the
    first) and trains on the others. It writes to <results_dir>/<experiment>/fold_<name>.
    """
    folds, runs = all_folds(cfg), []
    plain = all(re.fullmatch(r"[\w-]{1,40}", fold, re.ASCII) for fold in folds)
    for i, fold in enumerate(folds):
        val = folds[(i + 1) % len(folds)]
        changes = {
            "results_dir": str(Path(cfg.results_dir) / cfg.experiment),
            "experiment": f"fold_{fold if plain else i}",
            "train_folds": [other for other in folds if other not in (fold, val)],
            "val_folds": [val],
            "test_folds": [fold],
        }
        runs.append(cfg.model_copy(update=changes))
    return runs


def target_problems(runs: Sequence, seen: Collection[str], parts: Parts) -> list[Problem]:
    """What is wrong with the targets of each run: what cannot be learned, or is in no train row.
    Also test cases that were seen, and of several runs patients in two folds."""
    cases, found, fold_of = list(chain(*parts.values())), [], {}
    columns = {name for case in cases for name in case.labels}  # one that is absent is no news
    for run in runs:
        names = [[n for n in ns if n in columns] for ns in (run.cls_targets, run.reg_targets)]
        own = split(cases, run)
        targets, problems = Targets.fit(own["train"], *names)
        found += problems + targets.check([*own["val"], *own["test"]])
        found += seen_problems(own["test"], seen, "suprem_weights or dino_weights")
    for case in cases if len(runs) > 1 else ():
        first = fold_of.setdefault(case.patient, case.fold)
        if first != case.fold:
            what = f"is in folds {first} and {case.fold}"
            found.append(Problem(case.row, case.patient, what, "patients"))
    return list(dict.fromkeys(found))
