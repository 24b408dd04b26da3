"""The one error a person sees: what part, which rule, what was given, how to mend it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The command line prints the message alone and exits with status 2."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'hira'?` for a near miss, or the whole list when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; it is one of: " + ", ".join(known) if known else ""
