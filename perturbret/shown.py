"""Tables as pages show them: whatever a label holds is text there, never HTML."""

from collections.abc import Mapping

import pandas as pd
from pandas.io.formats.style import Styler


class Shown(pd.DataFrame):
    """A table whose `.style` escapes cells, index and columns; that of other tables writes `<b>` as a tag."""

    @property
    def _constructor(self) -> type:
        return Shown

    @property
    def style(self) -> Styler:
        return _Escaping(self)


class _Escaping(Styler):
    def __init__(self, data: pd.DataFrame, **options):
        super().__init__(data, **{"escape": "html", **options})
        for axis in (0, 1):
            self.format_index(axis=axis)

    def format(self, *args, escape: str | None = "html", **options) -> Styler:
        return super().format(*args, escape=escape, **options)

    def format_index(self, *args, escape: str | None = "html", **options) -> Styler:
        return super().format_index(*args, escape=escape, **options)


def shown(
    table: pd.DataFrame,
    *,
    index: bool = False,
    precision: int = 2,
    formats: Mapping[str, str] | None = None,
) -> Styler:
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
    """
    texts = [name for name in table.columns if not pd.api.types.is_numeric_dtype(table[name])]
    style = Shown(table).style.format(formats, precision=precision, na_rep="–")
    style = style.set_properties(subset=texts, **{"text-align": "left"})
    return style if index else style.hide(axis="index")
