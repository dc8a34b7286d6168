"""Kills and write errors at random moments of every command that writes, many times over.

    python -m tests.benchmarks.torture [--kills 100] [--seed 0] [--commands convert train]

A process that has imported everything forks one child a blow. Each kind of SIGKILL takes its share of `--kills`: by the clock;
at a call to the file system; at a turn, that is a rename, the call after it, or a flush; in the middle of a write; as a file
reaches a size. Each kind of fault takes half as many. Every other time something older stands where the command writes, and it
is told `--overwrite`. Afterwards each file must be the old one, one that an undisturbed run puts there, or say of itself that
it is not finished; and going on from there must end with the bytes of an undisturbed run, nothing else left.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: forks are of a process without other threads

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="*", help="names; all of them without this")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, a line each")
    arguments = parser.parse_args()

    from tests.benchmarks.measure import header
    from tests.crashes.commands import build
    from tests.crashes.torture import FAULTS, KILLS, Torture

    if not arguments.json:
        header(f"blows to commands, {arguments.kills} SIGKILLs each, seed {arguments.seed}")
        titles = f"{'tried':>7}{'survived':>10}{'old':>6}{'nothing':>9}{'resumable':>11}{'new':>6}{'left .tmp':>11}{'failures':>10}"
        print(f"{'command':21}{'kind':20}{titles}", flush=True)
    failures: list[str] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        tempfile.tempdir = str(home)  # what is killed leaves its scratch directories there
        for command in build(home):
            if arguments.commands and command.name not in arguments.commands:
                continue
            torture = Torture(command, home / "work", arguments.seed)
            for kind in (*KILLS, *FAULTS):
                share = arguments.kills / len(KILLS) / (1 if kind in KILLS else 2)
                row = torture.hit(kind, max(1, round(share)))
                failures += row.failures
                if arguments.json:
                    print(json.dumps(vars(row)), flush=True)
                    continue
                stood = row.stood
                print(
                    f"{row.command:21}{row.kind:20}{row.tried:>7}{row.survived:>10}{stood['old']:>6}{stood['nothing']:>9}"
                    f"{stood['resumable']:>11}{stood['new']:>6}{row.left:>11}{len(row.failures):>10}",
                    flush=True,
                )
    if not arguments.json:
        print(f"\n{time.perf_counter() - began:.0f} s, {len(failures)} failures", *failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
