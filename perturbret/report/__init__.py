"""Report: what notebooks show. Tables in, tables, figures and sentences out; nothing is fitted here.

`check_screen` says what could mislead, `build_report` compares finished runs with intervals and verdicts; a figure is a
function of a table, a sentence a function of its numbers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "ablation": ["Report", "build_report"],
        "audit": ["check_screen"],
        "compare": ["collect"],
        "wording": ["shown"],
    },
)
