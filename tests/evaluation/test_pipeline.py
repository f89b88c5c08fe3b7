"""The whole evaluator against a real ledger, real sockets and a real model: what becomes of every submission."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import resource
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import structlog

from bzstream.chain.round_base import RoundBase
from bzstream.demo.toy_model import forge_copy, forge_nan, forge_pickle_bomb
from bzstream.evaluation import role
from bzstream.evaluation.rejection_codes import EvaluationError, Failure
from bzstream.evaluation.scoring.scorer import Scorer
from bzstream.model import publish
from bzstream.submissions.states import FINAL
from bzstream.submissions.types import SubmissionRow
from tests.evaluation.conftest import BLOCK, GROUPS, Toy
from tests.evaluation.field import CYCLE, ROUND, SEED_BLOCK, Field
from tests.evaluation.hostile import BFLOAT16_MAX, FILES, behind_a_dead_unit, honest
from tests.evaluation.servers import LATER, SERVERS, Server, serving
from tests.seeds import seeds

server = pytest.fixture(serving)


@pytest.fixture
def field(toy: Toy, tmp_path: Path) -> Iterator[Field]:
    made = Field(toy, tmp_path)
    yield made
    made.close()


def outcome(record: SubmissionRow) -> tuple[str, str | None]:
    return record.status, record.reason


def test_the_story_of_the_demo(field: Field, toy: Toy, server: Server, tmp_path: Path) -> None:
    """An honest miner, a copy-cat, one who copies with noise, a poisoner and a bomber submit; each gets his due."""
    files = {"honest": toy.improved.read_bytes()}
    for name, forge in (("copy", forge_copy), ("noisy", partial(forge_copy, noise=1e-3)), ("nan", forge_nan)):
        forge(toy.improved, tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
    forge_pickle_bomb(tmp_path / "bomb", tmp_path / "evidence")
    files["bomb"] = (tmp_path / "bomb").read_bytes()
    server.files.update(files)
    field.at(SEED_BLOCK - 1)
    names = {
        name: field.submit(server.url(f"files/{name}"), hash_=_hash(files[name]) if name == "honest" else None)
        for name in files
    }

    async def main() -> None:
        async with field.evaluating() as task:
            early = {"bomb": "unsafe_pickle", "nan": "non_finite"}
            await field.until(field.all_final([names[name] for name in early]), task)
            # The others are fetched and checked, and wait for a seed that nobody can know yet.
            waiting = [names[name] for name in ("honest", "copy", "noisy")]
            await field.until(lambda: all(field.find(name).status == "verifying" for name in waiting), task)
            field.at(SEED_BLOCK)
            await field.until(field.all_final(list(names.values())), task)
            copies = [names["copy"], names["noisy"]]  # whichever order they were scored in
            await field.until(lambda: {field.find(each).reason for each in copies} == {"duplicate_weights"}, task)
            late = field.submit(server.url("files/copy"))
            await field.until(field.all_final([late]), task)
            assert outcome(field.find(late)) == ("rejected", "duplicate_weights")
            assert field.find(late).loss is None, "weights that are known were scored again"

    asyncio.run(main())
    found = {name: field.find(submission) for name, submission in names.items()}
    honest = found["honest"]
    assert outcome(honest) == ("scored", None)
    assert honest.score is not None
    assert honest.score > 0
    assert honest.score == honest.baseline_loss - honest.loss  # type: ignore[operator]
    assert outcome(found["copy"]) == outcome(found["noisy"]) == ("rejected", "duplicate_weights")
    assert outcome(found["nan"]) == ("rejected", "non_finite")
    assert outcome(found["bomb"]) == ("rejected", "unsafe_pickle")
    assert all(record.score == 0 for record in found.values() if record.status == "rejected")
    assert not (tmp_path / "evidence").exists(), "the bomb went off"


def _hash(data: bytes) -> str:
    import hashlib

    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.slow
def test_every_hostile_file_and_server_while_honest_ones_are_scored(
    toy: Toy,
    tmp_path: Path,
    server: Server,
    honest_tensors: dict[str, np.ndarray],
    baseline_tensors: dict[str, np.ndarray],
) -> None:
    field = Field(toy, tmp_path, fetch_stall_s=1.0, fetch_timeout_s=20.0, fetch_attempts=1, read_memory=192 << 20)
    field.at(SEED_BLOCK)
    expected: dict[str, str | None] = {}
    try:

        def submit_honest(part: float) -> None:
            mixed = {n: baseline_tensors[n] + part * (honest_tensors[n] - baseline_tensors[n]) for n in honest_tensors}
            server.files[f"honest{part}"] = honest(mixed, "F32")
            expected[field.submit(server.url(f"files/honest{part}"))] = None

        submit_honest(1.0)
        for name, (maker, code) in list(FILES.items())[:: seeds(4, 1)]:
            server.files[name] = maker(honest_tensors)
            expected[field.submit(server.url(f"files/{name}"))] = code
        submit_honest(0.5)
        for name, (_, code) in SERVERS.items():
            # This node allows private addresses, for it fetches from one.
            if code != "forbidden_address" and name not in LATER:
                expected[field.submit(server.url(name))] = code
        submit_honest(0.25)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = field.run(list(expected))
        wrong = {
            record.checkpoint_url.rsplit("/", 1)[1]: (record.reason, expected[record.submission_id])
            for record in found
            if record.reason != expected[record.submission_id]
        }
        # Some files are also larger than an honest one can be, and not read at all then.
        large = {name for name, (reason, _) in wrong.items() if reason == "too_large" and len(server.files[name]) > 1e6}
        assert {name: reason for name, reason in wrong.items() if name not in large} == {}
        assert len(large) <= 3, large
        scores = [record.score for record in found if expected[record.submission_id] is None]
        assert len(scores) == 3
        assert all(score is not None and score > 0 for score in scores)
        assert {record.score for record in found if record.status == "rejected"} == {0.0}
        # The evaluator's own process reads no hostile byte: what it grows by is torch and the model.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 * 1024
    finally:
        field.close()


def test_an_evaluator_that_stops_gives_its_jobs_back_and_the_next_one_goes_on(
    field: Field, toy: Toy, server: Server
) -> None:
    server.files["honest"] = toy.improved.read_bytes()
    field.at(SEED_BLOCK - 1)
    waiting = field.submit(server.url("files/honest"))
    hanging = field.submit(server.url("never_answers"))

    async def first() -> None:
        async with field.evaluating() as task:
            await field.until(lambda: field.find(waiting).status == "verifying", task)
            await field.until(lambda: "/never_answers" in server.requests, task)

    asyncio.run(first())
    assert {field.find(name).status for name in (waiting, hanging)} == {"queued"}
    assert field.find(waiting).attempts == 0
    fetched_at, requests = field.find(waiting).fetched_at, len(server.requests)
    field.at(SEED_BLOCK)

    async def second() -> None:
        async with field.evaluating() as task:
            await field.until(field.all_final([waiting]), task)

    asyncio.run(second())
    record = field.find(waiting)
    assert outcome(record) == ("scored", None)
    assert server.requests[requests:].count("/files/honest") == 0, "the spooled file was fetched again"
    assert record.fetched_at == fetched_at, "a restart of ours cost the miner its precedence"


def test_a_killed_evaluator_loses_nothing(field: Field, toy: Toy, server: Server) -> None:
    """A lease that nobody renews returns the job; what was spooled is whole or gone."""
    server.files["honest"] = toy.improved.read_bytes()
    field.at(SEED_BLOCK)
    name = field.submit(server.url("files/honest"))
    # The dead one: it claimed, half fetched, and stopped renewing.
    spool = Path(str(field.settings.evaluation.spool)) / "cpu"
    spool.mkdir(parents=True)
    (spool / f"{name}.part").write_bytes(b"half a fi")
    assert len(field.ledger.claim("dead", lease_s=0.3)) == 1
    (record,) = field.run([name])
    assert outcome(record) == ("scored", None)
    assert record.attempts == 2
    assert not list(spool.glob("*.part"))


def test_a_superseded_submission_is_dropped_wherever_it_is(field: Field, toy: Toy, server: Server) -> None:
    server.files["honest"] = toy.improved.read_bytes()
    field.at(SEED_BLOCK)
    hotkey = "5F" + "7" * 46

    async def main() -> list[str]:
        async with field.evaluating() as task:
            first = field.submit(server.url("never_answers"), hotkey=hotkey, block=BLOCK)
            await field.until(lambda: "/never_answers" in server.requests, task)
            second = field.submit(server.url("files/honest"), hotkey=hotkey, block=BLOCK + 1)
            await field.until(field.all_final([first, second]), task)
            return [first, second]

    first, second = asyncio.run(main())
    assert outcome(field.find(first)) == ("rejected", "superseded")
    assert outcome(field.find(second)) == ("scored", None)


def test_a_superseded_submission_gives_its_room_back_wherever_it_waits(
    toy: Toy, server: Server, tmp_path: Path
) -> None:
    """The first waits for its seed and holds all room there is, the second waits for that room; a third replaces both.

    The third gets the room, waits for it longer than a fetch may take and longer than the round is open, and counts.
    """
    server.files["honest"] = toy.improved.read_bytes()
    size = len(server.files["honest"])
    field = Field(toy, tmp_path, spool_bytes=size * 3 // 2, lease_s=2.0, fetch_timeout_s=3.0)
    field.at(SEED_BLOCK - 1)
    closed = SEED_BLOCK + field.settings.evaluation.fetch_grace_blocks + 5
    hotkeys = ["5F" + str(i) * 46 for i in range(2)]
    url = server.url("files/honest")

    def asked() -> int:
        return server.requests.count("/files/honest")

    async def main() -> None:
        async with field.evaluating() as task:
            first = field.submit(url, hotkey=hotkeys[0], block=BLOCK)
            await field.until(lambda: field.find(first).status == "verifying", task)
            second = field.submit(url, hotkey=hotkeys[1], block=BLOCK)
            await field.until(lambda: asked() == 2, task)
            third = field.submit(url, hotkey=hotkeys[1], block=BLOCK + 1)
            await field.until(lambda: outcome(field.find(second)) == ("rejected", "superseded"), task)
            await field.until(lambda: asked() == 3, task)
            began = time.monotonic()
            # Longer than a fetch may take. The first one's lease is renewed all the while.
            await field.until(lambda: time.monotonic() > began + field.settings.evaluation.fetch_timeout_s, task)
            assert field.find(third).status == "fetching"
            fourth = field.submit(url, hotkey=hotkeys[0], block=BLOCK + 1)  # the first is dropped as it waits
            await field.until(lambda: field.find(third).status == "verifying", task)
            await field.until(lambda: asked() == 5, task)  # the third again, now that it has room; and the fourth
            await field.until(partial(waits_for_room, fourth), task)
            field.at(closed)
            names = [first, second, third, fourth]
            await field.until(field.all_final(names), task)
            assert [outcome(field.find(name)) for name in names[:2]] == [("rejected", "superseded")] * 2
            # Of the last two, which are the same bytes, one counts; neither was late.
            assert sorted(outcome(field.find(name)) for name in names[2:]) == [
                ("rejected", "duplicate_weights"),
                ("scored", None),
            ]

    with structlog.testing.capture_logs() as logs:

        def waits_for_room(name: str) -> bool:
            return any(log["event"].startswith("waiting for room") and log["submission"] == name for log in logs)

        asyncio.run(main())
    field.close()


def test_one_enormous_value_erases_nobody_but_its_author(
    field: Field, toy: Toy, server: Server, honest_tensors: dict[str, np.ndarray]
) -> None:
    """It used to make the sketch infinite, and every honest submission of the group a copy of it."""
    server.files["attack"] = honest(behind_a_dead_unit(honest_tensors, BFLOAT16_MAX))
    server.files["honest"] = toy.improved.read_bytes()
    server.files["hard"] = honest({name: array + 3 * np.sign(array) for name, array in honest_tensors.items()})
    field.at(SEED_BLOCK)
    attack, *others = (field.submit(server.url(f"files/{name}")) for name in ("attack", "honest", "hard"))
    found = field.run([attack, *others])
    assert [outcome(record) for record in found] == [("rejected", "out_of_range"), ("scored", None), ("scored", None)]


def test_a_round_is_scored_against_what_its_miners_had(toy: Toy, server: Server, tmp_path: Path) -> None:
    """A version that is published while the miners train is nobody's base."""
    store = tmp_path / "store"
    start = CYCLE.start(BLOCK)
    publish(toy.checkpoint, store, block=start, version="base", groups=GROUPS)
    publish(toy.checkpoint, store, block=start + 200, version="mid-training", groups=GROUPS)
    with contextlib.closing(Field(dataclasses.replace(toy, store=store), tmp_path)) as field:
        field.ledger.write_round_base(RoundBase(ROUND, "base", CYCLE.last_distribute_block(BLOCK)))
        server.files["honest"] = toy.improved.read_bytes()
        field.at(SEED_BLOCK)
        (record,) = field.run([field.submit(server.url("files/honest"))])
        assert outcome(record) == ("scored", None)
        assert record.model_version == "base"


