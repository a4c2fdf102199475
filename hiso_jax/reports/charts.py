"""Charts of a report, as Vega-Lite specifications: https://vega.github.io/vega-lite."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hiso_jax.reports.subject import AXES, Subject, line_of
from hiso_jax.reports.text import short_names

Spec = dict[str, Any]
# Colours that differ in both themes and for the colour-blind; methods beyond them are grey.
COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#9c6b4e")
GREY = "#8a919b"
# Points of a line at most.
MOST_POINTS = 400
# Positions on an axis that differ by a factor of FAR_APART between methods get a logarithmic axis.
FAR_APART = 20
FADED = 0.12
# Up to this many evaluations are shown as points.
FEW = 12


def colors_of(subject: Subject, most: int = len(COLORS)) -> dict[str, str]:
    """Method → its colour. Of more than ``most`` methods, the baseline and the best have one, and others are grey."""
    ranked = sorted(subject.compared, key=lambda name: (name != subject.baseline, *_rank(subject, name)))
    colors, chosen = iter(COLORS), {*ranked[:most]}
    return {name: next(colors) if name in chosen else GREY for name in subject.compared}


def _rank(subject: Subject, name: str) -> tuple[float, float]:
    """Fewest rounds to the target first; then the best final metric."""
    runs = subject.compared[name].runs
    took = [run.get("rounds_to_target") for run in runs]
    ends = [run.get(subject.metric.name) for run in runs]
    final = float(np.mean([subject.metric.worst if end is None else end for end in ends]))
    reached = [rounds for rounds in took if rounds is not None]
    return float(np.mean(reached)) if len(reached) == len(took) else np.inf, -subject.metric.sign * final


def _scale(subject: Subject) -> Spec:
    colors, names = colors_of(subject), short_names(list(subject.compared))
    return {"domain": [names[name] for name in colors], "range": [*colors.values()]}


def _color(subject: Subject) -> Spec:
    return {"field": "method", "type": "nominal", "scale": _scale(subject), "legend": None}


def _faded(strong: float) -> Spec:
    """The opacity of a mark: weak where other methods are picked."""
    return {
        "condition": {"test": "picked.length == 0 || indexof(picked, datum.method) >= 0", "value": strong},
        "value": FADED * strong,
    }


def _base(title: str, height: int) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": height,
        "background": "transparent",
        "title": {"text": title, "anchor": "start", "fontSize": 13, "fontWeight": 600},
        "autosize": {"type": "fit", "contains": "padding"},
        "params": [{"name": "picked", "value": []}],
        "config": {
            "view": {"stroke": None},
            "axis": {"domain": False, "ticks": False, "labelPadding": 6, "titleFontWeight": 400, "labelFontSize": 11},
        },
    }


def _log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten inside the range of the values; the powers alone if these are enough."""
    decades = range(int(np.floor(np.log10(min(values)))), int(np.ceil(np.log10(max(values)))) + 1)
    steps = (1,) if len(decades) > 4 else (1, 2, 5)
    return [step * 10.0**decade for decade in decades for step in steps]


def _horizontal(axis: str, log_values: Sequence[float] | None) -> Spec:
    """The horizontal axis of a curve; logarithmic over ``log_values``, if these are given."""
    is_log = log_values is not None
    return {
        "field": "at",
        "type": "quantitative",
        "title": f"{AXES[axis]}, logarithmic" if is_log else AXES[axis],
        "scale": {"type": "log"} if is_log else {"zero": False},
        "axis": {
            "grid": False,
            "labelExpr": "format(datum.value, '.3~s')",
            "tickCount": 5,
            "labelOverlap": True,
            **({} if log_values is None else {"values": _log_ticks(log_values)}),
        },
    }


