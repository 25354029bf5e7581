"""The lock file against requirements.txt: the same versions, each with its hashes."""

import re

from tests.places import ROOT

PINNED = r"^([\w.-]+)==([^\s;\\]+)"


def test_everything_is_pinned_and_hashed():
    wanted = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.match(PINNED, line) for line in wanted)
    locked = re.split(r"\n(?=\w)", (ROOT / ".ci" / "requirements.lock").read_text())
    locked = [entry for entry in locked if not entry.startswith("#")]
    assert all(re.match(PINNED, entry) and "--hash=sha256:" in entry for entry in locked)
    versions = {re.match(PINNED, entry).groups() for entry in locked}
    assert {re.match(PINNED, line).groups() for line in wanted} <= versions, "make lock"