def test_a_base_that_is_gone_is_our_fault(field: Field, toy: Toy, server: Server) -> None:
    field.ledger.write_round_base(RoundBase(ROUND, "gone", CYCLE.last_distribute_block(BLOCK)))
    server.files["honest"] = toy.improved.read_bytes()
    field.at(SEED_BLOCK)
    (record,) = field.run([field.submit(server.url("files/honest"))])
    assert outcome(record) == ("failed", "version_gone")


def test_what_arrives_after_the_round_closed_does_not_count(field: Field, toy: Toy, server: Server) -> None:
    server.files["honest"] = toy.improved.read_bytes()
    closed = SEED_BLOCK + field.settings.evaluation.fetch_grace_blocks + 1
    field.at(SEED_BLOCK)

    async def main() -> tuple[str, ...]:
        async with field.evaluating() as task:
            slow = field.submit(server.url("never_answers"))
            await field.until(lambda: "/never_answers" in server.requests, task)
            field.at(closed)
            await field.until(field.all_final([slow]), task)
            unsigned = field.submit(server.url("files/honest"))
            signed = field.submit(server.url("files/honest"), hash_=_hash(server.files["honest"]))
            await field.until(field.all_final([unsigned, signed]), task)
            return slow, unsigned, signed

    slow, unsigned, signed = (field.find(name) for name in asyncio.run(main()))
    assert outcome(slow) == ("rejected", "fetch_timeout")
    assert outcome(unsigned) == ("failed", "fetched_too_late")  # nobody was there to fetch it: ours
    assert outcome(signed) == ("scored", None)  # the signed hash proves that it was finished in time


