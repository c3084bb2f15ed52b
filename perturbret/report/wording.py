"""Numbers, lists and tables as the pages write them: whatever a label holds is text there, never HTML."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

# What Markdown, HTML or MathJax might take for markup; an underscore within a word is none.
_MARKUP = re.compile(r"[\\`*{}\[\]<>|~$&#!()]|(?<!\w)_|_(?!\w)")


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def plain(label: object) -> str:
    """A label for a Markdown text: shown as it is written, whatever it holds."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", str(label))


def listed(texts: Iterable[str], most: int = 12, between: str = ", ") -> str:
    """The first `most` texts and how many more there are; labels among them go through `plain` before."""
    texts = list(texts)
    return between.join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def percent(value: float, signed: bool = False) -> str:
    """0.1234 -> 12.3%; what rounds to zero has no minus."""
    rounded = round(100 * float(value), 1) + 0.0
    return f"{rounded:+.1f}%" if signed else f"{rounded:.1f}%"


def from_to(before: float, after: float) -> str:
    """`91.7% → 95.0%`; a dash where there is nothing to take a share of."""
    return "–" if pd.isna(before) else f"{percent(before)} → {percent(after)}"


def span(low: float, high: float, signed: bool = False) -> str:
    return f"[{percent(low, signed)}, {percent(high, signed)}]"


def with_interval(row) -> str:
    """`0.181 [0.150, 0.215]` from a row with estimate, ci_low and ci_high."""
    return f"{row.estimate:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]"


def difference(row) -> str:
    """`+0.012 [-0.004, +0.028]` from a row with difference, low and high."""
    return f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"


def with_p(row) -> str:
    """`better, p = 0.003` from a row with verdict and p_holm; the verdict alone where nothing was tested."""
    return row.verdict + ("" if pd.isna(row.p_holm) else f", p = {row.p_holm:.2g}")


def spread(value: float, n_repeats: int) -> str:
    """`0.004 (3)`: the standard deviation between repeats and their number."""
    return f"– ({n_repeats})" if pd.isna(value) else f"{value:.3f} ({n_repeats})"


class Shown(pd.DataFrame):
    """A table whose `.style` escapes cells, index and columns; that of other tables writes `<b>` as a tag."""

    @property
    def _constructor(self) -> type:
        return Shown

    @property
    def style(self) -> "Styler":
        return _escaping()(self)


@cache
def _escaping() -> type:
    """A Styler that escapes. Made when it is needed: pandas' own imports matplotlib."""
    from pandas.io.formats.style import Styler

    class Escaping(Styler):
        def __init__(self, data: pd.DataFrame, **options):
            super().__init__(data, **{"escape": "html", **options})
            for axis in (0, 1):
                self.format_index(axis=axis)

        def format(self, *args, escape: str | None = "html", **options) -> Styler:
            return super().format(*args, escape=escape, **options)

        def format_index(self, *args, escape: str | None = "html", **options) -> Styler:
            return super().format_index(*args, escape=escape, **options)

    return Escaping


def shown(
    table: pd.DataFrame,
    *,
    index: bool = False,
    precision: int = 2,
    formats: Mapping[str, str] | None = None,
) -> "Styler":
    """A table for a page: escaped, texts to the left, a dash for what is missing.

    Parameters
    ----------
    table : pandas.DataFrame
    index : bool, default False
        Show its index.
    precision : int
        Digits after the point.
    formats : mapping of column to format string, optional
        Of columns that are shown otherwise.

    Examples
    --------
    >>> table = pd.DataFrame({"gene": ["<KLF1>"], "hit rate": [0.1234], "p": [np.nan]})
    >>> page = shown(table).to_html()
    >>> [text in page for text in ("&lt;KLF1&gt;", "0.12", "–")]
    [True, True, True]
    """
    texts = [name for name in table.columns if not pd.api.types.is_numeric_dtype(table[name])]
    style = Shown(table).style.format(formats, precision=precision, na_rep="–")
    style = style.set_properties(subset=texts, **{"text-align": "left"})
    return style if index else style.hide(axis="index")
