"""The spool gives every byte back, whatever becomes of the jobs, and never holds more than its limit."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bzstream.evaluation.rejection_codes import EvaluationError, Failure
from bzstream.evaluation.spool import Spool, SpoolEntry

LIMIT = 100


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    opened = Spool(tmp_path / "spool", LIMIT)
    yield opened
    opened.close()


def put(spool: Spool, name: str, size: int) -> SpoolEntry:
    entry = spool.open(name)
    assert entry.reserve(size, lambda: False) == 0
    entry.draft().write_bytes(bytes(size))
    entry.keep()
    return entry


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_the_oldest_finished_file_goes_first_and_drafts_do_not_survive(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    spool = Spool(folder, LIMIT)
    first, second = put(spool, "a", 40), put(spool, "b", 40)
    assert spool.open("c").reserve(40, lambda: True) is None, "a and b are in use"
    first.release()
    second.release()
    put(spool, "c", 40).release()
    assert files(folder) == {"b", "c"}
    spool.open("d").draft().write_bytes(b"half")
    with pytest.raises(EvaluationError, match="another evaluator"):
        Spool(folder, LIMIT)
    spool.close()
    again = Spool(folder, LIMIT)
    assert files(folder) == {"b", "c"}
    assert again.open("c").find()
    assert not again.open("d").find()
    again.close()


def test_what_was_reserved_beyond_the_file_comes_back_when_it_is_whole(spool: Spool) -> None:
    entry = spool.open("a")
    assert entry.reserve(90, lambda: False) == 0
    entry.draft().write_bytes(bytes(10))
    assert spool.open("b").reserve(80, lambda: True) is None
    entry.keep()
    assert spool.open("b").reserve(80, lambda: True) is None, "given up all the same"
    assert spool.open("b").reserve(80, lambda: False) == 0


def test_a_second_try_keeps_its_room(spool: Spool) -> None:
    entry = spool.open("a")
    assert entry.reserve(60, lambda: False) == 0
    waiting = threading.Thread(target=spool.open("b").reserve, args=(60, lambda: False), daemon=True)
    waiting.start()
    assert entry.reserve(60, lambda: False) == 0, "the same fetch had to queue again, behind the other"
    entry.release()
    waiting.join(10)
    assert not waiting.is_alive()


def test_two_jobs_of_one_submission_do_not_give_each_others_file_away(spool: Spool, tmp_path: Path) -> None:
    """The lease was lost and the submission claimed again before the first job's thread had noticed."""
    first = put(spool, "a", 40)
    second = put(spool, "a", 40)
    first.release()
    put(spool, "b", 60).release()
    assert second.path.exists(), "the file of a job under way was removed"
    second.release()
    assert spool.open("a").find()
    late = spool.open("c")
    assert late.reserve(10, lambda: False) == 0
    late.draft().write_bytes(bytes(10))
    late.release()
    late.keep()
    assert "c" not in files(tmp_path / "spool"), "a file that nobody counts"
    assert not late.find()
    assert late.reserve(10, lambda: False) is None


def test_a_file_larger_than_the_spool_is_our_fault(spool: Spool) -> None:
    with pytest.raises(Failure) as caught:
        spool.open("a").reserve(LIMIT + 1, lambda: False)
    assert caught.value.code == "spool_error"


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a waiting thread makes room for itself meanwhile
            total += path.stat().st_size
    return total


class Job:
    """One job's thread: it reserves and, when told to, ends as it is told to."""

    def __init__(self, spool: Spool, name: str, size: int) -> None:
        self.entry = spool.open(name)
        self.size = size
        self.given_up = threading.Event()
        self.result: float | None = None
        self.thread = threading.Thread(target=self._reserve, daemon=True)
        self.thread.start()

    def _reserve(self) -> None:
        self.result = self.entry.reserve(self.size, self.given_up.is_set)

    @property
    def has_room(self) -> bool:
        return not self.thread.is_alive() and self.result is not None


@contextlib.contextmanager
def small_spool() -> Iterator[tuple[Spool, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        opened = Spool(Path(folder), LIMIT)
        yield opened, Path(folder)
        opened.close()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "begin", "whole", "fail", "give up", "lost"]),
        st.integers(0, 5),
        st.integers(1, LIMIT),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(STEPS)
def test_every_interleaving_of_jobs_gives_all_room_back(steps: list[tuple[str, int, int]]) -> None:
    """Jobs begin, end whole, fail, are given up or lost at any moment, those that wait for room included."""
    with small_spool() as (spool, folder):
        jobs: list[Job] = []
        for what, index, size in steps:
            if what == "begin":
                jobs.append(Job(spool, f"s{index}", size))
            elif jobs:
                end(jobs.pop(index % len(jobs)), what, size)
            assert bytes_in(folder) <= LIMIT
        while jobs:  # those that still wait get their room as the others end, in order
            ready = [job for job in jobs if job.has_room]
            for job in ready:
                jobs.remove(job)
                end(job, "whole", job.size)
            if not ready:
                jobs[0].thread.join(10)
                assert not jobs[0].thread.is_alive(), "a job waits for room that nobody holds"
        assert spool.open("all of it").reserve(LIMIT, lambda: False) == 0, "room was lost for ever"
        assert files(folder) == set()


def end(job: Job, what: str, size: int) -> None:
    """How a job ends, as the pipeline ends it; its entry is released last."""
    if what == "lost":  # the lease: the loop releases the entry while the thread may still wait
        job.entry.release()
    elif not job.has_room or what == "give up":
        job.given_up.set()
        job.entry.release()
    elif what == "fail":
        job.entry.draft()
    else:
        job.entry.draft().write_bytes(bytes(min(size, job.size)))
        job.entry.keep()
    if what in ("lost", "give up") or not job.has_room:
        job.thread.join(10)
        assert not job.thread.is_alive()
    job.entry.release()
