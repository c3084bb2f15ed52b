"""Numbers and lists as the pages write them."""

import html

import pandas as pd


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def plain(name: str) -> str:
    """A name from the data as Markdown that shows it letter by letter: no tag, no emphasis, no link."""
    return "".join(f"&#{ord(c)};" if c in "*`[]|\\$~" else c for c in html.escape(str(name), quote=False))


def percent(value: float, signed: bool = False) -> str:
    """0.1234 -> 12.3%; what rounds to zero has no minus."""
    rounded = round(100 * float(value), 1) + 0.0
    return f"{rounded:+.1f}%" if signed else f"{rounded:.1f}%"


def from_to(before: float, after: float) -> str:
    """`91.7% → 95.0%`; a dash where there is nothing to take a share of."""
    return "–" if pd.isna(before) else f"{percent(before)} → {percent(after)}"


def span(low: float, high: float, signed: bool = False) -> str:
    return f"[{percent(low, signed)}, {percent(high, signed)}]"
