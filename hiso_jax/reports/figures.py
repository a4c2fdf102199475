"""Figures of runs and comparisons, sized for a paper."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax.checks import ParameterError
from hiso_jax.reports.charts import GREY, colors_of
from hiso_jax.reports.pictures import empty_figure, plain_log_axis
from hiso_jax.reports.subject import AXES, Line, Subject, line_of, spread_in_words
from hiso_jax.reports.text import human_count, short_names

# Inches: the width of one and of two columns, the height of a panel and of a row of ratios.
WIDTHS = {1: 3.4, 2: 7.0}
PANEL, ROW = 2.1, 0.2
# Of more lines than LABELLED, only as many have a colour and a label: the baseline's and the best.
LABELLED, FEW = 5, 12
# Longest name of a line that stands beside its end, in characters.
LONGEST = 20
# Panels whose positions are proportional to the rounds up to this share show the same curves.
SAME = 0.02
FAR_APART, FAR_UP = 20, 3
SPREAD_OPACITY = 0.18
FIGURES = {"rounds": ("o", "rounds"), "bytes_up": ("s", "bytes up"), "forward_passes": ("D", "forward passes")}
BOUNDS = {"least": (">", "at least"), "most": ("<", "at most")}
FONT: Any = {"font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7}


def figure_of_subjects(subjects: Sequence[Subject], against: Sequence[str], columns: int, title: str = "") -> Any:
    """Draw runs and comparisons in one figure: the metric that counts against costs, and below the paired ratios.

    Args:
      subjects: runs and comparisons of one metric.
      against: names in :data:`AXES`, a panel each. A panel that would repeat the one of the rounds is left out.
      columns: the width of the figure in columns of a paper, 1 or 2.
      title: the title; a figure of a paper has none.

    Returns:
      The ``matplotlib.figure.Figure``.

    Raises:
      ParameterError: an argument is not valid, or the subjects have different metrics.
    """
    if columns not in WIDTHS:
        raise ParameterError("columns", f"must be 1 or 2, got {columns!r}")
    unknown = [name for name in against if name not in AXES]
    if isinstance(against, str) or not against or unknown:
        raise ParameterError("against", f"must be some of {', '.join(AXES)}, got {', '.join(unknown) or against!r}")
    if len({subject.metric for subject in subjects}) > 1:
        names = ", ".join(sorted({subject.metric.name for subject in subjects}))
        raise ParameterError("paths", f"must be runs and comparisons of one metric, got {names}")
    import matplotlib as mpl

    with mpl.rc_context(FONT):
        return _draw(subjects, against, columns, title)


def _draw(subjects: Sequence[Subject], against: Sequence[str], columns: int, title: str) -> Any:
    panels = [(subject, _panels(subject, against)) for subject in subjects]
    across = 1 if columns == 1 else min(3, max(len(own) for _, own in panels))
    # Every subject begins a row of its own.
    rows = [own[at : at + across] for _, own in panels for at in range(0, len(own), across)]
    owners = [subject for subject, own in panels for _ in range(0, len(own), across)]
    rated = [subject for subject in subjects if _ratios_of(subject)]
    heights = [PANEL] * len(rows) + [0.75 + ROW * len(_ratios_of(subject)) for subject in rated]
    notes = {spread_in_words(len(done.histories)) for subject in subjects for done in subject.compared.values()} - {""}
    figure = empty_figure(WIDTHS[columns], sum(heights) + 0.25 * bool(title) + 0.2 * bool(notes))
    grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
    first: dict[tuple[int, str], Any] = {}
    for row, (subject, own) in enumerate(zip(owners, rows, strict=True)):
        for column, (axis, metric) in enumerate(own):
            key = id(subject), metric
            drawn = figure.add_subplot(grid[row, column], sharey=first.get(key))
            is_first = first.setdefault(key, drawn) is drawn
            _panel(drawn, subject, axis, metric, labelled=column + 1 == len(own))
            if column == 0 and len(subjects) > 1:
                drawn.set_title(subject.title, loc="left")
            drawn.tick_params(labelleft=column == 0 or is_first)
            if column == 0 or is_first:
                drawn.set_ylabel(f"test {metric.replace('_', ' ')}")
    for place, subject in enumerate(rated):
        _forest(figure.add_subplot(grid[len(rows) + place, :]), subject, is_wide=columns > 1)
    long = {label: line for panel in figure.axes for line, label in _named_lines(panel, subjects)}
    if long:
        figure.legend(long.values(), long.keys(), loc="outside lower left", frameon=False, ncols=columns)
    if title:
        figure.suptitle(title)
    if notes:
        figure.supxlabel("; ".join(sorted(notes)), fontsize=6.5, color="0.35")
    return figure


def _named_lines(panel: Any, subjects: Sequence[Subject]) -> list[tuple[Any, str]]:
    """The lines of a panel whose names are too long to stand beside their ends."""
    named = {name for each in subjects if _has_long_names(each) for name in short_names(list(each.compared)).values()}
    lines, labels = panel.get_legend_handles_labels()
    return [(line, label) for line, label in zip(lines, labels, strict=True) if label in named]


def _panels(subject: Subject, against: Sequence[str]) -> list[tuple[str, str]]:
    """The axis and the metric of each panel; a run's loss has a panel, too."""
    name = subject.metric.name
    found = [(axis, name) for axis in _distinct(subject, against)]
    known = next(iter(subject.compared.values())).histories[0][0].metrics
    return [*found, ("round", "loss")] if subject.baseline is None and name != "loss" and "loss" in known else found


