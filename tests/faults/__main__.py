"""python -m tests.faults [--long] [group ...]: inject all faults, print one table.

Exit code 1 if anything was lost or silently wrong, or if a broken variant passed for right.
"""

import argparse
import sys
import time

from tests.faults.frame import is_bad, is_silent, run, table
from tests.faults.groups import GROUPS


def main() -> int:
    names = [group.name for group in GROUPS]
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--long", action="store_true", help="also what takes minutes")
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(names)}; all by default")
    options = parser.parse_args()
    unknown = set(options.groups) - set(names)
    if unknown:
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(names)}")

    results, blind = {}, []
    for group in GROUPS:
        if options.groups and group.name not in options.groups:
            continue
        started = time.monotonic()
        results[group.name] = list(run(group, group.subject, options.long))
        seconds = time.monotonic() - started
        print(f"{group.name}: {len(results[group.name])} faults, {seconds:.0f} s", flush=True)
        if group.note:
            print(f"  {group.note()}", flush=True)
        variants = group.variants if options.long or not group.thorough else {}
        for name, variant in variants.items():
            found = list(run(group, variant, long=group.thorough, every=group.every))
            wrong = sum(is_silent(outcome) for _, outcome in found)
            print(f"  broken variant, {name}: {wrong} of {len(found)} silently wrong", flush=True)
            blind += [] if wrong else [f"{group.name}: {name}"]

    print(f"\n{table(results)}\n")
    bad = [
        f"{name}: {fault.name}: {outcome.kind}: {outcome.detail}"
        for name, found in results.items()
        for fault, outcome in found
        if is_bad(fault, outcome)
    ]
    print("\n".join(bad + [f"{what}: this broken variant was not noticed" for what in blind]))
    return 1 if bad or blind else 0


if __name__ == "__main__":
    sys.exit(main())
