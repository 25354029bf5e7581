"""report.html of a training run, and the box on top of it: what came of the run in a few lines."""

import json
from collections.abc import Sequence

import torch

from utils import distributed
from utils.report.page import Section, Slices, number
from utils.report.page import write_report as write_page
from utils.report.slices import worst_first
from utils.training import collapse
from utils.training.run import Run
from utils.training.state import State
from utils.weights import LoadReport

FINGERPRINT = "What is kept of them in the checkpoint, to tell scans that are unlike them."


def write_report(run: Run, state: State, title: str, pictures: dict[str, str]) -> None:
    """Write report.html from what was logged so far.

    pictures: {file in plots/: caption}; files that do not exist are left out.
    """
    log, report = run.log, LoadReport(**state.weights) if state.weights else None
    warnings = [*(report.warnings if report else []), *run.advised, *state.warnings.values()]
    told: dict[bool, list[str]] = {False: [], True: []}
    for p in log.skipped:
        told[p.is_notice].append(p.in_full)
    found = [(log.folder / "plots" / name, caption) for name, caption in pictures.items()]
    slices = [json.loads(p.read_text()) for p in sorted(log.folder.glob("plots/val_*.json"))]
    history = collapse.history(log.rows, state.first, run.cfg) if is_dino(run) else []
    sections = [
        Section("Warnings", [warnings], warning=True),
        Section("Cases left out", [told[False]], warning=True),
        Section("Cases worth a look", [told[True]], warning=True),
        Section("Last epoch", [log.rows[-1:]]),
        Section("Val cases at the last validation", [Slices(worst_first(slices))]),
        Section("Pictures", [item for item in found if item[0].exists()]),
        Section("Train cases", train_cases(state.about.get("fingerprint"), run.described)),
        Section("Signs of collapse, and in which epochs", [history]),
        Section("Epochs", [log.rows]),
        Section("Weights it started from", [report.rows() if report else {}]),
        Section("Settings", [run.cfg.model_dump(mode="json")]),
    ]
    write_page(log.folder / "report.html", title, sections, headline(run, state))


def is_dino(run: Run) -> bool:
    return hasattr(run.cfg, "dino")


def headline(run: Run, state: State) -> dict[str, str]:
    """Return {name: value} for the box on top of the report."""
    cfg, rows = run.cfg, {row["epoch"]: row for row in run.log.rows}
    weights = cfg.suprem_weights or getattr(cfg, "dino_weights", None)
    size = f"{number(run.counts['parameters'] / 1e6)} M parameters"
    left_out = len({p.row for p in run.log.skipped if not p.is_notice})
    cases = [f"{run.counts[part]} {part}" for part in ("train", "val")]
    chosen = state.best_epoch or state.epoch
    found = {
        "network": f"{cfg.backbone}, {size}",
        "started from": weights or "random weights",
        "cases": ", ".join(cases + [f"{left_out} left out"] * (left_out > 0)),
    }
    if is_dino(run):
        found["backbone.pt"] = f"epoch {chosen} of {cfg.n_epochs}, {why_chosen(run, state)}"
        found["collapse criteria"] = collapse.verdict(run.log.rows, state.first, cfg)
        scores = [k for k in rows[0] if k.endswith(("_linear_auc", "_dice"))] if 0 in rows else []
    else:
        found["best epoch"] = f"{chosen} of {cfg.n_epochs}, by {state.select_by}"
        scores = [state.select_by]
    for name in scores:
        found[name] = before_and_after(run.log.rows, name, chosen)
    found["worst class or target"] = worst_class(rows.get(chosen, {}))
    found["training took"] = in_words(sum(row.get("seconds") or 0 for row in run.log.rows))
    found["device"] = device_in_words(run)
    return {name: value for name, value in found.items() if value}


def train_cases(fingerprint: dict | None, described: Sequence[tuple[str, str]] = ()) -> list:
    """Return what the report says of a `data.prepare.fingerprint.summary` of the train cases, and
    what else is said of them; nothing without one."""
    if not fingerprint:
        return []
    rows = {"spacing x, y, z, mm": fingerprint["spacing"]}
    rows["size of the body x, y, z, mm"] = fingerprint["size"]
    channels = zip(fingerprint["modality"], fingerprint["intensity"], strict=True)
    for n, (modalities, spread) in enumerate(channels, 1):
        if spread:
            name = f"channel {n}, " * (len(fingerprint["modality"]) > 1) + " and ".join(modalities)
            unit = "HU" if modalities == ["CT"] else "of the range of data.percentiles (CT: HU)"
            rows[f"{name}: 5, 50 and 95 % of the body are below, {unit}"] = spread
    heads = ("lowest", "25 %", "median", "75 %", "highest")
    table = []
    for what, spread in rows.items():
        values = (spread["low"], *spread["quartiles"], spread["high"])
        cells = (", ".join(map(number, value)) for value in values)
        table.append({"of each case": what} | dict(zip(heads, cells, strict=True)))
    rest = [{"of all cases": name, "median (5 to 95 %)": text} for name, text in described]
    return [f"{FINGERPRINT} Of {fingerprint['cases']} cases, each number by itself:", table, rest]


def why_chosen(run: Run, state: State) -> str:
    """Return why backbone.pt is of its epoch."""
    if not run.cfg.probe.choose:
        return "the newest (probe.choose is false)"
    return f"the best by the probes of {', '.join(state.about['chosen_by'])}"


def before_and_after(rows: Sequence[dict], name: str, epoch: int) -> str | None:
    """Return the first value of a column and that of an epoch, or of the last before it."""
    known = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    after = [pair for pair in known if pair[0] <= epoch]
    if not after:
        return None
    first, last = known[0], after[-1]
    text = f"{number(last[1])} (epoch {last[0]})"
    return text if first == last else f"{number(first[1])} (epoch {first[0]}) → {text}"


def worst_class(row: dict) -> str | None:
    """Return the class, or target, with the lowest val Dice or AUC; None if there is only one."""
    for metric in ("dice", "auc"):
        ending = f"_{metric}"
        scores = {
            name.removeprefix("val_").removesuffix(ending): value
            for name, value in row.items()
            if name.startswith("val_") and name.endswith(ending) and name != f"val{ending}"
        }
        scores = {name: value for name, value in scores.items() if value is not None}
        if len(scores) > 1:
            worst = min(scores, key=scores.get)
            return f"{worst}, val_{metric} {number(scores[worst])}"
    return None


def in_words(seconds: float) -> str:
    """Return a duration as a person says it."""
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{int(hours)} h {minutes % 60:.0f} min"


def device_in_words(run: Run) -> str:
    """Return how many devices of which name the run uses."""
    if run.device.type == "cuda":
        name = torch.cuda.get_device_name(run.device)
    else:
        threads = torch.get_num_threads()
        name = f"{run.device.type.upper()}, {threads} thread" + "s" * (threads != 1)
    return f"{distributed.world_size()} × {name}"
