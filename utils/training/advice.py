"""Fine-tuning that goes wrong, in words, with what helps: read off the rows of metrics.csv.

The rules are few and late, so that a run that is well is left in peace.
"""

from collections.abc import Sequence

import numpy as np

from utils.training.run import Run
from utils.training.state import State

PATIENCE = 20  # epochs with a loss before it may be called flat, or a class never found
FLAT = 0.02  # relative fall of the loss from the first to the last five epochs
SOLVED = 0.05  # a loss that may well stay where it is
RISEN = 0.25  # relative, above the first epoch's: diverging, if it lasts RISEN_FOR epochs
RISEN_FOR = 3
NEVER_FOUND = 0.01  # val Dice
KINDS = ("loss rises", "loss stays flat", "class never found")


def note(run: Run, state: State) -> None:
    """Say once what the epochs so far warn of; the report has the warnings that still hold."""
    found = warnings_of(run.log.rows, run.cfg.n_epochs, run.cfg.learning_rate)
    for kind in found.keys() - state.warnings.keys():
        run.say(f"WARNING: {found[kind]}")
    others = {k: v for k, v in state.warnings.items() if not k.startswith(KINDS)}
    state.warnings = others | found


def warnings_of(rows: Sequence[dict], num_epochs: int, learning_rate: float) -> dict[str, str]:
    """Return {kind: text} of what the rows of metrics.csv so far warn of.

    num_epochs: of the whole run. learning_rate: its highest.
    """
    losses = [(row["epoch"], row["loss"]) for row in rows if row.get("loss") is not None]
    found = {}
    if len(losses) > RISEN_FOR and _rises([loss for _, loss in losses]):
        found["loss rises"] = (
            f"the train loss rises: {losses[0][1]:.3g} in epoch {losses[0][0]}, "
            f"{losses[-1][1]:.3g} in epoch {losses[-1][0]}. The learning rate is too high: try "
            f"learning_rate={learning_rate / 5:.1g}, a longer warmup_epochs, or clip_grad=1"
        )
    elif len(losses) >= max(PATIENCE, num_epochs / 4) and _is_flat([loss for _, loss in losses]):
        found["loss stays flat"] = (
            f"the train loss stays where it began ({losses[0][1]:.3g}, now {losses[-1][1]:.3g}): "
            "nothing is learned. Look in plots/ whether the window shows what is to be learned, "
            f"whether labels and scans belong together, and try learning_rate="
            f"{learning_rate * 5:.1g} and {learning_rate / 5:.1g}"
        )
    if rows and rows[-1]["epoch"] >= max(PATIENCE, num_epochs / 4):
        for name in _never_found(rows):
            found[f"class never found: {name}"] = (
                f"class {name} is never found: its val Dice is below {NEVER_FOUND} up to epoch "
                f"{rows[-1]['epoch']}. Is its label value right, and is it in many train masks? If "
                "it is small: a finer data.spacing, patches.foreground=0.67, more epochs"
            )
    return found


def _rises(losses: Sequence[float]) -> bool:
    limit = losses[0] + RISEN * abs(losses[0])
    return min(losses[-RISEN_FOR:]) > limit


def _is_flat(losses: Sequence[float]) -> bool:
    first, last = np.mean(losses[:5]), np.mean(losses[-5:])
    return last > SOLVED and last > first - FLAT * abs(first)


def _never_found(rows: Sequence[dict]) -> list[str]:
    """Return the classes whose val Dice was near 0 at least three times, and never more."""
    names = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in names if name.startswith("val_") and name.endswith("_dice")]
    scores = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return [
        name.removeprefix("val_").removesuffix("_dice")
        for name, values in scores.items()
        if len(values) >= 3 and max(values) < NEVER_FOUND
    ]
