"""Where runs are kept: one SQLite file that survives a kill at any moment, for several processes at once."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import OutputError, StudyError
from .plan import Run

#: Seconds without a sign of life after which the runs of an engine on another machine are taken over.
SILENCE = 120.0

_SCHEMA = """
create table if not exists runs (
    digest text primary key, spec text not null, status text not null default 'pending',
    owner text, reason text, result text, seconds real, ended real
);
create table if not exists owners (owner text primary key, host text, pid integer, born text, seen real);
create table if not exists starts (digest text not null, owner text not null, at real not null);
"""


class Store:
    """The runs of a study directory.

    A run is ``pending``, ``running`` (an engine has claimed it), ``done`` or ``failed``. A claim holds as long as the
    process of its engine lives; on another machine, as long as that has been seen in the last two minutes.
    """

    def __init__(self, path: Path) -> None:
        self.owner, self._path = uuid.uuid4().hex, path
        try:
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            raise self._trouble(error) from None
        except sqlite3.DatabaseError as error:
            raise StudyError(f"{path} is not a store of runs: {error}") from None
        self._db.row_factory = sqlite3.Row

    @contextmanager
    def _now(self) -> Iterator[sqlite3.Connection]:
        """One transaction that nobody else writes beside.

        Raises:
            OutputError: the disk is full, or somebody holds the file for a minute.
        """
        try:
            self._db.execute("begin immediate")
            yield self._db
            self._db.execute("commit")
        except sqlite3.OperationalError as error:
            raise self._trouble(error) from None
        finally:
            if self._db.in_transaction:  # sqlite ends some by itself
                self._db.execute("rollback")

    def _trouble(self, error: sqlite3.OperationalError) -> OutputError:
        return OutputError(f"{self._path} cannot be used: {error}; what has been run is kept, the same command goes on")

    def add(self, runs: Iterable[Run]) -> None:
        """Make room for runs; those that are there stay as they are, and what an earlier version named otherwise is
        named anew."""
        asked = list(runs)
        rows = [(r.digest, json.dumps(r.spec, sort_keys=True)) for r in asked]
        older = [(r.digest, r.older) for r in asked if r.older is not None]
        with self._now() as db:
            db.executemany("update or ignore runs set digest = ? where digest = ?", older)
            db.executemany("insert or ignore into runs (digest, spec) values (?, ?)", rows)

    def claim(self, runs: Sequence[Run], free: Callable[[Run, Mapping[str, str]], bool]) -> Run | None:
        """Take the first run that is pending, or was left by a process that is no more, and that ``free`` agrees to."""
        with self._now() as db:
            self._alive(db)
            states = {x["digest"]: x for x in db.execute("select digest, status, owner from runs")}
            living = {x["owner"] for x in db.execute("select * from owners") if _lives(x)}
            status = {
                d: "pending" if x["status"] == "running" and x["owner"] not in living else x["status"]
                for d, x in states.items()
            }
            for run in runs:
                if status.get(run.digest) == "pending" and free(run, status):
                    db.execute(
                        "update runs set status = 'running', owner = ? where digest = ?", (self.owner, run.digest)
                    )
                    db.execute("insert into starts values (?, ?, ?)", (run.digest, self.owner, time.time()))
                    return run
        return None

    def beat(self) -> None:
        """Say that this engine lives."""
        with self._now() as db:
            self._alive(db)

    def _alive(self, db: sqlite3.Connection) -> None:
        who = (self.owner, socket.gethostname(), os.getpid(), _born(os.getpid()), time.time())
        db.execute("insert or replace into owners values (?, ?, ?, ?, ?)", who)

    def finish(self, digest: str, status: str, reason: str | None, result: Mapping[str, Any], seconds: float) -> bool:
        """Enter what became of a run; False where another engine has taken it over meanwhile."""
        with self._now() as db:
            changed = db.execute(
                "update runs set status = ?, reason = ?, result = ?, seconds = ?, ended = ? "
                "where digest = ? and owner = ? and status = 'running'",
                (status, reason, json.dumps(result), seconds, time.time(), digest, self.owner),
            )
            return changed.rowcount == 1

    def release(self, digest: str | None = None) -> None:
        """Give claims back: of one run, or all that this engine has."""
        with self._now() as db:
            where, args = ("and digest = ?", (digest,)) if digest else ("", ())
            db.execute(
                f"update runs set status = 'pending', owner = null where status = 'running' and owner = ? {where}",
                (self.owner, *args),
            )

    def retry(self, digests: Iterable[str]) -> None:
        """Let failed runs be tried again."""
        with self._now() as db:
            db.executemany(
                "update runs set status = 'pending', reason = null where status = 'failed' and digest = ?",
                [(d,) for d in digests],
            )

    def outcomes(self) -> dict[str, tuple[str, str | None, dict[str, Any], float]]:
        """Digest -> status, reason, result and seconds of what is over."""
        found = self._db.execute("select * from runs where status in ('done', 'failed')")
        return {
            x["digest"]: (x["status"], x["reason"], json.loads(x["result"] or "{}"), float(x["seconds"] or 0.0))
            for x in found
        }

    def counts(self, runs: Iterable[Run]) -> dict[str, int]:
        """How many of these runs are in each state; one that several entries share counts once."""
        states = {x["digest"]: x["status"] for x in self._db.execute("select digest, status from runs")}
        found = {"pending": 0, "running": 0, "done": 0, "failed": 0}
        for digest in {run.digest for run in runs}:
            found[states.get(digest, "pending")] += 1
        return found

    def quiet(self) -> bool:
        """Whether no living engine has a run under way, of whatever study."""
        owners = {x["owner"] for x in self._db.execute("select distinct owner from runs where status = 'running'")}
        return not any(x["owner"] in owners and _lives(x) for x in self._db.execute("select * from owners"))

    def starts(self) -> dict[str, int]:
        """Digest -> how often it was begun."""
        return {x[0]: x[1] for x in self._db.execute("select digest, count(*) from starts group by digest")}

    def close(self) -> None:
        self._db.close()


def _born(pid: int) -> str:
    """When a process began, as the system counts; "gone" of one that is dead and not yet buried; empty where it does
    not say."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "gone" if state in "ZX" else rest[18]


def _lives(owner: sqlite3.Row) -> bool:
    if owner["host"] != socket.gethostname():
        return bool(time.time() - owner["seen"] < SILENCE)
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(owner["born"] == _born(owner["pid"]))  # another process may have got its number