def _distinct(subject: Subject, against: Sequence[str]) -> list[str]:
    """The axes that were recorded, without those that are proportional to the rounds, by one factor for all methods."""
    kept = []
    for axis in against:
        lines = {name: line_of(done.histories, axis, subject.metric.name) for name, done in subject.compared.items()}
        if any(line is None for line in lines.values()):
            continue
        factors = []
        for name, line in lines.items():
            assert line is not None
            rounds = np.array([row.round for row in subject.compared[name].histories[0][: len(line.at)]], float)
            factors += list(line.at[rounds > 0] / rounds[rounds > 0])
        repeats = axis != "round" and "round" in against and factors
        if not (repeats and np.ptp(factors) <= SAME * max(factors)):
            kept.append(axis)
    return kept or ["round"]


def _panel(drawn: Any, subject: Subject, axis: str, metric: str, *, labelled: bool) -> None:
    names, colors = short_names(list(subject.compared)), _colors(subject)
    ends: list[tuple[str, Line]] = []
    # Grey lines lie behind the others.
    for name in sorted(subject.compared, key=lambda name: colors[name] != GREY):
        line = line_of(subject.compared[name].histories, axis, metric)
        if line is None:
            continue
        is_grey = colors[name] == GREY
        marker = "o" if len(line.at) <= FEW else None
        style = {"color": colors[name], "linewidth": 0.8 if is_grey else 1.4, "marker": marker, "markersize": 2.5}
        drawn.plot(line.at, line.mean, zorder=1 if is_grey else 3, label=names[name], **style)
        if line.runs > 1 and not is_grey:
            drawn.fill_between(line.at, line.low, line.high, alpha=SPREAD_OPACITY, color=colors[name], lw=0, zorder=2)
        ends.append((name, line))
    last = [line.at[-1] for _, line in ends]
    drawn.set_xlabel(AXES[axis])
    drawn.grid(alpha=0.25)
    drawn.spines[["top", "right"]].set_visible(False)
    if last and axis != "round" and max(last) > FAR_APART * min(last) > 0:
        drawn.set_xscale("log", nonpositive="mask")
    else:
        drawn.locator_params(axis="x", nbins=4, integer=axis == "round")
        drawn.xaxis.set_major_formatter(lambda value, _: human_count(value) if value >= 1000 else f"{value:g}")
    if metric == "loss":
        _leave_out_what_diverged(drawn, [line for _, line in ends])
    if subject.target is not None and metric == subject.metric.name:
        drawn.axhline(subject.target, color="0.4", linewidth=0.8, linestyle="--", zorder=0)
        # Curves are far below the target where they begin.
        place, text = (0.01, subject.target), f"target {subject.target:g}"
        up = (0, 1.5 if subject.metric.sign > 0 else -6)
        drawn.annotate(text, place, up, drawn.get_yaxis_transform(), "offset points", color="0.4", fontsize=6)
    shown = [(name, line) for name, line in ends if colors[name] != GREY]
    if labelled and len(subject.compared) > 1 and not _has_long_names(subject):
        _label(drawn, [(names[name], colors[name], float(line.mean[-1])) for name, line in shown], len(ends))


def _has_long_names(subject: Subject) -> bool:
    """Whether the names of the lines would take the width of the panels; they are in a legend then."""
    return max(map(len, short_names(list(subject.compared)).values())) > LONGEST


