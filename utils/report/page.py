"""report.html: all results of a run on one page that needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.files import replacing

WIDE = 600  # pixels of a picture, beyond which a phone scrolls it instead of shrinking it
MAX_SHORT = 28  # letters of a cell that are kept on one line: an interval is not broken
PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Slices:
    """An item: cases whose slices can be looked through. cases: of `utils.report.slices.pack`."""

    cases: Sequence[dict]


@dataclass(frozen=True)
class Section:
    """A heading and the items below it, in order. Empty items and sections are left out.

    An item is a str (a paragraph), a Path (a PNG file), a (Path, str) (a PNG file with a caption),
    a dict (a table of names and values, where nested dicts become dotted names), a list of dicts or
    a DataFrame (a table with a column for each key; columns without any value are left out), a list
    of str (a bullet list), or Slices. `warning` draws the section so that it is not overlooked.
    """

    title: str
    items: Sequence
    warning: bool = False


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], headline: Mapping | None = None
) -> None:
    """Write one self-contained HTML page, with embedded pictures and with all text escaped.

    headline: {name: value} for the box on top; those without a value are left out.

    Raises:
        ValueError: an item is of none of the kinds that `Section` lists.
        OSError: a picture cannot be read.
    """
    shown = []
    for section in sections:
        items = [found for found in map(_item, section.items) if found[1]]
        if items:
            shown.append({"title": section.title, "warning": section.warning, "content": items})
    top = {name: text_of(value) for name, value in (headline or {}).items() if value is not None}
    has_slices = any(kind == "slices" for section in shown for kind, _ in section["content"])
    content = {"title": title, "headline": top, "sections": shown, "has_slices": has_slices}
    page = PAGES.get_template("page.html").render(content)
    with replacing(Path(path)) as file:
        file.write(page)


def number(value: float) -> str:
    """Return a measured number with the digits that every report shows."""
    size = abs(value)
    if size >= 1000 or not np.isfinite(value):
        return f"{value:.0f}"
    if size >= 9.9995:
        return f"{value:.1f}"
    return f"{value:.3f}" if size >= 0.01 or size == 0 else f"{value:.2g}"


def text_of(value) -> str:
    """Return a value as a table shows it."""
    if _is_empty(value):
        return "–"
    return number(value) if isinstance(value, float | np.floating) else str(value)


def _is_empty(value) -> bool:
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _item(item) -> tuple[str, object]:
    """The name of a macro of items.html and what it is given, which is empty for an empty item."""
    if isinstance(item, str):
        return "text", item
    if isinstance(item, Slices):
        return "slices", item.cases
    if isinstance(item, Path):
        return _picture(item, "")
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Path):
        return _picture(*item)
    if isinstance(item, dict):  # of settings and counts, which are shown to the last digit
        rows = [[name, value if value is None else str(value)] for name, value in flat(item)]
        return _table(None, rows)
    if hasattr(item, "to_dict"):
        item = item.to_dict("records")
    if isinstance(item, list) and all(isinstance(x, dict) for x in item):
        columns = list(dict.fromkeys(name for row in item for name in row))
        blank = [{c for c in columns if _is_empty(row.get(c)) or row[c] == ""} for row in item]
        full = [c for c in columns[1:] if not all(c in empty for empty in blank)]
        shown = columns[:1] + full
        rows = [[row.get(c) for c in shown] for row in item] if full or len(columns) == 1 else []
        return _table(shown, rows)
    if isinstance(item, list) and all(isinstance(x, str) for x in item):
        return "bullets", item
    raise ValueError(f"a report has no form for {type(item).__name__}: {item!r:.200}")


def _picture(path: Path, caption: str) -> tuple[str, dict]:
    png = path.read_bytes()
    wide = int.from_bytes(png[16:20], "big") > WIDE
    data = {"data": base64.b64encode(png).decode(), "wide": wide}
    return "picture", {"alt": caption or path.stem, "caption": caption, **data}


def _table(columns: list | None, rows: list[list]) -> tuple[str, dict | None]:
    """A table, whose first column is the rows' headings; None without rows."""
    cells = [[{"text": text_of(x), "look": _look(x)} for x in row] for row in rows]
    return "table", {"columns": columns, "rows": cells} if rows else None


def _look(value) -> str:
    """The class, in page.css, of a table's cell."""
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return "number"
    return "short" if len(str(value)) <= MAX_SHORT else "long"


def flat(values, prefix=""):
    """Yield (dotted name, value) of nested dicts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
