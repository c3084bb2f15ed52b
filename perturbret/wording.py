"""Numbers and lists as the pages write them."""

import re

import pandas as pd

# What Markdown, HTML or MathJax might take for markup; an underscore within a word is none.
_MARKUP = re.compile(r"[\\`*{}\[\]<>|~$&#!()]|(?<!\w)_|_(?!\w)")


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def plain(label: object) -> str:
    """A label for a Markdown text: shown as it is written, whatever it holds."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", str(label))


def percent(value: float, signed: bool = False) -> str:
    """0.1234 -> 12.3%; what rounds to zero has no minus."""
    rounded = round(100 * float(value), 1) + 0.0
    return f"{rounded:+.1f}%" if signed else f"{rounded:.1f}%"


def from_to(before: float, after: float) -> str:
    """`91.7% → 95.0%`; a dash where there is nothing to take a share of."""
    return "–" if pd.isna(before) else f"{percent(before)} → {percent(after)}"


def span(low: float, high: float, signed: bool = False) -> str:
    return f"[{percent(low, signed)}, {percent(high, signed)}]"
