"""A report as one HTML file: charts, tables, settings and digests, readable without a network or a server.

The charts are drawn by Vega-Lite, whose program is in the file (``static/vega.min.js``, made by vl-convert's
``javascript_bundle``; its licences are in ``static/LICENSES.txt``).
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from itertools import count
from typing import Any

import numpy as np

from hiso_jax import fed
from hiso_jax.reports.charts import charts_of, colors_of
from hiso_jax.reports.comparison import Compared, ratio_words
from hiso_jax.reports.directory import as_json, read_samples
from hiso_jax.reports.figures import figure_of_subjects
from hiso_jax.reports.subject import Subject, caveats, spread_in_words
from hiso_jax.reports.text import NEVER, human_bytes, human_count, human_seconds, short_names
from hiso_jax.version import VERSION


@cache
def _static(name: str) -> str:
    return files("hiso_jax.reports").joinpath("static", name).read_text(encoding="utf-8")


def as_page(subjects: Sequence[Subject]) -> str:
    """The report of runs and comparisons, a complete HTML document."""
    numbers = count()
    sections = [_section(subject, numbers, has_title=len(subjects) > 1) for subject in subjects]
    title = subjects[0].title if len(subjects) == 1 else f"{len(subjects)} runs and comparisons"
    overview = _overview(subjects) if len(subjects) > 1 else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="hiso-jax {VERSION}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{_static("page.css")}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="soft">HiSo-JAX {VERSION}. Point at a line for its numbers; pick methods to fade the others.</p>
{overview}</header>
{"".join(sections)}<script>
{_static("vega.min.js")}</script>
<script>
{_static("page.js")}</script>
</body>
</html>
"""


def as_fragment(subject: Subject) -> str:
    """A run or a comparison as HTML for a notebook: its verdict, its table and its figure."""
    content = io.BytesIO()
    figure_of_subjects([subject], ("round", "bytes_up", "forward_passes"), 2).savefig(content, format="png", dpi=110)
    picture = base64.b64encode(content.getvalue()).decode()
    return (
        f"<div><p>{escape(verdict_of(subject))}</p>{_results(subject)}"
        f'<img alt="{escape(subject.title)}" src="data:image/png;base64,{picture}">{_caveats(subject)}</div>'
    )


def result_as_html(result: fed.Result) -> str:
    """A result of a run as a notebook shows it."""
    return as_fragment(subject_of_result(result))


def subject_of_result(result: fed.Result) -> Subject:
    """A result of a run as the subject of a report."""
    last = result.metrics[-1]
    # A result does not hold its task, which knows the metric that counts: the first that is not the loss, if any.
    other = [name for name in last.metrics if name != "loss"]
    metric = fed.Metric(other[0]) if other else fed.Metric("loss", False)
    run = {
        **last.metrics,
        "seed": "",
        "rounds": result.rounds,
        "bytes_up": last.bytes_up,
        "diverged_at_round": result.diverged_at,
        "interrupted": result.interrupted,
        "concerns": result.health_warnings,
    }
    compared = {"run": Compared({}, [run], [list(result.metrics)])}
    return Subject("run", compared, metric, None, None, left_out=caveats(compared))


