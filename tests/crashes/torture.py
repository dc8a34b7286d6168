"""Commands that are killed, or find no room, at random moments: what stands afterwards, and whether it can be gone on with."""

from __future__ import annotations

import collections
import errno
import json
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sctconv.formats.errors import FormatError, NotSctError
from sctconv.formats.reader import SctFile

from .calls import Act, At, Count, FailAt, FullDisk, ShortWrites, TornWrite, install, send
from .children import Ended, run
from .commands import LEFTOVER, Command, digest, snapshot

KILLS: Final = ("SIGKILL by time", "SIGKILL at a call", "SIGKILL at a turn", "SIGKILL in a write", "killed at a size")
FAULTS: Final = ("write error", "full disk", "file size limit", "short writes", "SIGINT at a call", "SIGTERM at a call")
_STOPS: Final = ("SIGINT at a call", "SIGTERM at a call")


@dataclass
class Row:
    """What came of one kind of blow to one command.

    Attributes:
        tried: blows.
        survived: commands that ended well all the same: too late a blow, or none that matters.
        stood: what stood afterwards -> how often.
        left: blows after which a temporary was left, which the next run removed.
        failures: what went wrong, a line each.
    """

    command: str
    kind: str
    tried: int = 0
    survived: int = 0
    stood: collections.Counter[str] = field(default_factory=collections.Counter)
    left: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Blow:
    """How a run is to be hit: what to set up in its process, and when to kill it from outside."""

    place: str
    prepare: Callable[[Path], None] = lambda room: None
    kill_after: float | None = None