def _colors(subject: Subject) -> dict[str, str]:
    """As in reports, but of many methods only a few have a colour: more cannot be told apart in print."""
    colors = colors_of(subject)
    if len(colors) <= LABELLED:
        return colors
    return colors_of(subject, LABELLED)


def _label(drawn: Any, labels: Sequence[tuple[str, str, float]], count: int) -> None:
    """Write the names of the lines beside their ends, moved apart where they would overlap."""
    low, high = drawn.get_ylim()
    step = (high - low) * 0.085
    ordered = sorted((each for each in labels if np.isfinite(each[2])), key=lambda each: each[2])
    places: list[float] = []
    for _, _, value in ordered:
        places.append(value if not places else max(value, places[-1] + step))
    if places:
        # Moved apart to both sides, and kept inside the panel.
        over = float(np.mean(places) - np.mean([value for _, _, value in ordered]))
        over = min(max(over, places[-1] - (high - step / 2)), places[0] - (low + step / 2))
        places = [place - over for place in places]
    for (name, color, _), place in zip(ordered, places, strict=True):
        drawn.annotate(
            name,
            (1.02, place),
            xycoords=drawn.get_yaxis_transform(),
            color=color,
            va="center",
            fontsize=7,
            annotation_clip=False,
        )
    if count > len(ordered):
        text = f"grey: {count - len(ordered)} others"
        at = places[0] - step if places else low
        drawn.annotate(
            text, (1.02, at), xycoords=drawn.get_yaxis_transform(), color=GREY, va="center", fontsize=7,
            annotation_clip=False,
        )  # fmt: skip


def _leave_out_what_diverged(drawn: Any, lines: Sequence[Line]) -> None:
    """If a line rises far above its start, limit the axis to the others; the line leaves the panel."""
    begun = max((abs(line.mean[0]) for line in lines), default=np.nan)
    low, high = drawn.get_ylim()
    lowest = min((float(np.nanmin(line.low)) for line in lines), default=0.0)
    if np.isfinite(begun) and high > FAR_UP * begun > 0:
        drawn.set_ylim(max(low, lowest - 0.1 * begun), 1.5 * begun)


def _ratios_of(subject: Subject) -> dict[str, dict[str, Any]]:
    """Method → its ratios to the baseline, without the baseline and methods that have none."""
    if subject.target is None:
        return {}
    return {
        name: result["ratios"]
        for name, result in subject.results.items()
        if name != subject.baseline and any(result["ratios"][figure] for figure in FIGURES)
    }


def _forest(drawn: Any, subject: Subject, *, is_wide: bool) -> None:
    """The ratios to the baseline with their intervals, a row per method: its colour, and a mark per measure."""
    names, colors, ratios = short_names(list(subject.compared)), _colors(subject), _ratios_of(subject)
    used: dict[str, str] = {}
    for place, (name, own) in enumerate(ratios.items()):
        for offset, (figure, (mark, words)) in zip((-0.24, 0.0, 0.24), FIGURES.items(), strict=True):
            ratio = own[figure]
            if ratio is None:
                continue
            mark, words = BOUNDS.get(ratio["bound"], (mark, words))
            used[words] = mark
            drawn.plot(ratio["value"], place + offset, mark, color=colors[name], markersize=3.5)
            if ratio["low"] is not None:
                drawn.plot([ratio["low"], ratio["high"]], [place + offset] * 2, color=colors[name], linewidth=1)
    for words, mark in used.items():
        drawn.plot([], [], mark, color="0.4", markersize=3.5, label=words)
    drawn.axvline(1, color="0.4", linewidth=0.8, linestyle="--")
    plain_log_axis(drawn)
    # 1 and a number to each side that has data can be read.
    low, high = drawn.get_xlim()
    drawn.set_xlim(min(low, 0.48), max(high, 2.1))
    drawn.set_yticks(range(len(ratios)), [names[name] for name in ratios])
    drawn.set_ylim(-0.6, len(ratios) - 0.4)
    drawn.invert_yaxis()
    words, baseline = subject.metric.name.replace("_", " "), names.get(subject.baseline or "", subject.baseline)
    drawn.set_xlabel(f"cost to {words} {subject.target:g} ({baseline} = 1)")
    drawn.grid(alpha=0.25)
    drawn.spines[["top", "right"]].set_visible(False)
    if is_wide:
        drawn.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        drawn.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderpad=0, columnspacing=1)


def save_picture(subject: Subject, path: Path, title: str) -> None:
    """Draw a run or a comparison as the PNG of its directory."""
    figure_of_subjects([subject], ("round", "bytes_up", "forward_passes"), 2, title).savefig(path, dpi=170)
