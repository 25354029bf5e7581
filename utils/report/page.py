"""report.html: all results of a run on one page that needs no other file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from utils.files import replacing


@dataclass(frozen=True)
class Section:
    """A heading and the items below it, in order; a section without items is left out of the page.

    An item is a str (a paragraph), a Path (a PNG file), a (Path, str) (a PNG file with a caption),
    a dict (a table of names and values, where nested dicts become dotted names), a list of dicts or
    a DataFrame (a table with a column for each key), or a list of str (a bullet list).
    `warning` draws the section so that it is not overlooked.
    """

    title: str
    items: Sequence
    warning: bool = False


STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --back: #ffffff; --soft: #f2f4f7;
  --line: #d5d9e0; --warn: #b54708; --warnback: #fff6e5; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6eb; --back: #16181c; --soft: #22262d;
  --line: #3a404a; --warn: #fdb022; --warnback: #33270f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 75rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
nav a { margin-right: 1.2rem; color: inherit; }
.scroll { overflow: auto; max-height: 32rem; border: 1px solid var(--line); width: fit-content;
  max-width: 100%; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.number { text-align: right; white-space: nowrap; }
thead th { position: sticky; top: 0; background: var(--soft); white-space: nowrap; }
tbody th { font-weight: 500; white-space: nowrap; }
figure { margin: .8rem 0; } figcaption { font-size: .87rem; opacity: .8; }
img { max-width: 100%; background: #ffffff; border: 1px solid var(--line); }
p, li { white-space: pre-wrap; overflow-wrap: anywhere; }
section.warning { border-left: .35rem solid var(--warn); background: var(--warnback);
  padding: .1rem 1rem; }
section.warning h2 { color: var(--warn); margin-top: .8rem; }
"""


def write_report(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write one self-contained HTML page, with embedded pictures and with all text escaped.

    Raises:
        ValueError: an item is of none of the kinds that `Section` lists.
        OSError: a picture cannot be read.
    """
    sections = [s for s in sections if any(len(i) if hasattr(i, "__len__") else 1 for i in s.items)]
    links = "".join(f'<a href="#s{n}">{escape(s.title)}</a>' for n, s in enumerate(sections))
    body = "\n".join(
        f'<section id="s{n}"{" class=warning" if s.warning else ""}>'
        f"<h2>{escape(s.title)}</h2>\n{''.join(map(_item, s.items))}</section>"
        for n, s in enumerate(sections)
    )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )
    with replacing(Path(path)) as file:
        file.write(page)


def _item(item) -> str:
    if isinstance(item, str):
        return f"<p>{escape(item)}</p>\n"
    if isinstance(item, Path):
        return _picture(item, "")
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Path):
        return _picture(*item)
    if isinstance(item, dict):
        return _table(None, [[name, value] for name, value in flat(item)])
    if hasattr(item, "to_dict"):
        item = item.to_dict("records")
    if isinstance(item, list) and all(isinstance(x, dict) for x in item):
        columns = list(dict.fromkeys(name for row in item for name in row))
        return _table(columns, [[row.get(c) for c in columns] for row in item])
    if isinstance(item, list) and all(isinstance(x, str) for x in item):
        return "<ul>" + "".join(f"<li>{escape(x)}</li>" for x in item) + "</ul>\n"
    raise ValueError(f"a report has no form for {type(item).__name__}: {item!r:.200}")


def _picture(path, caption):
    data = base64.b64encode(path.read_bytes()).decode()
    alt = escape(caption or path.stem)
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">{caption}</figure>\n'


def _table(columns, rows):
    """A table in HTML; the first cell of each row is the row's heading."""
    head = body = ""
    if columns is not None:
        names = "".join(f"<th>{escape(str(c))}</th>" for c in columns)
        head = f"<thead><tr>{names}</tr></thead>"
    for first, *others in rows:
        cells = "".join(map(_cell, others))
        body += f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>\n'
    return f'<div class="scroll"><table>{head}<tbody>\n{body}</tbody></table></div>\n'


def _cell(value):
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return f"<td{' class=number' if number else ''}>{_text(value)}</td>"


def _text(value):
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return "–"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return escape(str(value))


def flat(values, prefix=""):
    """Yield (dotted name, value) of nested dicts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def write_training_report(
    log,
    title: str,
    pictures: dict[str, str],
    warnings: Sequence[str],
    settings: dict,
    weights: dict | None = None,
) -> None:
    """Write <experiment>/report.html of a training run.

    Args:
        log: the RunLog of the run.
        pictures: {name of a file in plots/: caption}; files that do not exist are left out.
        warnings, settings: shown as they are.
        weights: what is known of the weights that the run started from; None: they were random.
    """
    told: dict[bool, list[str]] = {False: [], True: []}
    for p in log.skipped:
        told[p.is_notice].append(p.in_full)
    found = [(log.folder / "plots" / name, caption) for name, caption in pictures.items()]
    sections = [
        Section("Warnings", [list(warnings)], warning=True),
        Section("Cases left out", [told[False]], warning=True),
        Section("Cases worth a look", [told[True]], warning=True),
        Section("Last epoch", log.rows[-1:]),
        Section("Pictures", [item for item in found if item[0].exists()]),
        Section("Epochs", [log.rows]),
        Section("Weights it started from", [weights or {}]),
        Section("Settings", [settings]),
    ]
    write_report(log.folder / "report.html", title, sections)
