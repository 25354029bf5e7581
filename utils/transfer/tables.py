"""From the rows of all runs to what they say: learning rates, scores, comparisons, convergence.

A row without a score is of a run that failed. Draws are the units of every mean and test: runs of
a draw with several seeds count with their mean.
"""

import math
from collections.abc import Sequence

import numpy as np

from utils.transfer.statistics import holm, sign_flip_test, t_interval

SHARE = 0.95  # of the final score of random weights, which is to be reached


def mean_by_draw(rows: Sequence[dict], **where) -> dict[int, float]:
    """Return {draw: mean score over seeds} of the rows with these values."""
    scores: dict[int, list[float]] = {}
    for row in rows:
        if "score" in row and all(row[key] == value for key, value in where.items()):
            scores.setdefault(row["draw"], []).append(row["score"])
    return {d: float(np.mean(found)) for d, found in sorted(scores.items())}


def choose_rates(rows: Sequence[dict], arms: Sequence[str], rates: Sequence[float]) -> dict:
    """Return {"chosen": {arm: rate or None}, "scores": {arm: {rate: mean}}} of the tuning runs.

    The best mean over the draws is taken, of equal ones the lowest rate. A run that failed counts
    as 0, since a rate at which training fails is a bad one; None: all runs of the arm failed.
    """
    if len(rates) == 1:
        return {"chosen": dict.fromkeys(arms, rates[0]), "scores": {}}
    chosen, scores = {}, {}
    for arm in arms:
        of_arm = [row for row in rows if row["arm"] == arm]
        found = {
            rate: float(
                np.mean([r.get("score", 0.0) for r in of_arm if r["learning_rate"] == rate])
            )
            for rate in rates
        }
        scores[arm] = {f"{rate:g}": value for rate, value in found.items()}
        done = any("score" in row for row in of_arm)
        chosen[arm] = max(rates, key=lambda rate: found[rate]) if done else None
    return {"chosen": chosen, "scores": scores}


def keep_rates(earlier: dict, now: dict) -> dict:
    """Return the earlier `choose_rates`, but the new one of arms whose runs had all failed."""
    failed = [arm for arm, rate in earlier["chosen"].items() if rate is None]
    return {part: earlier[part] | {arm: now[part][arm] for arm in failed} for part in earlier}


def score_table(rows: Sequence[dict]) -> list[dict]:
    """Return a row for each method, arm and number of labels: mean and sd of the score over draws,
    and the means of each class or target."""
    keys = list(dict.fromkeys((r["method"], r["arm"], r["labels"]) for r in rows))
    names = [n for n in dict.fromkeys(n for r in rows for n in r.get("classes", ()))]
    table = []
    for method, arm, labels in keys:
        where = {"method": method, "arm": arm, "labels": labels}
        scores = [*mean_by_draw(rows, **where).values()]
        row = where | {"draws": len(scores), "mean": None, "sd": None}
        if scores:
            row["mean"] = float(np.mean(scores))
            row["sd"] = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
        of_it = [r for r in rows if all(r[k] == v for k, v in where.items()) and "score" in r]
        for name in names:
            values = [r["classes"][name] for r in of_it if r["classes"].get(name) is not None]
            row[name] = float(np.mean(values)) if values else None
        table.append(row)
    return table


def comparisons(rows: Sequence[dict], pairs: Sequence[tuple[str, str]]) -> list[dict]:
    """Return a row for each method, pair of arms and number of labels.

    Each has the mean difference of the draws that both arms have, its 95 % t interval, the p of
    the sign-flip test, and that p by Holm over the numbers of labels of the method and pair.
    """
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for arm, other in pairs:
            family = []
            for labels in sorted({row["labels"] for row in rows}):
                where = {"method": method, "labels": labels}
                one, two = (mean_by_draw(rows, arm=name, **where) for name in (arm, other))
                differences = [one[d] - two[d] for d in one if d in two]
                if not differences:
                    continue
                low, high = t_interval(differences) or (None, None)
                entry = {"method": method, "arm": arm, "against": other, "labels": labels}
                entry |= {"draws": len(differences), "difference": float(np.mean(differences))}
                entry |= {"low": low, "high": high, "p": sign_flip_test(differences)}
                family.append(entry)
            adjusted = holm([entry["p"] for entry in family])
            table += [e | {"p_holm": p} for e, p in zip(family, adjusted, strict=True)]
    return table


def steps_to(target: float, curve: dict[int, float]) -> tuple[float, str]:
    """Return after how many steps a curve {steps: score} first reaches a score.

    Between two lengths it is interpolated in the logarithm of the steps. The text is "" or a sign:
    "<=" if the shortest length reaches it, ">" if none does and the longest is returned.
    """
    lengths = sorted(curve)
    for i, steps in enumerate(lengths):
        if curve[steps] >= target:
            if i == 0:
                return float(steps), "<="
            before = lengths[i - 1]
            part = (target - curve[before]) / (curve[steps] - curve[before])
            return float(before * (steps / before) ** part), ""
    return float(lengths[-1]), ">"


def convergence(rows: Sequence[dict], arms: Sequence[str], baseline: str) -> list[dict]:
    """Return a row for each arm: steps to 95 % of the final score of random weights.

    The final score is that of the longest schedule in the same draw. Steps and their ratios are
    geometric means over the draws in which the arm and the baseline have every length; the interval
    and the p are those of the logarithms of the ratios. Where the score is reached by the shortest
    length, or by none, that length or the longest counts, and the row says in how many draws.

    rows: of one number of labels, with the lengths alone.
    """
    lengths = sorted({row["steps"] for row in rows})

    def curves(arm: str) -> dict[int, dict[int, float]]:
        by_length = {t: mean_by_draw(rows, arm=arm, steps=t) for t in lengths}
        draws = set.intersection(*(set(found) for found in by_length.values()))
        return {d: {t: by_length[t][d] for t in lengths} for d in sorted(draws)}

    table, base = [], curves(baseline) if lengths else {}
    for arm in arms if base else ():
        pairs = {d: curve for d, curve in curves(arm).items() if d in base}
        targets = {d: SHARE * base[d][lengths[-1]] for d in pairs}
        found = [steps_to(targets[d], curve) for d, curve in pairs.items()]
        against = [steps_to(targets[d], base[d])[0] for d in pairs]
        if not found:
            continue
        signs = [sign for _, sign in found]
        entry = {"arm": arm, "draws": len(found)}
        entry["steps"] = math.exp(np.mean([math.log(steps) for steps, _ in found]))
        entry |= {"at the shortest": signs.count("<="), "never": signs.count(">")}
        if arm != baseline:
            logs = [math.log(b / s) for (s, _), b in zip(found, against, strict=True)]
            interval = t_interval(logs)
            entry["times as fast"] = math.exp(np.mean(logs))
            entry |= {"low": None, "high": None}
            if interval:
                entry |= dict(zip(("low", "high"), map(math.exp, interval), strict=True))
            entry["p"] = sign_flip_test(logs)
        table.append(entry)
    return table
