"""How a cell of the CSV names a part of a file or series: after its path and a colon.

dwi.nii.gz:3 is a volume of a 4D file, from 0. series5:EchoTime=4.92 is what has this value in
DICOM's headers, by the names of their elements; several are joined: x.dcm:StackID=1:EchoTime=4.92.
"""

import os
import re
from collections.abc import Mapping

PART = re.compile(r"(.+?)(:\d+|(?::[A-Z][A-Za-z]*=[^:]*)+)", re.DOTALL)


def split_part(path: str | os.PathLike) -> tuple[str, int | dict[str, str] | None]:
    """Return file or folder, and the part of it: a volume's number, {element: value} or None.

    A file that is really there under the whole name has no part.
    """
    path = os.fspath(path)
    found = PART.fullmatch(path)
    if not found or os.path.lexists(path):
        return path, None
    if "=" not in found[2]:
        return found[1], int(found[2][1:])
    return found[1], dict(pair.split("=", 1) for pair in found[2][1:].split(":"))


def spelled(path: str | os.PathLike, part: Mapping[str, str]) -> str:
    """Return the cell that names a part."""
    return ":".join([os.fspath(path), *(f"{name}={value}" for name, value in part.items())])