def test_a_file_that_is_not_the_signed_one_is_refused(field: Field, toy: Toy, server: Server) -> None:
    server.files["honest"] = toy.improved.read_bytes()
    field.at(SEED_BLOCK)
    (record,) = field.run([field.submit(server.url("files/honest"), hash_="sha256:" + "0" * 64)])
    assert outcome(record) == ("rejected", "hash_mismatch")


def test_the_signed_hash_gives_precedence_to_its_author_whoever_was_scored_first(
    field: Field, toy: Toy, server: Server, tmp_path: Path
) -> None:
    """The thief's file is fetched and scored first; the author, who signed the hash before, takes it from him."""
    forge_copy(toy.improved, tmp_path / "noisy", noise=1e-3)
    server.files["stolen"] = (tmp_path / "noisy").read_bytes()
    server.files["honest"] = toy.improved.read_bytes()
    field.at(SEED_BLOCK)
    author = field.submit("http://127.0.0.1:9/not-yet", hash_=_hash(server.files["honest"]))
    (held,) = field.ledger.claim("elsewhere", lease_s=60)
    thief = field.submit(server.url("files/stolen"))
    (record,) = field.run([thief])
    assert outcome(record) == ("scored", None)
    held = field.ledger.advance(held, "verifying", content_hash=_hash(server.files["honest"]))
    held = field.ledger.advance(held, "evaluating", model_version="step_1000")
    evaluation = field.records.find(thief)
    assert evaluation is not None
    prints = field.records.fingerprints(ROUND, 1)[thief]
    field.records.write(msgspec.structs.replace(evaluation, submission_id=author, weights="other"), prints[1])
    field.ledger.advance(held, "scored", baseline_loss=1.0, loss=0.5, score=0.5)

    async def restart() -> None:  # the evaluator that scored the last one died before it compared them
        async with field.evaluating() as task:
            await field.until(lambda: field.find(thief).status == "rejected", task)

    asyncio.run(restart())
    assert outcome(field.find(thief)) == ("rejected", "duplicate_weights")
    assert outcome(field.find(author)) == ("scored", None)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (Failure("out_of_memory", "the evaluator ran out of memory"), "out_of_memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory"),
            "out_of_memory",
        ),
        (MemoryError(), "out_of_memory"),
        (ZeroDivisionError("a bug"), "internal_error"),
        (Failure("evaluation_timeout", "scoring took too long"), "evaluation_timeout"),
    ],
)
def test_a_fault_of_ours_fails_the_job_and_the_next_one_is_scored(
    raised: Exception, code: str, field: Field, toy: Toy, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bzstream.evaluation.scoring.resident_model import ResidentModel

    server.files["honest"] = toy.improved.read_bytes()
    field.at(SEED_BLOCK)
    names = [field.submit(server.url("files/honest"), hotkey=f"5F{i:046d}") for i in range(2)]
    real, calls = ResidentModel.window_losses, []

    def failing(self: ResidentModel, *arguments: Any, **named: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:  # the first is the baseline
            from bzstream.evaluation.scoring.module import map_errors

            with map_errors():
                raise raised
        return real(self, *arguments, **named)

    monkeypatch.setattr(ResidentModel, "window_losses", failing)
    records = field.run(names)
    assert sorted(outcome(record) for record in records) == [("failed", code), ("scored", None)]
    assert [record.score for record in records if record.status == "failed"] == [None]


def test_a_device_error_fails_the_job_gives_the_others_back_and_ends_the_process(
    field: Field, toy: Toy, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["honest"] = toy.improved.read_bytes()
    field.at(SEED_BLOCK)
    names = [field.submit(server.url("files/honest"), hotkey=f"5F{i:046d}") for i in range(3)]

    def broken(self: Scorer, staged: Any, *arguments: Any, **named: Any) -> None:
        staged.close()
        raise Failure("device_error", "the accelerator reported an error: CUDA error: device-side assert")

    monkeypatch.setattr(Scorer, "score", broken)

    async def main() -> None:
        await role.run(field.settings, toy.store, device="cpu", stop=asyncio.Event())

    with pytest.raises(EvaluationError, match="the evaluator restarts"):
        asyncio.run(main())
    assert sorted(outcome(field.find(name)) for name in names) == [
        ("failed", "device_error"),
        ("queued", None),
        ("queued", None),
    ]
    monkeypatch.undo()
    assert ("scored", None) in [outcome(record) for record in field.run(names)]


def test_a_reader_that_is_killed_fails_the_job(field: Field, toy: Toy, server: Server) -> None:
    server.files["honest"] = toy.improved.read_bytes()
    field.at(SEED_BLOCK)
    first = field.submit(server.url("files/honest"))

    def done() -> bool:
        """Kills every reading process as soon as there is one, long before it is ready to read."""
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if "sandbox_worker" in " ".join(process.cmdline()):
                    process.kill()
        return field.find(first).status in FINAL

    async def main() -> None:
        async with field.evaluating() as task:
            await field.until(done, task)

    asyncio.run(main())
    assert outcome(field.find(first)) == ("failed", "reader_crashed")
    (record,) = field.run([field.submit(server.url("files/honest"))])
    assert outcome(record) == ("scored", None)


def test_submissions_for_two_groups_do_not_disturb_each_other(field: Field, toy: Toy, server: Server) -> None:
    """Equal bytes for different groups are no copies, and each is scored against its own experts."""
    server.files["improved"] = toy.improved.read_bytes()
    server.files["baseline"] = (toy.store / "current" / "group-2.safetensors").read_bytes()
    field.at(SEED_BLOCK)
    one = field.submit(server.url("files/improved"), group=1)
    two = field.submit(server.url("files/baseline"), group=2)
    first, second = field.run([one, two])
    assert first.score is not None
    assert first.score > 0
    assert (second.score, second.loss) == (0.0, second.baseline_loss), (
        "the published weights score exactly the baseline"
    )


def test_there_is_no_evaluator_without_data(field: Field, toy: Toy) -> None:
    for data, words in (
        (None, "set evaluation.data"),
        ("/no/such.npy", "does not exist"),
        ("wikitext", "install `datasets`"),
    ):
        settings = msgspec.structs.replace(
            field.settings, evaluation=msgspec.structs.replace(field.settings.evaluation, data=data)
        )
        with pytest.raises(EvaluationError, match=words):
            asyncio.run(role.run(settings, toy.store, device="cpu", stop=asyncio.Event()))


def test_two_evaluators_share_a_round_and_no_spool(field: Field, toy: Toy, server: Server) -> None:
    server.files["honest"] = toy.improved.read_bytes()
    field.at(SEED_BLOCK)

    async def main() -> None:
        async with field.evaluating() as task:
            await field.until(lambda: (Path(str(field.settings.evaluation.spool)) / "cpu" / ".lock").exists(), task)
            with pytest.raises(EvaluationError, match="another evaluator"):
                await role.run(field.settings, toy.store, device="cpu", stop=asyncio.Event())

    asyncio.run(main())
