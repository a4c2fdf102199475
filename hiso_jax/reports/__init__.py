"""Reports of runs: summaries, tables, figures and pages."""

from importlib import import_module
from typing import Any

from hiso_jax.reports.comparison import Compared, as_results, comparison_table
from hiso_jax.reports.diagnosis import diagnosis_picture, diagnosis_table
from hiso_jax.reports.directory import (
    append_evaluation,
    as_json,
    create_directory,
    evaluation_line,
    number,
    write_json,
    write_metrics,
)
from hiso_jax.reports.figures import figure_of_subjects, save_picture
from hiso_jax.reports.loggers import TensorBoard, WandB, loggers
from hiso_jax.reports.page import as_fragment, as_page, result_as_html, subject_of_result
from hiso_jax.reports.paired import Ratio, baseline_of, check_figures, interval, paired_ratio
from hiso_jax.reports.pictures import rates_picture
from hiso_jax.reports.progress import Progress
from hiso_jax.reports.report import Report
from hiso_jax.reports.subject import AXES, Subject, caveats, coarse_ratios, read_subject, side_by_side
from hiso_jax.reports.summary import Asked, run_summary
from hiso_jax.reports.text import as_text, human_bytes, human_count, human_seconds, plain, print_rows
from hiso_jax.reports.tuning import sweep_as_dict, sweep_from_dict, sweep_table, verdict

__all__ = [
    "AXES",
    "Asked",
    "Compared",
    "Progress",
    "Ratio",
    "Report",
    "Subject",
    "TensorBoard",
    "WandB",
    "append_evaluation",
    "as_fragment",
    "as_json",
    "as_page",
    "as_results",
    "as_text",
    "baseline_of",
    "caveats",
    "check_figures",
    "coarse_ratios",
    "comparison_table",
    "create_directory",
    "diagnosis_picture",
    "diagnosis_table",
    "evaluation_line",
    "figure_of_subjects",
    "human_bytes",
    "human_count",
    "human_seconds",
    "interval",
    "loggers",
    "number",
    "paired_ratio",
    "plain",
    "print_rows",
    "rates_picture",
    "read_subject",
    "result_as_html",
    "run_summary",
    "save_picture",
    "side_by_side",
    "subject_of_result",
    "sweep_as_dict",
    "sweep_from_dict",
    "sweep_table",
    "verdict",
    "write_json",
    "write_metrics",
]


def __getattr__(name: str) -> Any:
    """``figure`` is :func:`hiso_jax.tune.figure`, which also takes comparisons."""
    if name == "figure":
        return import_module("hiso_jax.tune").figure
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