class Torture:
    """All blows to one command.

    Args:
        command: see there.
        home: a directory to work in.
        seed: of what is random.
    """

    def __init__(self, command: Command, home: Path, seed: int = 0) -> None:
        self.command, self.home, self.random = command, home, random.Random(f"{seed} {command.name}")
        self._seen: dict[frozenset[tuple[str, str]], str | None] = {}
        self._undisturbed()

    def _undisturbed(self) -> None:
        """Learns what the command writes, in how many calls, and how long it takes."""
        command = self.command
        self.old = self._room("old")
        self._expect(run(self.old, command.other), command.other)
        command.old = snapshot(self.old)
        again, versions = self._watched("again", *command.every)
        self.whole, more = self._watched("new")
        command.new, twin = (
            {name: value for name, value in snapshot(room).items() if name in command.whole}
            for room in (self.whole, again)
        )
        assert command.new == twin, f"{command.name} does not write the same twice"
        command.versions = versions | more | set(command.new.values())
        self.size = max(path.stat().st_size for path in self.whole.rglob("*") if path.is_file())

    def _watched(self, name: str, *more: str) -> tuple[Path, frozenset[str]]:
        """Where the command was run, over an old output, and digests of all files that it put in a place."""
        room, told = self._room(name), self.home / "told"
        versions: set[str] = set()
        shutil.copytree(self.old, room, dirs_exist_ok=True)

        def watch(event: str, path: str) -> None:
            if event == "os.rename" and Path(path).is_file():
                versions.add(digest(Path(path)))

        def tell() -> None:
            turns = sorted(count.turns)
            told.write_text(json.dumps([count.calls, count.writes, turns, sorted(versions)]))

        count = Count(watch)
        words = [*self.command.words, "--overwrite", *more]
        ended = run(room, words, prepare=lambda: install(room, count), finish=tell)
        self._expect(ended, words)
        self.calls, self.writes, self.turns, found = json.loads(told.read_text())
        self.seconds = ended.seconds
        return room, frozenset(found)

    def _room(self, name: str) -> Path:
        room = self.home / name
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir(parents=True)
        return room

    @staticmethod
    def _expect(ended: Ended, words: list[str]) -> None:
        assert ended.code == 0, f"{' '.join(words)}: {ended.code}: {ended.said}"

    def hit(self, kind: str, times: int) -> Row:
        """So many blows of one kind, every other one where something stands already."""
        row = Row(self.command.name, kind)
        for place in range(times):
            share = min(0.999, (place // 2 + self.random.random()) / max(1, times / 2))
            self._hit(row, self._blow(kind, share), is_anew=place % 2 == 0)
        return row

    def _blow(self, kind: str, share: float) -> _Blow:
        """A blow at about this share of the run."""
        call = 1 + int(share * self.calls)
        size = 512 + int(share**2 * self.size)  # there are more small files; not so small that stderr, one too, is cut
        turn = self.turns[int(share * len(self.turns))]
        acts: dict[str, Act] = {
            "SIGKILL at a call": At(call, send(signal.SIGKILL)),
            "SIGKILL at a turn": At(turn, send(signal.SIGKILL)),
            "SIGKILL in a write": TornWrite(1 + int(share * self.writes), self.random.random()),
            "write error": FailAt(call, errno.EIO),
            "full disk": FullDisk(call),
            "short writes": ShortWrites(call),
            "SIGINT at a call": At(call, send(signal.SIGINT)),
            "SIGTERM at a call": At(call, send(signal.SIGTERM)),
        }
        act = acts.get(kind)
        if act is not None:
            call = turn if kind == "SIGKILL at a turn" else call
            return _Blow(f"call {call} of {self.calls}", lambda room: install(room, act))
        if kind == "SIGKILL by time":
            seconds = share * self.seconds
            return _Blow(f"{seconds:.3f} of {self.seconds:.3f} s", kill_after=seconds)

        def limit(room: Path) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kind == "killed at a size" else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        return _Blow(f"byte {size} of {self.size}", limit)

    def _hit(self, row: Row, blow: _Blow, *, is_anew: bool) -> None:
        room, words = self._room("room"), list(self.command.words)
        if not is_anew:
            shutil.copytree(self.old, room, dirs_exist_ok=True)
            words.append("--overwrite")
        ended = run(room, words, prepare=lambda: blow.prepare(room), kill_after=blow.kill_after)
        row.tried += 1
        row.survived += ended.code == 0
        old: Mapping[str, str] = {} if is_anew else self.command.old
        found = snapshot(room)
        row.stood[self._stands(found, old)] += 1
        row.left += any(LEFTOVER.fullmatch(name) for name in found)
        wrong = [*self._ending(row.kind, ended, found), *self._standing(room, found, old), *self._going_on(room, found)]
        where = f"{row.command}, {row.kind} at {blow.place}, {'nothing' if is_anew else 'an old one'} there before"
        row.failures += [f"{where}: {what}" for what in wrong]

    def _stands(self, found: dict[str, str], old: Mapping[str, str]) -> str:
        command = self.command
        whole = {name: value for name, value in found.items() if name in command.whole}
        if command.new.items() <= whole.items():
            return "new"
        ours = set(whole.values()) & command.versions - set(old.values())
        if ours or any(name in found for name in command.parts):
            return "resumable"
        return "old" if whole else "nothing"

    def _ending(self, kind: str, ended: Ended, found: dict[str, str]) -> Iterator[str]:
        lines = ended.said.strip().splitlines()
        if kind in KILLS:
            if ended.code not in (0, -signal.SIGKILL, -signal.SIGXFSZ):
                yield f"ended with {ended.code}: {ended.said}"
            return
        allowed = {"short writes": (0,), **dict.fromkeys(_STOPS, (0, 130))}.get(kind, (0, 1))
        if ended.code not in allowed:
            yield f"ended with {ended.code}: {ended.said}"
        elif ended.code and (len(lines) != 1 or not lines[0].startswith("sctconv: ")):
            yield f"said {ended.said!r}"
        elif not ended.code and not self.command.new.items() <= found.items():
            yield f"ended with 0 and another output: {sorted(found)}"
        yield from (f"left {name}" for name in found if LEFTOVER.fullmatch(name))

    def _standing(self, room: Path, found: dict[str, str], old: Mapping[str, str]) -> Iterator[str]:
        """Whatever stands is old, or what an undisturbed run would have put there, or says that it is not finished."""
        command = self.command
        for name, value in found.items():
            if name in command.whole:
                if value != old.get(name) and value not in command.versions:
                    yield f"{name} is neither old nor new"
            elif name in command.parts:
                if _looks_complete(room / name) and value not in command.versions:
                    yield f"{name} looks whole and is not"
            elif name not in command.loose and not LEFTOVER.fullmatch(name):
                yield f"{name} was left"
        yield from (f"{name} is gone" for name in old if name not in found and name in command.whole)

    def _going_on(self, room: Path, found: dict[str, str]) -> Iterator[str]:
        """Ends where an undisturbed run does. What was gone on from before needs no second time."""
        state = frozenset(item for item in found.items() if item[0] not in self.command.loose)
        if state not in self._seen:
            self._seen[state] = self._go_on(room)
        wrong = self._seen[state]
        if wrong is not None:
            yield wrong

    def _go_on(self, room: Path) -> str | None:
        command = self.command
        words = command.go_on(room, command)
        ended = run(room, words)
        if ended.code:
            return f"`{' '.join(words[-3:])}` ended with {ended.code}: {ended.said}"
        found = snapshot(room)
        if wrong := [name for name, value in command.new.items() if found.get(name) != value]:
            return f"gone on with `{' '.join(words[-3:])}`, differs: {', '.join(wrong)}"
        if extra := set(found) - set(command.whole) - set(command.loose):
            return f"gone on with `{' '.join(words[-3:])}`, left {', '.join(sorted(extra))}"
        return command.same(room, self.whole)


def _looks_complete(part: Path) -> bool:
    try:
        with SctFile(part, allow_incomplete=True) as file:
            return file.index.complete
    except (NotSctError, FormatError):
        return False
