"""`bzstream evaluate`: score a local file as the validator would, or repeat what a validator did."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bzstream.cli._options import Config, LedgerFile, Store, existing_ledger, settings_of

if TYPE_CHECKING:
    from bzstream.config import Settings
    from bzstream.evaluation.records import Evaluation

__all__ = ["evaluate"]


def evaluate(
    file: Annotated[Path | None, typer.Argument(help="The checkpoint: .safetensors or .pt.")] = None,
    group: Annotated[int | None, typer.Option(help="Expert group that it was trained for.", min=0)] = None,
    store: Store = None,
    data: Annotated[str | None, typer.Option(help="Tokens file, text, or name of a dataset.")] = None,
    version: Annotated[str | None, typer.Option(help="Model version; default: the current one.")] = None,
    seed: Annotated[str | None, typer.Option(help="Hash of a block, in hex; default: a random one.")] = None,
    repeat: Annotated[str | None, typer.Option(help="Repeat this submission's evaluation from the ledger.")] = None,
    ledger: LedgerFile = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default: cpu.")] = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record as JSON.")] = False,
) -> None:
    """Score a checkpoint against the published model, with the validator's own checks and code."""
    from bzstream.evaluation.rejection_codes import EvaluationError

    flags = {"store.path": store, "evaluation.data": data, "evaluation.device": device, "ledger.url": ledger}
    settings = settings_of(config, flags)
    if repeat is not None:
        _repeat(settings, repeat, file, as_json)
        return
    if file is None or group is None:
        raise typer.BadParameter("give FILE and --group, or --repeat SUBMISSION_ID")
    if seed is not None and not _is_hex(seed):
        raise EvaluationError("--seed must be the hash of a block: hex digits, an even number of them")
    evaluation = _evaluate(settings, file, group, version=version, seed=seed or secrets.token_hex(32))
    _show(evaluation, as_json=as_json)


def _evaluate(
    settings: Settings,
    file: Path,
    group: int,
    *,
    version: str | None,
    seed: str,
    submission_id: str | None = None,
    round_: int | None = None,
) -> Evaluation:
    """The evaluator's own steps, one after the other. Raises BzstreamError: Refusal for the file's fault."""
    import time

    from bzstream.evaluation.baseline import BaselineModel
    from bzstream.evaluation.reading.sandbox import Reader
    from bzstream.evaluation.rejection_codes import EvaluationError
    from bzstream.evaluation.role import spool_folder
    from bzstream.evaluation.scoring.data import require_data
    from bzstream.model import SnapshotCache
    from bzstream.util.files import hash_file

    require_data(settings.evaluation.data)
    began = time.monotonic()
    place = settings.store_path()
    library = SnapshotCache(place)
    library.refresh()
    snapshot = library.current if version is None else library.get(version)
    if snapshot is None:
        what = "no snapshot" if version is None else f"no version {version}"
        raise EvaluationError(f"the store {place} holds {what}; see `bzstream inspect {place}`")
    published = BaselineModel(snapshot)
    part = published.group(group)
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise EvaluationError(f"{file} cannot be read: {error.strerror}") from None
    reader = Reader(memory=settings.evaluation.read_memory, timeout=settings.evaluation.read_timeout_s)
    try:
        locations = reader.read(fd, os.fstat(fd).st_size, part.specs, published.value_bound(group))
        # Only a file that passed every check is worth the seconds that torch and the model take to load.
        from bzstream.evaluation.scoring.scorer import Scorer

        cache = spool_folder(settings, place) / "tokens"
        scorer = Scorer(published, settings.evaluation, device=settings.evaluation.device or "cpu", cache=cache)
        return scorer.score(
            scorer.stage(fd, locations, group),
            seed,
            file_hash=f"sha256:{hash_file(file)}",
            submission_id=submission_id,
            round_=round_,
            began=began,
        ).evaluation
    finally:
        reader.close()
        os.close(fd)


def _repeat(settings: Settings, submission_id: str, file: Path | None, as_json: bool) -> None:
    """Evaluate a submission again and compare every number. Raises EvaluationError when one differs."""
    import tempfile

    from bzstream.evaluation.records import Records
    from bzstream.evaluation.rejection_codes import EvaluationError
    from bzstream.evaluation.reproduce import compare, find_file, settings_of
    from bzstream.submissions.ledger import Ledger

    where = existing_ledger(settings)
    ledger = Ledger.open(where)
    try:
        record, kept = ledger.find(submission_id), Records(ledger).find(submission_id)
    finally:
        ledger.close()
    if record is None or kept is None:
        raise EvaluationError(f"the ledger {where} holds no evaluation of a submission {submission_id}")
    if kept.device.startswith("cpu"):
        import torch

        torch.set_num_threads(kept.threads)  # a matrix product on the CPU is split by threads: same split, same bits
    with tempfile.TemporaryDirectory(prefix="bzstream-repeat-") as folder:
        found = file or find_file(settings, record, kept, Path(folder))
        again = _evaluate(
            settings_of(settings, kept),
            found,
            kept.group,
            version=kept.model_version,
            seed=kept.seed,
            submission_id=submission_id,
            round_=kept.round,
        )
    differences = compare(kept, again)
    _show(again, as_json=as_json)
    if differences:
        raise EvaluationError(f"the repeat differs from the record: {'; '.join(differences)}")
    if not as_json:
        typer.echo("bit for bit the same as the record")


def _show(evaluation: Evaluation, *, as_json: bool) -> None:
    import msgspec

    if as_json:
        typer.echo(msgspec.json.encode(evaluation))
        return
    rows: list[tuple[str, Any]] = [
        ("baseline", f"{evaluation.baseline_loss:.6f} nats a token"),
        ("this file", f"{evaluation.loss:.6f}"),
        ("score", f"{evaluation.score:.6f}"),
        (
            "data",
            f"{len(evaluation.windows)} windows of {evaluation.window_tokens} tokens, seed {evaluation.seed[:16]}…",
        ),
        ("model", f"{evaluation.model_version}, group {evaluation.group}, on {evaluation.device}"),
        ("seconds", ", ".join(f"{name} {value:.3f}" for name, value in evaluation.seconds.items())),
    ]
    for name, value in rows:
        typer.echo(f"{name:10} {value}")


def _is_hex(text: str) -> bool:
    try:
        return bool(bytes.fromhex(text.removeprefix("0x")))
    except ValueError:
        return False
