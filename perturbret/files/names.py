"""Names that somebody wrote: the nearest ones that are known, for the text of an error."""

import difflib


def nearest(word: str, known: list[str], n: int = 3) -> str:
    """'nearest: a, b' out of `known`, then all known names when none is near or they are few."""
    known = [str(name) for name in known]
    by_case = {name.casefold(): name for name in known}
    close = [by_case[key] for key in difflib.get_close_matches(word.casefold(), by_case, n=n, cutoff=0.5)]
    listed = ", ".join(map(repr, sorted(known)[:40])) + (" ..." if len(known) > 40 else "")
    return (f"nearest: {', '.join(map(repr, close))}; " if close else "") + f"known: {listed}"
