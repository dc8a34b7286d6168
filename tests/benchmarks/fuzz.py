"""Mutants of .sct files against the reader: each is read as it says or refused, soon and in little memory.

    python -m tests.benchmarks.fuzz --mutations 1000000 --seed 0

Head, tail, blobs, length and the index of a complete and of an incomplete file (`tests/formats/mutations.py`). A failure
is another exception than a `FormatError`, a second of the processor over one mutant, an accepted file whose content is not what its
checksums say, or an allocation beyond 64 MiB: all of them run under a limit of the address space (Linux) that much
above what the process held before, and one in 53 and every large one under tracemalloc, which gives the figure. Exits with 1 if there is
a failure; `--keep` says where to put the mutants that failed.
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Final

from tests.formats.mutations import BASES, KINDS, outcome

MOST_BYTES: Final = 64 << 20
MOST_SECONDS: Final = 1.0
WEIGHTS: Final = {"text of the index": 2, "values of the index": 3}
TRACED: Final = 53  # one in so many, and every one of over `LARGE` bytes
LARGE: Final = 100_000
RENEWED: Final = 1000  # after so many the limit counts from what the process has then


class Hang(Exception):  # noqa: N818 (an event, not an error of the reader)
    """A mutant took over a second."""


@dataclass
class Tally:
    """What became of the mutants."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: dict[str, float] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)
    traced: int = 0

    def run(self, path: Path, kind: str, data: bytes) -> bool:
        """Reads one mutant; whether all is well."""
        start = time.process_time()
        try:
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            result = outcome(path, data)
        except Exception as error:
            self.failures.append(f"{kind}: {type(error).__name__}: {error!s:.300}")
            return False
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        seconds = time.process_time() - start
        self.outcomes[kind, result] += 1
        self.slowest[result] = max(self.slowest.get(result, 0.0), seconds)
        return True

    def trace(self, path: Path, kind: str, data: bytes) -> bool:
        """Reads it once more, under tracemalloc: it may take 64 MiB or as much as its file has, if that is more."""
        tracemalloc.start()
        outcome(path, data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.traced += 1
        self.largest[kind] = max(self.largest.get(kind, 0), peak)
        if peak > max(MOST_BYTES, len(data)):
            self.failures.append(f"{kind}: {peak} bytes for a file of {len(data)}")
            return False
        return True

    def table(self) -> None:
        print(
            "\n| outcome | " + " | ".join(KINDS) + " | in all | slowest ms |\n|---" + "|---:" * (len(KINDS) + 2) + "|"
        )
        names = Counter[str]()
        for (_, result), count in self.outcomes.items():
            names[result] += count
        for result, count in names.most_common():
            counts = " | ".join(f"{self.outcomes[kind, result]:,}" for kind in KINDS)
            print(f"| {result} | {counts} | {count:,} | {self.slowest[result] * 1e3:.1f} |")
        sums = " | ".join(f"{sum(n for (k, _), n in self.outcomes.items() if k == kind):,}" for kind in KINDS)
        print(f"| all | {sums} | {self.outcomes.total():,} | {max(self.slowest.values(), default=0.0) * 1e3:.1f} |")
        largest = " | ".join(f"{self.largest.get(kind, 0) / 1e6:.2f}" for kind in KINDS)
        print(f"| largest allocation, MB ({self.traced:,} traced) | {largest} | | |")
        print(f"\nfailures: {len(self.failures)}")
        for line in self.failures[:20]:
            print(f"  {line}")


def limit_memory(more: int) -> str:
    """Lets this process have no more address space than it has and `more`; says whether it could."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return "not limited here"
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return f"limited to {more >> 20} MiB more"


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"over {MOST_SECONDS} s of the processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a directory for the mutants that failed")
    options = parser.parse_args()
    rng = Random(options.seed)
    bases = [make() for make in BASES.values()]
    kinds = [kind for kind in KINDS for _ in range(WEIGHTS.get(kind, 1))]
    shared = Path("/dev/shm")  # files that are never on a disk
    tally, start = Tally(), time.perf_counter()
    signal.signal(signal.SIGPROF, _hang)
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as directory:
        path = Path(directory) / "mutant.sct"
        tally.run(path, kinds[0], bases[0].signed())
        tally.outcomes.clear()  # that one was no mutant: it loads what the first one needs
        print(f"Python {platform.python_version()}, seed {options.seed}; memory {limit_memory(MOST_BYTES)}", flush=True)
        for number in range(options.mutations):
            if number % RENEWED == 0:
                limit_memory(MOST_BYTES)  # of a process whose heap has holes by now
            kind = rng.choice(kinds)
            data = KINDS[kind](rng, rng.choice(bases))
            passed = tally.run(path, kind, data)
            if passed and (number % TRACED == 0 or len(data) > LARGE):
                passed = tally.trace(path, kind, data)
            if not passed and options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{options.seed}-{number}.sct").write_bytes(data)
    seconds = time.perf_counter() - start
    tally.table()
    rate = options.mutations / time.process_time()
    print(f"{rate:,.0f} mutations a second of one core; {seconds:.0f} s by the clock")
    sys.exit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
