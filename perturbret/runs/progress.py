"""How far a training is: in a notebook one line that updates, elsewhere a printed line per step."""

import re
import sys
import time
import warnings

from tqdm import tqdm

# accelerate asks for tqdm's bar that is a widget, and would say on every page that there are none.
warnings.filterwarnings("ignore", "IProgress not found")
_STEP = re.compile(r"(\w+) (\d+)/(\d+)\s*(.*)")


class Progress:
    """Takes a training's lines of text. Steps (`epoch 3/20  loss 1.2`) replace one another; other lines are printed.

    The bar is an output of the page and no widget, so that an executed notebook keeps its last state.

    Parameters
    ----------
    label : str
        What is trained, put before every line.
    """

    def __init__(self, label: str = ""):
        self.label, self.bar, self.last, self.started = label, None, 0, 0.0

    def __call__(self, line: str) -> None:
        step = _STEP.fullmatch(line)
        if step is None or not _in_notebook():
            print(f"{self.label}: {line}" if self.label else line)
            return
        from IPython.display import display

        number, total = int(step[2]), int(step[3])
        if self.bar is None or number <= self.last:  # the next member of an ensemble has a bar of its own
            self.bar, self.started = None, time.perf_counter()
        self.last = number
        meter = tqdm.format_meter(
            number,
            total,
            time.perf_counter() - self.started,
            ncols=110,
            prefix=self.label or "training",
            unit=f" {step[1]}",
            bar_format="{l_bar}{bar:12}| {n_fmt}/{total_fmt}{unit}s, {elapsed}{postfix}",
            postfix=step[4],
        )
        if self.bar is None:
            self.bar = display({"text/plain": meter}, raw=True, display_id=True)
        else:
            self.bar.update({"text/plain": meter}, raw=True)


def _in_notebook() -> bool:
    # Who imported no IPython is in no notebook.
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
