"""What a schema cannot say, told to schemathesis: which texts are hotkeys, and that a submission is signed, now."""

from __future__ import annotations

from typing import Any

import schemathesis

from tests.api.desk import Desk, new_key, signed


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Make what schemathesis means to be valid so: checksums, a signature, a group that exists, this cycle's block."""
    if case.meta is None or case.meta.generation.mode is not schemathesis.GenerationMode.POSITIVE:
        return
    if "X-Hotkey" in (case.headers or {}):
        case.headers["X-Hotkey"] = new_key().ss58_address
    if case.path == "/submit" and isinstance(case.body, dict):
        kept = {name: case.body[name] for name in ("checkpoint_hash",) if name in case.body}
        group = int(case.body["expert_group"]) % 4
        case.body = {**case.body, **signed(new_key(), Desk.NOW, expert_group=group, **kept)}