def curve(subject: Subject, axis: str, metric: str) -> Spec | None:
    """A metric against rounds, bytes, passes or seconds, a line for each method; None if nothing was recorded."""
    names, rows, ends = short_names(list(subject.compared)), [], []
    for name, done in subject.compared.items():
        line = line_of(done.histories, axis, metric)
        if line is None:
            continue
        keep = np.unique(np.linspace(0, len(line.at) - 1, min(len(line.at), MOST_POINTS)).astype(int))
        for place in keep[np.isfinite(line.mean[keep])]:
            row = {"method": names[name], "at": line.at[place], "mean": line.mean[place], "seeds": line.runs}
            rows.append({**row, "low": line.low[place], "high": line.high[place], "few": len(line.at) <= FEW})
        ends.append(line.at[-1])
    if not rows:
        return None
    is_log = axis != "round" and max(ends) > FAR_APART * min(ends) > 0
    if is_log:
        rows = [row for row in rows if row["at"] > 0]
    words = metric.replace("_", " ")
    shown = "test " + words if metric != "train_loss" else words
    x = _horizontal(axis, [row["at"] for row in rows] if is_log else None)
    y = {
        "field": "mean",
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False},
        "axis": {"tickCount": 6},
    }
    told = [
        {"field": "method", "title": "method"},
        {"field": "at", "type": "quantitative", "title": AXES[axis], "format": ",.4~g"},
        {"field": "mean", "type": "quantitative", "title": shown, "format": ".4~g"},
        {"field": "low", "type": "quantitative", "title": "from", "format": ".4~g"},
        {"field": "high", "type": "quantitative", "title": "to", "format": ".4~g"},
        {"field": "seeds", "title": "seeds"},
    ]
    if all(row["seeds"] == 1 for row in rows):
        told = told[:3]
    shared: Spec = {"x": x, "color": _color(subject), "detail": {"field": "method", "type": "nominal"}}
    layers: list[Spec] = [
        {
            "mark": {"type": "area"},
            "encoding": {**shared, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "opacity": _faded(0.16)},
        },
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {**shared, "y": y, "opacity": _faded(1.0)}},
        {
            # Few evaluations are shown as points; else a point appears where the pointer is.
            "mark": {"type": "point", "filled": True, "size": 45},
            "params": [
                {
                    "name": "near",
                    "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"},
                }
            ],
            "encoding": {
                **shared,
                "y": y,
                "tooltip": told,
                "opacity": {
                    "condition": [{"param": "near", "empty": False, "value": 1}, {"test": "datum.few", "value": 0.9}],
                    "value": 0,
                },
            },
        },
    ]
    if subject.target is not None and metric == subject.metric.name:
        layers.append(
            {
                "mark": {"type": "rule", "strokeDash": [4, 3], "color": GREY},
                "encoding": {"y": {"datum": subject.target, "type": "quantitative"}},
            }
        )
    return {
        **_base(f"{shown} against {AXES[axis]}", 260),
        "data": {"values": rows},
        "layer": layers,
    }


def ratios(subject: Subject) -> Spec | None:
    """Each method's cost to the target in the baseline's units, with intervals; None if no method has a ratio."""
    names, rows = short_names(list(subject.compared)), []
    figures = {"rounds": "rounds", "bytes_up": "bytes up", "forward_passes": "forward passes"}
    for name, result in subject.results.items():
        for key, words in figures.items():
            ratio = result["ratios"][key]
            if ratio is None or name == subject.baseline:
                continue
            bound = {"least": "at least", "most": "at most", None: "measured"}[ratio["bound"]]
            row = {"method": names[name], "figure": words, "ratio": ratio["value"], "bound": bound}
            row["shape"] = words if ratio["bound"] is None else bound
            rows.append({**row, "low": ratio["low"], "high": ratio["high"], "pairs": ratio["pairs"]})
    if not rows:
        return None
    baseline = names.get(subject.baseline or "", subject.baseline)
    x = {
        "field": "ratio",
        "type": "quantitative",
        "scale": {"type": "log"},
        "title": f"cost to the target, {baseline} = 1 (left is cheaper)",
        "axis": {"tickCount": 5, "labelOverlap": True, "format": "~r", "grid": False},
    }
    told = [
        {"field": "method"},
        {"field": "figure", "title": "cost"},
        {"field": "bound", "title": ""},
        {"field": "ratio", "type": "quantitative", "format": ".3~g"},
        {"field": "low", "type": "quantitative", "format": ".3~g", "title": "from"},
        {"field": "high", "type": "quantitative", "format": ".3~g", "title": "to"},
        {"field": "pairs", "title": "paired seeds"},
    ]
    shapes = {
        "domain": [*figures.values(), "at least", "at most"],
        "range": ["circle", "square", "diamond", "triangle-right", "triangle-left"],
    }
    legend = {"orient": "bottom", "title": None, "symbolFillColor": GREY, "symbolStrokeColor": GREY}
    sort = [names[name] for name in subject.compared]
    shared: Spec = {
        "y": {"field": "method", "type": "nominal", "title": None, "sort": sort, "axis": {"labelLimit": 140}},
        "yOffset": {"field": "figure", "type": "nominal", "sort": [*figures.values()]},
        "color": _color(subject),
        "opacity": _faded(1.0),
    }
    shape = {"field": "shape", "type": "nominal", "scale": shapes, "legend": legend}
    layers: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeDash": [4, 3], "color": GREY},
            "encoding": {"x": {"datum": 1, "type": "quantitative"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 65},
            "encoding": {**shared, "x": x, "shape": shape, "tooltip": told},
        },
    ]
    if any(row["low"] is not None for row in rows):
        ends = {"x": {**x, "field": "low"}, "x2": {"field": "high"}}
        layers.insert(1, {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {**shared, **ends}})
    return {
        **_base(
            f"cost to {subject.metric.name.replace('_', ' ')} {subject.target:g}",
            90 + 42 * len({row["method"] for row in rows}),
        ),
        "data": {"values": rows},
        "layer": layers,
    }


