"""What a notebook's shell gets beside displays: keys on tab, and errors of one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from apr_core.errors import AprError
from apr_core.report.text import clean

_KEY = re.compile(r"""([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\[\s*(["'])([^"']*)$""")


def short_errors(shell: Any) -> None:
    """
    Show a typed error as its one line: it says what was expected and what to do, a traceback of ours would bury it.

    The cell fails as before: whoever runs the notebook sees an error output.
    """

    def show(
        self: Any, kind: type[BaseException], error: BaseException, trace: Any, tb_offset: Any = None
    ) -> list[str]:
        line = [f"{kind.__name__}: {clean(error)}"]
        self._showtraceback(kind, error, line)
        return line

    shell.set_custom_exc((AprError,), show)


def keys_on_tab(shell: Any) -> None:
    """Complete the keys of any mapping, as IPython does for dictionaries: ``trace["layers.0.<tab>``."""
    from IPython.core.completer import SimpleCompletion, context_matcher

    @context_matcher()  # type: ignore[untyped-decorator]
    def keys(context: Any) -> Any:
        found = _KEY.search(context.text_until_cursor)
        thing = _reach(shell.user_ns, found[1].split(".")) if found else None
        names = [str(k) for k in thing] if isinstance(thing, Mapping) else []
        typed, quote = (found[3], found[2]) if found else ("", "")
        fitting = [
            SimpleCompletion(name, type="dict key") for name in names if name.startswith(typed) and quote not in name
        ]
        return {"completions": fitting, "matched_fragment": typed, "suppress": bool(fitting)}

    shell.Completer.custom_matchers.append(keys)


def _reach(names: Mapping[str, Any], path: list[str]) -> Any:
    """Follow attributes that are there already: a property could load a model on a press of the tab key."""
    thing = names.get(path[0])
    for name in path[1:]:
        thing = getattr(thing, "__dict__", {}).get(name)
    return thing
