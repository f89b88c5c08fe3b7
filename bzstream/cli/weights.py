"""`bzstream weights`: what a round's scores are worth, and what became of its weights on the chain."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bzstream.cli._options import AsJson, Config, LedgerFile, Store, existing_ledger, settings_of
from bzstream.errors import BzstreamError

if TYPE_CHECKING:
    from bzstream.config import ChainSettings

__all__ = ["weights"]


class NoWeights(BzstreamError):
    """There is no such round."""


def weights(
    store: Store = None,
    ledger: LedgerFile = None,
    round_: Annotated[
        int | None, typer.Option("--round", help="First block of its submit phase; default: the latest.")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="What became of them on the chain.")] = False,
    config: Config = None,
    as_json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", hidden=True)] = False,
) -> None:
    """Print the weights that a round's scores become. Only the chain role submits them (chain.set_weights)."""
    from bzstream.submissions.ledger import Ledger

    settings = settings_of(config, {"store.path": store, "ledger.url": ledger})
    opened = Ledger.open(existing_ledger(settings))
    try:
        found = _status(opened, settings.chain, round_) if status else _weights(opened, settings.chain, round_)
        scores = None if status else opened.scores(found["round"])
    finally:
        opened.close()
    if as_json:
        print(json.dumps(found, indent=2))
    elif status:
        for name, value in found.items():
            print(f"{name.replace('_', ' ')}: {'-' if value is None else value}")
    else:
        submitted, unfinished = (0, 0) if scores is None else (len(scores.results), scores.unfinished)
        counts = f"{submitted} submissions, {unfinished} unfinished, {len(found['weights'])} with weight"
        print(f"round {found['round']}: {counts}")
        for hotkey, share in found["weights"].items():
            print(f"{hotkey}  {share:.6f}")


def _weights(ledger: Any, chain: ChainSettings, round_: int | None) -> dict[str, Any]:
    """The weights of a round: those that the chain role worked out, else those that it would."""
    from bzstream.chain.weights import smooth, weights_of, with_burn

    scores = ledger.scores(round_)
    number = round_ if scores is None else scores.round
    known = ledger.round_weights(number)
    if known is not None and known.shares:
        shares, number = known.shares, known.round
    elif scores is not None:
        earlier = ledger.weights_before(number)
        # The chain role alone can ask who the subnet's owner is; until it has, the name stands for the hotkey.
        fresh = with_burn(weights_of(scores.results, chain.weights_top_k), chain.burn, chain.burn_rate)
        shares = smooth({} if earlier is None else earlier.shares, fresh, chain.weights_alpha)
    else:
        which = "no round has results yet" if round_ is None else f"the ledger has no round {round_}"
        raise NoWeights(f"{which}; see GET /scores")
    version = None if scores is None else scores.model_version
    return {"round": number, "model_version": version, "weights": dict(shares)}


def _status(ledger: Any, chain: ChainSettings, round_: int | None) -> dict[str, Any]:
    """What became of a round's weights on the chain, and when the next are due."""
    from bzstream.chain.clock import Cycle

    known, state, cycle = ledger.round_weights(round_), ledger.chain_state(), Cycle.of(chain)
    if known is None:
        which = "no round's weights were" if round_ is None else f"the weights of round {round_} were not"
        raise NoWeights(f"{which} worked out yet; the chain role does that with chain.set_weights = true")
    due = None
    if state is not None:
        seed = cycle.seed_block(cycle.round(state.block))
        due = seed if seed > state.block else seed + cycle.length
    return {
        "round": known.round,
        "outcome": known.outcome,
        "reason": known.reason,
        "attempts": known.attempts,
        "block": known.block,
        "next_due_block": due,
    }