def verdict_of(subject: Subject) -> str:
    """One sentence: the cheapest method in rounds, or the metric at the end."""
    words = subject.metric.name.replace("_", " ")
    if subject.baseline is not None and subject.target is not None:
        known = {
            name: each["ratios"]["rounds"]
            for name, each in subject.results.items()
            if name != subject.baseline and each["ratios"]["rounds"] is not None
        }
        measured = {name: ratio for name, ratio in known.items() if ratio["bound"] != "least"}
        baseline = short_names(list(subject.compared)).get(subject.baseline, subject.baseline)
        if measured:
            best = min(measured, key=lambda name: measured[name]["value"])
            ratio = measured[best]
            within = ""
            if ratio["low"] is not None:
                shows = ", which contains 1: no difference is shown" if ratio["low"] <= 1 <= ratio["high"] else ""
                within = f" (95 % interval {ratio['low']:.2g} to {ratio['high']:.2g}{shows})"
            most = "at most " if ratio["bound"] == "most" else ""
            runs = len(subject.compared[best].runs)
            of = "" if ratio["pairs"] == runs else f" of {runs}; in the others neither reached it"
            seeds = f"{ratio['pairs']} paired seed{'' if ratio['pairs'] == 1 else 's'}{of}"
            return (
                f"{short_names(list(subject.compared))[best]} needs {most}{ratio['value']:.3g} of the rounds of "
                f"{baseline} to a test {words} of {subject.target:g}{within}, {seeds}."
            )
        base = subject.compared[subject.baseline].runs if subject.baseline in subject.compared else []
        reached = bool(base) and all(run["rounds_to_target"] is not None for run in base)
        who = f"No method but the baseline {baseline}" if reached else "No method"
        return f"{who} reached a test {words} of {subject.target:g} with every seed."
    ends = {name: _ends(done.runs, subject.metric.name) for name, done in subject.compared.items()}
    known_ends = {name: np.mean(values) for name, values in ends.items() if values}
    if not known_ends:
        return "No run has an evaluation."
    best = max(known_ends, key=lambda name: subject.metric.sign * known_ends[name])
    rounds = max(run["rounds"] for run in subject.compared[best].runs)
    of = "" if len(subject.compared) == 1 else f", {short_names(list(subject.compared))[best]}"
    return f"Test {words} {known_ends[best]:.4g} after {rounds:,} rounds{of}."


