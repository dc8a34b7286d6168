"""Dense checkpoints spoiled by a seed, many times: what the readers make of them.

    python -m tests.benchmarks.fuzz_sources --mutations 200000 --seed 0

Prints for each kind of file how many were read and how many refused, by error class, the slowest one in processor time and
the largest allocation that Python and numpy made. A failure is any other exception, a message of more than one line, more
than a second, or more than 64 MiB; with `--address-space` the process may not map more than so many MiB beyond its start
either, whoever asks for them. What fails is kept in `--keep`, if that is given.
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.measure import header
from tests.hostile_sources import KINDS, Kind, refusal

SLOW = 1.0
LARGE = 64 << 20


@dataclass
class Tally:
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    largest: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, kind: Kind, path: Path, data: bytes) -> bool:
        """Reads one file; whether all was as it should be."""
        tracemalloc.reset_peak()
        before, start = tracemalloc.get_traced_memory()[0], time.process_time()
        try:
            error = refusal(kind, path, data)
            outcome = "read" if error is None else type(error).__name__
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = "failed"
            self.failures.append(f"{type(error).__name__}: {str(error)[:160]!r}")
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
        self.outcomes[outcome] += 1
        self.slowest, self.largest = max(self.slowest, seconds), max(self.largest, peak)
        if seconds > SLOW or peak > max(LARGE, len(data)):
            self.failures.append(f"{seconds:.2f} s, {peak} bytes")
            return False
        return outcome != "failed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=20_000, help="files in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--address-space", type=int, default=512, metavar="MIB", help="0 for no limit")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to keep what fails")
    options = parser.parse_args()
    header(f"fuzz of dense sources: {options.mutations} files, seed {options.seed}")
    tallies = {name: Tally() for name in options.kinds}
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="sctconv-fuzz-") as directory:
        path = Path(directory) / "file"
        for kind in KINDS.values():  # what is imported when first used is no allocation of a file's
            assert refusal(kind, path, kind.sound()) is None
        if options.address_space:
            limit = _mapped() + (options.address_space << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        tracemalloc.start()
        for place in range(options.mutations):
            name = options.kinds[place % len(options.kinds)]
            data = KINDS[name].spoil(rng)
            if not tallies[name].add(KINDS[name], path, data) and options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{name}-{options.seed}-{place}").write_bytes(data)
    _print(tallies)
    raise SystemExit(any(tally.failures for tally in tallies.values()))


def _mapped() -> int:
    """Bytes of address space in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _print(tallies: dict[str, Tally]) -> None:
    print("| kind | files | outcomes | slowest ms | largest allocation kB | failures |\n|---|---|---|---|---|---|")
    for name, tally in tallies.items():
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in tally.outcomes.most_common())
        print(
            f"| {name} | {tally.outcomes.total()} | {outcomes} | {tally.slowest * 1e3:.1f} | {tally.largest / 1e3:.0f} "
            f"| {len(tally.failures)} |"
        )
    for name, tally in tallies.items():
        for failure, count in Counter(tally.failures).most_common(10):
            print(f"{name}: {count} x {failure}")


if __name__ == "__main__":
    main()
