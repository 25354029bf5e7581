"""Files of the cache that blosc2 would run code from, or follow elsewhere: they are built anew.

Their checksums are right, as whoever may write into the cache can make them.
"""

import io
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import blosc2
import numpy as np
from blosc2.msgpack_utils import ExtType, msgpack_packb

from data.cache import VolumeCache
from data.cases import Case
from data.entry import _checks
from tests.faults.cache.cases import FORM, make_cases
from tests.faults.cache.damage import whole
from tests.faults.frame import RIGHT, WRONG, Fault, Group, Outcome

CODE = """
def kernel(inputs, output, offset=blosc2.schunk.os.mkdir({!r})):
    output[:] = 0
"""


def lazy(canary: Path) -> dict:
    """What blosc2 writes of a function of arrays; the function's text is run when it is read."""
    return {
        "kind": "lazyudf",
        "version": 1,
        "function_kind": "dsl",
        "dsl_version": 1,
        "name": "kernel",
        "udf_source": CODE.format(str(canary)),
        "dtype": "<i2",
        "shape": [8],
        "operands": {},
        "kwargs": {},
    }


def as_lazy_array(path: Path, canary: Path):
    array = blosc2.asarray(np.zeros(8, "<i2"), meta={"b2o": {"kind": "lazyudf", "version": 1}})
    array.schunk.vlmeta["b2o"] = lazy(canary)
    return array


def code_as_value(canary: Path) -> bytes:
    """The same where blosc2 keeps a plain value."""
    return msgpack_packb(ExtType(43, msgpack_packb(lazy(canary))))


def in_facts(path: Path, canary: Path):
    array = blosc2.asarray(np.zeros(8, "<i2"))
    array.schunk.vlmeta.set_vlmeta("facts", code_as_value(canary), typesize=1)
    return array


def as_proxy(path: Path, canary: Path):
    """Says that its values are in another file, which blosc2 then opens for writing."""
    source = {"local_abspath": str(canary.with_name("scan0.nii")), "urlpath": None}
    return blosc2.asarray(np.zeros(8, "<i2"), meta={"proxy-source": source})


def as_objects(path: Path, canary: Path):
    array = blosc2.ObjectArray()
    array.append({"x": 1})
    return array


def as_archive(path: Path, canary: Path) -> bytes:
    """A broken frame and, after it, a zip archive. blosc2.open finds a store of remote arrays in it
    and runs the code in its metadata even with deserialize="safe"."""
    store = blosc2.SChunk(meta={"b2remote_store": {"version": 1}})
    store.vlmeta.set_vlmeta("b2remote_manifest", code_as_value(canary), typesize=1)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("embed.b2e", store.to_cframe())
    frame = blosc2.asarray(np.zeros(8, "<i2")).to_cframe()
    return frame[:16] + bytes(8) + frame[24:] + archive.getvalue()  # a length of 0: is refused


def _foreign(make: Callable, folder: Path, subject: type) -> Outcome:
    case, canary = make_cases(folder, 1)[0], folder / "canary"
    cache = subject(folder / "cache", FORM)
    cache.get(case)
    made = make(cache.path(case), canary)
    frame = made if isinstance(made, bytes) else made.to_cframe()
    cache.path(case).write_bytes(frame + _checks(frame))
    outcome = whole(subject(folder / "cache", FORM), case)
    return Outcome(WRONG, "code from the file was run") if canary.exists() else outcome


FAULTS = [
    Fault("a function of arrays", partial(_foreign, as_lazy_array), RIGHT),
    Fault("code in the facts", partial(_foreign, in_facts), RIGHT),
    Fault("a proxy of another file", partial(_foreign, as_proxy), RIGHT),
    Fault("objects in place of an array", partial(_foreign, as_objects), RIGHT),
    Fault("an archive in place of an array", partial(_foreign, as_archive), RIGHT),
]


class OpeningCache(VolumeCache):
    """Broken: opens its files as blosc2's manual says."""

    deserialize = "safe"

    def get(self, case: Case):
        if self.has(case):
            array = blosc2.open(str(self.path(case)), mode="r", deserialize=self.deserialize)
            array.schunk.vlmeta["facts"]
        return super().get(case)


class BelievingCache(OpeningCache):
    """Broken: has blosc2 build all that a file describes."""

    deserialize = "full"


CACHE_CODE = Group(
    "cache, code in it",
    VolumeCache,
    FAULTS,
    {"blosc2.open": OpeningCache, 'deserialize="full"': BelievingCache},
)