def _ends(runs: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    return [run[metric] for run in runs if run.get(metric) is not None]


def _section(subject: Subject, numbers: "count[int]", *, has_title: bool) -> str:
    specs, places = [], []
    for spec in charts_of(subject):
        name = f"chart-{next(numbers)}"
        # A closing tag inside a string would end the script.
        text = json.dumps(as_json(_plain(spec))).replace("</", "<\\/")
        specs.append(f'<script type="application/json" id="{name}">{text}</script>')
        places.append(f'<div class="chart" data-spec="{name}"></div>')
    runs = max(len(done.runs) for done in subject.compared.values())
    spread = spread_in_words(runs)
    drawn = f'<p class="soft">{spread[0].upper()}{spread[1:]}.</p>' if spread else ""
    return f"""<section class="subject">
{f"<h2>{escape(subject.title)}</h2>" if has_title else ""}
<p class="verdict">{escape(verdict_of(subject))}</p>
{_chips(subject)}
{drawn}
<div class="charts">
{"".join(places)}
</div>
{"".join(specs)}
<h3>Results</h3>
{_results(subject)}
{_caveats(subject)}
{_details(subject)}
</section>
"""


def _plain(value: Any) -> Any:
    """Arrays and NumPy's numbers as Python's, at six significant digits."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.6g}")
    return value


def _chips(subject: Subject) -> str:
    if len(subject.compared) < 2:
        return ""
    names = short_names(list(subject.compared))
    chips = [
        f'<button type="button" aria-pressed="false" data-name="{escape(names[name])}">'
        f'<i style="border-color:{color}"></i>{escape(names[name])}</button>'
        for name, color in colors_of(subject).items()
    ]
    return f'<div class="chips" role="group" aria-label="methods">{"".join(chips)}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a second line of a cell is small."""

    def cell(text: str) -> str:
        first, *rest = str(text).split("\n")
        # As a style of its own, because notebooks have no style sheet.
        small = "".join(f'<small style="display:block">{escape(each)}</small>' for each in rest)
        return f"<td>{escape(first)}{small}</td>"

    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _pairs(rows: Mapping[str, Any]) -> str:
    cells = [f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in rows.items()]
    return f'<table class="pairs"><tbody>{"".join(cells)}</tbody></table>'


def _results(subject: Subject) -> str:
    """A row for each method: its rate, its cost to the target beside the baseline's, and its metric at the end."""
    names, words = short_names(list(subject.compared)), subject.metric.name.replace("_", " ")
    has_target, results = subject.target is not None, subject.results
    head = ["method", "learning rate"]
    if has_target:
        head += [f"rounds to {subject.target:g}"]
        head += [f"of {names[subject.baseline]}"] if subject.baseline in names and results else []
        head += ["bytes up", "bytes up and down", "forward passes", "simulated time"]
    head += [f"{words} at the end", "worst tenth of clients", "rounds", "bytes up, whole run"]
    rows = []
    for name, done in subject.compared.items():
        runs, tuned = done.runs, done.tuned
        rate = tuned.get("learning_rate")
        row = [
            names[name],
            (NEVER if rate is None else f"{rate:.3g}") + (f"\n{tuned['schedule']}" if tuned.get("schedule") else ""),
        ]
        if has_target:
            reached = [run.get("rounds_to_target") for run in runs]
            missed = reached.count(None)
            shown = _mean(reached, lambda each: f"{each:.0f}")
            row.append(
                f"{NEVER}\n{len(reached) - missed} of {len(reached)} seeds" if missed and len(reached) > 1 else shown
            )
            if subject.baseline in names and results:
                ratio = results[name]["ratios"]["rounds"]
                row.append(NEVER if ratio is None else ratio_words(ratio))
            for figure, show in (
                ("bytes_up", human_bytes),
                ("bytes", human_bytes),
                ("forward_passes", human_count),
                ("simulated_seconds", human_seconds),
            ):
                row.append(_mean([run.get(f"{figure}_to_target") for run in runs], show))
        diverged = sum(run.get("diverged_at_round") is not None for run in runs)
        ends = _ends(runs, subject.metric.name)
        final = f"{np.mean(ends):.3f}" + (f"\n± {np.std(ends, ddof=1):.3f}" if len(ends) > 1 else "") if ends else NEVER
        row.append(f"diverged\n{diverged} of {len(runs)}" if diverged else final)
        row.append(_mean([run.get("worst_tenth") for run in runs], lambda each: f"{each:.3f}"))
        row.append(_mean([run.get("rounds") for run in runs], lambda each: f"{each:,.0f}"))
        row.append(_mean([run.get("bytes_up") for run in runs], human_bytes))
        rows.append(row)
    kept = [place for place in range(len(head)) if any(row[place] != NEVER for row in rows)]
    return _table([head[place] for place in kept], [[row[place] for place in kept] for row in rows])


def _mean(values: Sequence[Any], show: Any) -> str:
    """The mean of a figure; a dash if a run lacks it, because a mean of the others would flatter the method."""
    if any(value is None or not np.isfinite(value) for value in values) or not values:
        return NEVER
    return show(float(np.mean(values)))


def _caveats(subject: Subject) -> str:
    if not subject.left_out:
        return ""
    listed = "".join(f"<li>{escape(sentence)}</li>" for sentence in subject.left_out)
    return f"<h3>Left out, and warnings</h3><ul>{listed}</ul>"


def _details(subject: Subject) -> str:
    """The command, the versions, the digests and all options."""
    names, parts = short_names(list(subject.compared)), []
    samples = [] if subject.path is None else read_samples(subject.path)
    if samples:
        last = samples[-1]["round"]
        rows = [[row["prompt"], row["golden"], row["answer"]] for row in samples if row["round"] == last]
        parts.append(f"<h3>Answers after {last:,} rounds</h3>{_table(['prompt', 'right answer', 'model'], rows)}")
    if subject.command:
        parts.append(f"<h3>Make it again</h3><pre><code>{escape(subject.command)}</code></pre>")
    facts: dict[str, Any] = dict(subject.made_with)
    if subject.path is not None:
        facts["directory"] = subject.path
    if facts:
        parts.append(f"<details><summary>Made with</summary>{_pairs(facts)}</details>")
    digests = {
        f"{names[name]}, seed {run.get('seed')}": run["params_sha256"]
        for name, done in subject.compared.items()
        for run in done.runs
        if run.get("params_sha256")
    }
    if digests:
        shown = _pairs(digests)
        parts.append(f"<details><summary>SHA-256 of the final parameters</summary>{shown}</details>")
    if subject.config:
        options = {name: value for name, value in sorted(subject.config.items()) if value is not None}
        parts.append(f"<details><summary>All options</summary>{_pairs(options)}</details>")
    return "".join(parts)


def _overview(subjects: Sequence[Subject]) -> str:
    rows = [[subject.title, verdict_of(subject)] for subject in subjects]
    listed = "".join(f"<tr><td>{escape(title)}</td><td>{escape(said)}</td></tr>" for title, said in rows)
    return f'<table class="pairs"><tbody>{listed}</tbody></table>'
