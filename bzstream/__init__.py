"""The validator's HTTP node: zero-copy distribution of mixture-of-experts shards, submissions and evaluation.

The public API is the client's: everything in `bzstream.client.__all__` is here too. It is loaded when it is first used,
so that `import bzstream` costs nothing; type checkers see the same names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bzstream.client import *  # noqa: F403
    from bzstream.client import __all__ as __all__
    from bzstream.errors import BzstreamError

    __version__: str

    __all__ += ("BzstreamError", "__version__")

# Hidden from type checkers: with it in sight they would accept every misspelt name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        import sys
        from importlib import import_module
        from importlib.machinery import PathFinder

        module = sys.modules[__name__]
        if name == "__version__":
            from importlib.metadata import version

            module.__version__ = version(__name__)
        # `from bzstream import <package>` asks here before it looks for the package, which needs no client.
        elif name == "__all__" or not (name.startswith("__") or PathFinder.find_spec(name, module.__path__)):
            client = import_module("bzstream.client")
            vars(module).update({public: getattr(client, public) for public in client.__all__})
            module.BzstreamError = import_module("bzstream.errors").BzstreamError
            module.__all__ = (*client.__all__, "BzstreamError", "__version__")
        try:
            return vars(module)[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=module) from None

    def __dir__() -> list[str]:
        return sorted({*__getattr__("__all__"), *globals()})
