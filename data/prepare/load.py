"""From the config to checked cases: make the demo data, read the CSV, check it, fill the cache."""

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from data.cache import VolumeCache
from data.cases import LABELLED, Case, CasesError, Problem, read_cases, split_bad
from data.demo.make import make_demo
from data.prepare.check import check_volumes, mask_labels, volume_notices
from data.prepare.masks import find_masks, mask_notices, mask_problems
from data.prepare.targets import Targets, minus_one
from utils import distributed
from utils.checkpoint import hash_patients
from utils.classes import Classes

DEMO = Path("demo_data")  # where the shipped YAML files point
PATH_COLUMNS = ("path", "img_path")  # a segmentation CSV will do
Parts = dict[str, list[Case]]  # "train", "val", "test"


def load_cases(
    cfg,
    cache: VolumeCache,
    label_columns: Sequence[str],
    path_columns: Sequence[str],
    check: bool,
    classes: Classes | None = None,
    optional_columns: Sequence[str] = (),
    needed: Sequence[str] = ("train", "test"),
    find_problems: Callable[[Parts], list[Problem]] = lambda parts: [],
) -> tuple[Parts, list[Problem]]:
    """Read and check the CSV and bring its volumes into the cache; every rank gets the same cases.

    Args:
        cfg: csv_path, the three lists of folds, test_ckpt, n_workers, data.
        check: read every row, whatever its fold, and write no volumes to the cache.
        classes: classes that train and val masks must hold; None: masks may be absent.
        optional_columns: label columns that the CSV need not have.
        needed: parts that must have a case; "test" counts only if test_ckpt is set.
        find_problems: returns further problems of the labels, those of the test rows included.
    Returns:
        {"train": cases, "val": cases, "test": cases} in the order of the rows, test empty unless
        test_ckpt is set; the problems of the cases that were left out, and notices of others
        (`Problem.is_notice`).
    Raises:
        CasesError: with all problems, if there are more than data.max_bad_cases allows or a needed
            part is left empty.
    """
    columns = (label_columns, path_columns, optional_columns)
    load = partial(_load, cfg, cache, columns, check, classes, needed, find_problems)
    found, error = None, None
    if distributed.is_main():
        try:
            found = load(cfg.n_workers)
        except CasesError as e:
            error = e
    error = distributed.gather_objects(error)[0]  # other ranks wait here until all is built
    if error is not None:
        raise error
    return found or load(0)


def _load(cfg, cache, columns, check, classes, needed, find_problems, n_workers):
    """Do the work of `load_cases` on one rank."""
    if Path(cfg.csv_path) in (DEMO / "demo.csv", DEMO / "segmentation.csv"):
        make_demo(DEMO)
    folds = _folds(cfg)
    channels = (cfg.data.channels, cfg.data.missing_channels)
    label_columns, path_columns, optional = columns
    optional = [*optional, LABELLED, *(name for name, _ in (classes.files if classes else ()))]
    columns = (label_columns, path_columns, optional)
    cases, problems = read_cases(cfg.csv_path, folds, *columns, *channels)
    cases, others = find_masks(cases, classes, Path(cfg.csv_path).resolve().parent)
    problems += others
    problems += find_problems(split(cases, cfg))
    if not check:
        unused = [] if cfg.test_ckpt else cfg.test_folds
        wanted = {fold for name in folds.values() for fold in name} - set(unused)
        cases = [case for case in cases if case.fold in wanted]
    progress = distributed.is_main()
    reading = (not check, n_workers, cfg.data.modality, progress, cfg.data.hu_window)
    problems += check_volumes(cases, cache, *reading)
    bad = {problem.row for problem in problems if not problem.is_notice}
    readable = [case for case in cases if case.row not in bad]
    notices = [problem for problem in problems if problem.is_notice]
    notices += volume_notices(readable, cache)
    problems = [problem for problem in problems if not problem.is_notice]
    if classes is not None:
        labels = mask_labels(readable, cache)
        problems += mask_problems(split(cases, cfg), labels, classes)
    try:
        good, skipped = split_bad(cases, problems, cfg.data.max_bad_cases)
    except CasesError as error:
        raise CasesError([*error.problems, *notices], error.heading) from None
    cases = split(good, cfg)
    needed = [name for name in needed if name != "test" or cfg.test_ckpt]
    empty = [f"{name}_folds: no case is left" for name in needed if not cases[name]]
    if empty:
        raise CasesError([*(Problem(0, "", what, "folds") for what in empty), *skipped])
    return cases, [*skipped, *notices]


def seen_problems(cases: Sequence[Case], seen: Collection[str], by: str) -> list[Problem]:
    """Return a problem for each row of a patient whose hash (utils.checkpoint.hash_patients) is
    among `seen`, those that `by` has seen."""
    what = f"{by} has seen this patient in training or pre-training"
    kind = "seen patients; allow_seen_patients=true lets them be"
    found = [case for case in cases if hash_patients([case.patient])[0] in seen]
    return [Problem(case.row, case.patient, what, kind) for case in found]


def refuse_seen(cases: Sequence[Case], seen: Collection[str], by: str, allow: bool) -> list[str]:
    """Refuse to test on patients that were seen, or return a warning for the report if allowed.

    Args:
        seen, by: see `seen_problems`. allow: allow_seen_patients of the config.
    Raises:
        CasesError: naming the rows.
    """
    problems = seen_problems(cases, seen, by)
    counts = f"{len(problems)} of {len(cases)} test rows"
    if problems and not allow:
        raise CasesError(problems, f"{counts} would be no test")
    return [f"No fair test: {by} has seen the patients of {counts}"] if problems else []


