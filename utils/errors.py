"""Errors whose messages are meant for the user, and a helper to write them."""

from difflib import SequenceMatcher


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says which file, and why."""


class RunError(RuntimeError):
    """A run that has begun cannot go on; the message says why, and what to do."""


class NotFinite(RunError):
    """A network's outputs are NaN or infinite; the message names the patients."""


def nearest(word: str, choices: list[str]) -> str | None:
    """Return the choice most like `word` or its last dotted part; None if none is close."""

    def likeness(choice: str) -> tuple[float, float]:
        pairs = [(word, choice), (word.rpartition(".")[2], choice.rpartition(".")[2])]
        ratios = [SequenceMatcher(None, a.lower(), b.lower()).ratio() for a, b in pairs]
        return max(ratios), ratios[0]

    best = max(choices, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None
