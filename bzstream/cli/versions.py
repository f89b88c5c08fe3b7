"""`bzstream versions`: the versions in a store, and which one is served."""

from __future__ import annotations

import json
import time

from bzstream.cli._options import AsJson, StoreFolder


def versions(store: StoreFolder, as_json: AsJson = False) -> None:
    """List a store's versions, the one that was made current last first."""
    from bzstream.model.versions import list_versions

    found = list_versions(store)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for each in found:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(each["activated_at"]))
        signed = f"signed by {each['hotkey']}" if each["hotkey"] else "not signed"
        marks = "".join(f"  ({word})" for key, word in (("current", "current"), ("pinned", "in a round")) if each[key])
        size = f"{each['size']:,} bytes" + (f" and {each['coded']:,} of coded forms" if each["coded"] else "")
        print(f"{each['version']}  block {each['block']}, made current {when}, {size}, {signed}{marks}")
