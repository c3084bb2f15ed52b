"""What notebook 04 shows of a training: curves, gradients, and the proof that the right weights learned."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from ..runs.runs import Run
from .figures import new_figure

COLOURS = {"loss": "#8a8a8a", "val_loss": "#1b6ca8", "grad_backbone": "#c1440e", "grad_head": "#3f8f4f"}
LABELS = {"loss": "training", "val_loss": "validation", "grad_backbone": "network", "grad_head": "head"}


def training_curves(history: pd.DataFrame, chance: float) -> Figure:
    """Loss, validation exact_hit@1 and gradient norms over epochs, a line per member; the kept epoch is marked."""
    figure, (left, middle, right) = new_figure(10.5, 3.2, columns=3)
    for member, part in history.groupby("member"):
        for axis, names in ((left, ("loss", "val_loss")), (right, ("grad_backbone", "grad_head"))):
            for name in names:
                if name in part and part[name].notna().any():
                    label = LABELS[name] if member == history["member"].min() else None
                    axis.plot(part["epoch"], part[name], color=COLOURS[name], lw=1.5, alpha=0.8, label=label)
        middle.plot(part["epoch"], part["val_exact_hit@1"], color=COLOURS["val_loss"], lw=1.5, alpha=0.8)
        best = best_epoch(part)
        middle.plot(best["epoch"], best["val_exact_hit@1"], "o", color=COLOURS["val_loss"], ms=6)
    middle.axhline(chance, color="#555", ls=":", lw=1)
    middle.annotate(
        "chance", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#555"
    )
    left.set(title="Loss", xlabel="epoch")
    middle.set(title="Validation exact_hit@1 (dot: kept)", xlabel="epoch", ylim=(0, None))
    right.set(title="Gradient norm", xlabel="epoch", yscale="log")
    right.yaxis.set_major_formatter(LogFormatter())  # others write mathematics, which pages show as text
    right.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
    for axis in (left, right):
        axis.legend()
    return figure


def best_epoch(history: pd.DataFrame) -> pd.Series:
    """The row of one member's history whose weights were kept: most hits, then the lowest loss, then the first."""
    # Hits rounded as training does, so that sums of hits in another order are equal.
    rounded = history.assign(hits=history["val_exact_hit@1"].round(9))
    order = rounded.sort_values(["hits", "val_loss", "epoch"], ascending=[False, True, True], kind="stable")
    return order.drop(columns="hits").iloc[0]


def proof_table(run: Run) -> pd.DataFrame:
    """What was proved of each member, one row per check, for the true labels."""
    checks = run.manifest["fit"]["checks"]
    columns = {}
    for name, found in checks.items():
        if not name.startswith("member"):
            continue
        norms = found["gradient_norms"]
        merged = found["merged_difference"]
        columns[name] = {
            "trained tensors": f"{len(norms):,}",
            "with a gradient": f"{sum(norm > 0 for norm in norms.values()):,}",
            "smallest mean gradient norm": f"{min(norms.values()):.1e}",
            "embedding change against the frozen network": f"{found['embedding_change']:.1%}",
            "merged against unmerged adapters, largest difference": "no adapters"
            if merged is None
            else f"{merged:.0e}",
            "frozen tensors equal bit for bit": f"{found['frozen_unchanged']:,}",
        }
    # A mode that trains nothing has no members, and still something to say.
    table = pd.DataFrame(columns or {"nothing trained": {}})
    table.loc["saved and loaded again: equal bit for bit"] = str(checks["reloaded_equal"]).replace(
        "True", "yes"
    )
    return table


def gradient_table(run: Run) -> pd.DataFrame:
    """Mean gradient norm of every trained tensor, a column per member; empty where nothing is trained."""
    checks = run.manifest["fit"]["checks"]
    norms = {name: found["gradient_norms"] for name, found in checks.items() if name.startswith("member")}
    table = pd.DataFrame(norms)
    table.index = [
        name.replace(".default", "").removeprefix("network.transformer_encoder.") for name in table.index
    ]
    return table.rename_axis("tensor")