def clients(subject: Subject) -> Spec | None:
    """The metric of the clients, each on its own training examples; None if no run has it."""
    names, rows = short_names(list(subject.compared)), []
    for name, done in subject.compared.items():
        each = [run["client_deciles"] for run in done.runs if run.get("client_deciles")]
        if each:
            at = np.mean(each, 0)
            shown = {"method": names[name], "least": at[0], "p10": at[1], "median": at[5], "p90": at[9], "most": at[10]}
            rows.append(shown)
    if not rows:
        return None
    words = subject.metric.name.replace("_", " ")
    told = [
        {"field": key, "type": "quantitative", "format": ".3~g", "title": title}
        for key, title in (
            ("least", "lowest client"),
            ("p10", "10 % of the clients below"),
            ("median", "median client"),
            ("p90", "90 % below"),
            ("most", "highest client"),
        )
    ]
    y = {"field": "method", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 140}}
    x = {"type": "quantitative", "scale": {"zero": False}, "axis": {"tickCount": 5}}
    tooltip = [{"field": "method"}, *told]
    return {
        **_base(f"{words} of the clients", 70 + 26 * len(rows)),
        "data": {"values": rows},
        "encoding": {"y": y, "color": _color(subject), "opacity": _faded(1.0), "tooltip": tooltip},
        "layer": [
            {
                "mark": {"type": "rule"},
                "encoding": {
                    "x": {
                        **x,
                        "field": "least",
                        "title": f"{words}, own training examples; line: all, bar: 10 to 90 %, tick: median",
                    },
                    "x2": {"field": "most"},
                },
            },
            {"mark": {"type": "bar", "height": 9}, "encoding": {"x": {**x, "field": "p10"}, "x2": {"field": "p90"}}},
            {
                "mark": {"type": "tick", "thickness": 2, "height": 15, "color": GREY},
                "encoding": {"x": {**x, "field": "median"}, "color": {"value": GREY}},
            },
        ],
    }


def tried(subject: Subject) -> Spec | None:
    """The final validation metric of the tuning runs against their learning rates; None without tuning runs."""
    names, rows = short_names(list(subject.compared)), []
    for name, done in subject.compared.items():
        for trial in done.tuned.get("trials") or ():
            ends = [end for end in trial["final"] if end is not None]
            if ends and len(ends) == len(trial["final"]):
                best = (trial["learning_rate"], trial["schedule"]) == (
                    done.tuned["learning_rate"],
                    done.tuned["schedule"],
                )
                row = {"method": names[name], "rate": trial["learning_rate"], "schedule": trial["schedule"]}
                rows.append({**row, "final": float(np.mean(ends)), "best": "chosen" if best else "tried"})
    if not rows:
        return None
    words = subject.metric.name.replace("_", " ")
    return {
        **_base(f"tuning: validation {words} against the learning rate", 260),
        "data": {"values": rows},
        "mark": {"type": "point", "strokeWidth": 1.6},
        "encoding": {
            "x": {
                "field": "rate",
                "type": "quantitative",
                "scale": {"type": "log"},
                "title": "learning rate",
                "axis": {"grid": False, "tickCount": 5, "format": "~r", "labelOverlap": True},
            },
            "y": {"field": "final", "type": "quantitative", "scale": {"zero": False}, "title": None},
            "color": _color(subject),
            "opacity": _faded(1.0),
            "shape": {"field": "schedule", "type": "nominal", "legend": {"orient": "bottom", "title": None}},
            "size": {"condition": {"test": "datum.best == 'chosen'", "value": 170}, "value": 40},
            "tooltip": [
                {"field": "method"},
                {"field": "rate", "type": "quantitative", "format": ".3~g", "title": "learning rate"},
                {"field": "schedule"},
                {"field": "final", "type": "quantitative", "format": ".4~g", "title": words},
                {"field": "best", "title": ""},
            ],
        },
    }


def charts_of(subject: Subject) -> list[Spec]:
    """The charts of a subject, in order."""
    name, evaluations = subject.metric.name, next(iter(subject.compared.values())).histories[0]
    also = ["loss"] if name != "loss" and "loss" in evaluations[0].metrics else []
    drawn = [curve(subject, axis, name) for axis in AXES]
    drawn += [curve(subject, "round", each) for each in (*also, "train_loss")]
    drawn += [ratios(subject), clients(subject), tried(subject)]
    return [each for each in drawn if each is not None]