def fair_test(cases: Sequence[Case], tested: Sequence, allow: bool) -> list[str]:
    """Refuse to test on patients that checkpoints were trained on (see `refuse_seen`). Print and
    return warnings for the report: of those, if allowed, and of those by whose scores the best
    epoch was chosen.

    tested: checkpoints with seen_patients and chosen_by.
    """
    seen = set().union(*(one.seen_patients for one in tested))
    notes = refuse_seen(cases, seen, "test_ckpt", allow)
    chosen_by = set().union(*(one.chosen_by for one in tested))
    number = len(seen_problems(cases, chosen_by, "test_ckpt"))
    if number:
        what = f"No fair test: {number} of {len(cases)} test rows are of patients by whose val "
        notes.append(f"{what}scores the epoch of test_ckpt was chosen; the scores are too good")
    if distributed.is_main():
        print("".join(f"WARNING: {note}\n" for note in notes), end="")
    return notes


def split(cases: Sequence[Case], cfg) -> Parts:
    """Split cases into train, val and test by the lists of folds of a config."""
    return {name: [c for c in cases if c.fold in wanted] for name, wanted in _folds(cfg).items()}


def _folds(cfg) -> dict[str, list[str]]:
    return {"train": cfg.train_folds, "val": cfg.val_folds, "test": cfg.test_folds}


def all_folds(cfg) -> list[str]:
    return [*cfg.train_folds, *cfg.val_folds, *cfg.test_folds]


def load_to_train(cfg, runs: Sequence, cache: VolumeCache, check: bool, seen: Collection[str]):
    """Return what `load_cases` returns; for several runs (`rotations`) all cases are "train".

    seen: hashes of the patients that the initial weights have seen.
    """
    columns = [*cfg.cls_targets, *cfg.reg_targets, *cfg.report_by]
    find = partial(target_problems, runs, () if cfg.allow_seen_patients else seen)
    whole = _of_all_folds(cfg, runs)
    return load_cases(whole, cache, columns, PATH_COLUMNS, check, find_problems=find)


def _of_all_folds(cfg, runs: Sequence):
    """Return the config, for several runs with all folds as train folds."""
    changes = {"train_folds": all_folds(cfg), "val_folds": [], "test_folds": []}
    return cfg.model_copy(update=changes) if len(runs) > 1 else cfg


def load_masks(
    cfg, runs: Sequence, cache: VolumeCache, classes: Classes, check: bool, seen: Collection[str]
) -> tuple[Parts, list[Problem], list[Problem]]:
    """Return what `load_cases` returns for segmentation, to train or to test, and notices of the
    masks; for several runs (`rotations`) all cases are "train".

    seen: hashes of the patients that the initial weights have seen.
    """
    unseen = () if cfg.allow_seen_patients or len(runs) == 1 else seen
    find = partial(fold_problems, runs, unseen)
    columns = ([], PATH_COLUMNS[::-1])  # a classification CSV will do
    needed = ["test"] if cfg.test_ckpt else ["train"]
    options = {"needed": needed, "find_problems": find}
    cases, skipped = load_cases(
        _of_all_folds(cfg, runs), cache, *columns, check, classes, **options
    )
    every = list(chain(*cases.values()))
    labels = mask_labels(every, cache)
    lacking = [p for run in runs for p in mask_problems(split(every, run), labels, classes)]
    if lacking and len(runs) > 1:
        raise CasesError(list(dict.fromkeys(lacking)))
    return cases, skipped, mask_notices(cases, labels, classes)


def fold_notices(cfg, parts: Parts, cache: VolumeCache) -> list[Problem]:
    """Return the notices of the masks of one run of a cross-validation. cfg: of that run."""
    classes = Classes.from_config(cfg.classes, cfg.ignore_labels)
    return mask_notices(parts, mask_labels(list(chain(*parts.values())), cache), classes)


def rotations(cfg) -> list:
    """Return a config for each run of a cross-validation over all folds that the config lists.

    Run i tests on fold i, chooses its best epoch by the next fold in the list (after the last: the
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
    """Return the problems of each run: targets that cannot be learned or are in no train row, and
    those of `fold_problems`."""
    cases, found = list(chain(*parts.values())), []
    columns = {name for case in cases for name in case.labels}  # absent ones are reported elsewhere
    for run in runs:
        names = [[n for n in ns if n in columns] for ns in (run.cls_targets, run.reg_targets)]
        own = split(cases, run)
        targets, problems = Targets.fit(own["train"], *names)
        found += problems + targets.check([*own["val"], *own["test"]])
        found += chain(*(minus_one(name, own["train"]) for name in targets.names))
    return list(dict.fromkeys(found + fold_problems(runs, seen, parts)))


def fold_problems(runs: Sequence, seen: Collection[str], parts: Parts) -> list[Problem]:
    """Return test cases that the initial weights have seen and, of several runs, patients in two
    folds."""
    cases, found, fold_of = list(chain(*parts.values())), [], {}
    for run in runs:
        by = "suprem_weights or dino_weights"
        found += seen_problems(split(cases, run)["test"], seen, by)
    for case in cases if len(runs) > 1 else ():
        first = fold_of.setdefault(case.patient, case.fold)
        if first != case.fold:
            what = f"is in folds {first} and {case.fold}"
            found.append(Problem(case.row, case.patient, what, "patients"))
    return list(dict.fromkeys(found))
