"""A diagnosis as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hiso_jax.fed.diagnosis import Diagnosis, Vectors
from hiso_jax.reports.pictures import empty_figure

# Rows: title, entry of the diagnosis, number format.
ROWS = (
    ("loss", "loss", ".3f"),
    ("H and the Hessian's diagonal, rank correlation", "hessian", "+.3f"),
    ("H and the empirical Fisher's", "fisher", "+.3f"),
    ("H shuffled: chance", "shuffled", "+.3f"),
    ("the Fisher's and the Hessian's", "fisher_hessian", "+.3f"),
    ("H, 95th over 5th percentile", "curvature_spread", ".3g"),
    ("standard error of the diagonal, of its spread", "diagonal_error", ".2f"),
    ("whitening rank ζ", "whitening_rank", ".3g"),
    ("ζ of a constant H", "isotropic_rank", ".3g"),
    ("effective rank κ", "effective_rank", ".3g"),
    ("largest |eigenvalue|", "norm", ".3g"),
    ("share of negative eigenvalues", "negative", ".2f"),
    ("tr(ΣD) / ∇ᵀD∇", "curvature_to_descent", ".3g"),
    ("the same with D = 1", "isotropic_to_descent", ".3g"),
    ("client noise σ²/F of one scalar", "noise", ".3g"),
    ("of a cohort's mean σ²/(C F)", "share", ".3g"),
    ("gain of own directions", "own", ".1f"),
    ("mean / sd of a message's scalars", "offset", "+.2f"),
)


def diagnosis_table(found: Sequence[Diagnosis]) -> Table:
    """A table with a column per round and a row per figure."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("after rounds")
    for each in found:
        table.add_column(f"{each.round:,}", justify="right")
    for title, entry, form in ROWS:
        values = [getattr(each, entry) for each in found]
        if any(value is not None for value in values):
            table.add_row(title, *("—" if value is None else format(value, form) for value in values))
    return table


def diagnosis_picture(found: Sequence[Diagnosis], last: Vectors, path: Path, *, title: str) -> None:
    """Draw correlations and noise over the rounds; for the last round draw the spectrum, and H against the Hessian."""
    figure = empty_figure(11.0, 7.6)
    axes = figure.subplots(2, 2)
    rounds = [each.round for each in found]
    lines = (("hessian", "the Hessian", "-"), ("fisher", "the empirical Fisher", "--"), ("shuffled", "chance", ":"))
    for entry, label, dashes in lines:
        heights = [np.nan if getattr(each, entry) is None else getattr(each, entry) for each in found]
        if np.isfinite(heights).any():
            axes[0, 0].plot(rounds, heights, marker="o", markersize=4, linestyle=dashes, label=label)
    if axes[0, 0].lines:
        axes[0, 0].set_ylim(-1, 1)
        axes[0, 0].legend(frameon=False, loc="lower right")
    else:
        axes[0, 0].text(
            0.5, 0.5, "the method has no curvature", transform=axes[0, 0].transAxes, ha="center", color="0.4"
        )
    axes[0, 0].axhline(0, color="0.7", linewidth=0.8)
    axes[0, 0].set_ylabel("rank correlation of H with")
    axes[0, 1].plot(rounds, [each.share for each in found], marker="o", markersize=4, color="C3")
    axes[0, 1].axhline(1, color="0.7", linewidth=0.8)
    axes[0, 1].set_yscale("log")
    axes[0, 1].set_ylabel("client noise σ²/(C F)")
    for axis in axes[0]:
        axis.set_xlabel("rounds")
    values, weights = last.eigenvalues, np.maximum(last.weights, 1e-12)
    axes[1, 0].vlines(values, 1e-7, weights, color="C0", linewidth=1.5)
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_ylim(1e-7, 2)
    axes[1, 0].set_xscale("symlog", linthresh=max(1e-2 * np.abs(values).max(), 1e-12), linscale=2)
    axes[1, 0].set_xlabel(f"eigenvalue of the Hessian after {rounds[-1]:,} rounds")
    axes[1, 0].set_ylabel("share of all eigenvalues")
    if last.curvature is None:
        order = np.sort(last.diagonal)[::-1]
        axes[1, 1].plot(np.arange(1, len(order) + 1), order)
        axes[1, 1].set_xscale("log")
        axes[1, 1].set_xlabel("parameter, by its second derivative")
        axes[1, 1].set_ylabel("diagonal of the Hessian")
    else:
        seen = last.diagonal > 0
        axes[1, 1].scatter(last.curvature[seen], last.diagonal[seen], s=2, alpha=0.3, rasterized=True)
        axes[1, 1].set_xscale("log")
        axes[1, 1].set_yscale("log")
        axes[1, 1].set_xlabel(f"H after {rounds[-1]:,} rounds")
        axes[1, 1].set_ylabel("Hessian's diagonal, where above 0")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
