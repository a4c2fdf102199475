"""The figures of a run that has ended, and advice if it has learned nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from hiso_jax import fed
from hiso_jax.reports import human_bytes, human_count, human_seconds, plain, print_rows
from hiso_jax.reports.directory import SAMPLES, read_samples

# In standard deviations. At this offset 1 bit tells 9 % less of a Gaussian scalar, and 2 bits 3 % less.
LARGE_OFFSET = 0.5
# Least change of the loss that counts, as a share of the loss at the start.
UNMOVED = 0.01
# The summary names the share of zero scalars above this share.
NOTABLE = 0.01
# Characters of a prompt's end, and of an answer, on a terminal.
SHOWN = 60


def print_summary(console: Console, summary: dict, directory: Path) -> None:
    """Print the figures of a run that has ended."""
    reached = summary["rounds_to_target"]
    held = "the mean of that evaluation and the next two"
    at_target = f"from round {reached} on: {held}" if reached is not None else "not reached"
    attendance = summary["attendance"]
    missing = ", ".join(f"{attendance[name]} {name}" for name in ("absent", "dropped", "late", "invalid"))
    per_device = f"{summary['cohort_per_device']} clients a round each"
    if summary["cohort_padding"]:
        per_device += f" ({summary['cohort_padding']} of them padding)"
    shards = summary["mesh"]["model"]
    split = f", parameters in {shards} parts" if shards > 1 else ""
    metric = summary["metric"]
    words = metric.replace("_", " ")
    others = {name: value for name, value in summary["metrics"].items() if name != metric}
    rows = {
        f"test {words}": f"{summary[metric]:.4f}, before {summary[f'initial_{metric}']:.4f}"
        if np.isfinite(summary[metric])
        else "—",
        "also": ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in others.items()),
        "target": f"{words} {summary['target']:g} {at_target}" if summary["target"] is not None else "none",
        "method": f"{summary['algorithm']}, rate {summary['learning_rate']:g}, seed {summary['seed']}",
        "rounds": f"{summary['rounds']} ({summary['rounds_per_second']:.3g} rounds/s)",
        "seconds": f"{summary['wall_seconds']:.1f}: "
        + ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary["seconds_spent"].items()),
        "bytes a client": f"up {human_bytes(summary['bytes_up_per_client'])}, "
        f"down {human_bytes(summary['bytes_down_per_client'])} "
        f"({human_bytes(summary['bytes_paper_convention'])} as the paper counts)",
        "forward passes": f"{human_count(summary['forward_passes'])} by all clients",
        "attendance": f"{attendance['reported']} reports, {missing}",
        "attacked by": summary["attacked_by"] or "",
        "clipped": "" if summary["clipped"] is None else _clipped(summary["clipped"], summary["clipped_by"]),
        "staleness": _staleness(summary["staleness"]),
        "zero scalars": f"{summary['zero_scalars']:.1%}" if (summary["zero_scalars"] or 0) > NOTABLE else "",
        "privacy": _privacy(summary["privacy"]),
        "simulated time": human_seconds(summary["simulated_seconds"]),
        "devices": f"{summary['device_count']} {summary['device']}: {per_device}{split}",
        "directions": f"{human_count(summary['directions'])} made by all clients, to measure along and to catch up",
        "trained": f"{summary['trained_parameters']:,} parameters",
        "parameters": f"SHA-256 {summary['params_sha256']}",
        "written to": str(directory),
    }
    for name in ("attacked by", "clipped", "staleness", "zero scalars", "privacy"):
        if not rows[name]:
            del rows[name]
    if not summary["directions"]:
        del rows["directions"]
    if not others:
        del rows["also"]
    if summary["target"] is None:
        del rows["target"]
    if not any(attendance[name] for name in ("absent", "dropped", "late", "invalid")):
        del rows["attendance"]
    print_rows(console, rows)
    for concern in summary["concerns"]:
        console.print(f"warning: {concern}", soft_wrap=True, highlight=False)


def _staleness(found: dict[str, float] | None) -> str:
    """How many updates the server made between an invitation and its answer."""
    return "" if found is None else f"{found['mean']:.2g} updates on average, at most {found['most']}"


def _clipped(share: float, steps: Sequence[str]) -> str:
    """The share of the messages that the server clipped, and what clipped them."""
    if list(steps) == ["guard"]:
        return f"{100 * share:.1f} % of the messages, by the guard (--no-guard turns it off)"
    by = " and ".join(step.replace("_", " ") for step in steps)
    # It shortens every message above the median: half of them, by design.
    by += " (half by design)" if "clip_to_median" in steps else ""
    return f"{100 * share:.1f} % of the messages{f', by {by}' if by else ''}"


def _privacy(spent: dict | None) -> str:
    """The privacy budget that a run has spent, in words; empty if the run is not private."""
    if spent is None:
        return ""
    epsilon = "ε not computed (pip install '.[privacy]')" if spent["epsilon"] is None else f"ε {spent['epsilon']:.3g}"
    whose = "each client's own noise" if spent["local"] else "the server's noise"
    how = "secret cohorts" if spent["visits"] is None else f"{spent['visits']} visits of one client"
    noise = f"{spent['noise_multiplier']:.4g} × {spent['clip_norm']:g}"
    return f"{epsilon} at δ {spent['delta']:g} for a client: {how}, {whose} {noise}"


def hint(rate: float, result: fed.Result, console: Console) -> None:
    """Print a hint if a run that came to its end has not learned anything."""
    losses = [row.metrics["loss"] for row in result.metrics if "loss" in row.metrics]
    if result.diverged_at is not None or result.interrupted or result.health_warnings or len(losses) < 2:
        return
    first, best, last = losses[0], min(losses[1:]), losses[-1]
    if not result.attendance["reported"]:
        console.print("nobody reported in any round, so nothing was learned", soft_wrap=True, highlight=False)
        return
    if last > first + UNMOVED * abs(first):
        words = f"the loss rose from {first:.3g} to {last:.3g}: rate {rate:g} is probably too high"
        words += ", or the noise too strong" if result.privacy is not None else ""
    elif best > first - UNMOVED * abs(first):
        words = f"the loss has hardly moved from {first:.3g}: rate {rate:g} is probably too low, or the rounds too few"
    else:
        return
    # The search reads the losses of the clients, so it is not for a private run.
    looks = "" if result.privacy is not None else "; --learning-rate auto looks for one"
    console.print(f"{words}{looks}", soft_wrap=True, highlight=False)


def warn_of_offset(algorithm: fed.Algorithm, difference: str | None, result: fed.Result, console: Console) -> None:
    """Print a warning if forward differences have spent the few bits of a scalar on an offset common to all scalars."""
    few = algorithm.wire.is_coded and not algorithm.wire.is_exact and algorithm.measure is None
    if few and difference != "central" and abs(result.offset or 0.0) > LARGE_OFFSET:
        console.print(
            f"the scalars of a message have {result.offset:.2f} of their spread in common, which few bits lose their "
            "range on: --difference central removes it, for 2·P forward passes in place of P + 1",
            soft_wrap=True,
        )


def print_samples(console: Console, directory: Path) -> None:
    """Print the answers of the last evaluation to a few test prompts, if the run shows any."""
    rows = read_samples(directory)
    for row in [each for each in rows if each["round"] == rows[-1]["round"]]:
        prompt, answer, golden = (row[name].strip() for name in ("prompt", "answer", "golden"))
        prompt = prompt if len(prompt) <= SHOWN else "…" + prompt[-SHOWN:]
        said = f"answer: {plain(prompt)} → {answer[:SHOWN]!r}, right: {golden[:SHOWN]!r}"
        console.print(said, soft_wrap=True, highlight=False, markup=False)
    if rows:
        console.print(f"answers of all evaluations: {directory / SAMPLES}", soft_wrap=True, highlight=False)
