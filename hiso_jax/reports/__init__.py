"""Reports of runs: summaries, tables and pictures."""

from hiso_jax.reports.comparison import Compared, as_results, comparison_table
from hiso_jax.reports.diagnosis import diagnosis_picture, diagnosis_table
from hiso_jax.reports.directory import (
    append_evaluation,
    as_json,
    create_directory,
    evaluation_line,
    write_json,
    write_metrics,
)
from hiso_jax.reports.loggers import TensorBoard, WandB, loggers
from hiso_jax.reports.paired import Ratio, check_figures, interval, paired_ratio
from hiso_jax.reports.pictures import comparison_picture, curves, rates_picture
from hiso_jax.reports.progress import Progress
from hiso_jax.reports.report import Report
from hiso_jax.reports.summary import Asked, run_summary
from hiso_jax.reports.text import as_text, human_bytes, human_count, human_seconds, plain, print_rows
from hiso_jax.reports.tuning import sweep_as_dict, sweep_from_dict, sweep_table, verdict

__all__ = [
    "Asked",
    "Compared",
    "Progress",
    "Ratio",
    "Report",
    "TensorBoard",
    "WandB",
    "append_evaluation",
    "as_json",
    "as_results",
    "as_text",
    "check_figures",
    "comparison_picture",
    "comparison_table",
    "create_directory",
    "curves",
    "diagnosis_picture",
    "diagnosis_table",
    "evaluation_line",
    "human_bytes",
    "human_count",
    "human_seconds",
    "interval",
    "loggers",
    "paired_ratio",
    "plain",
    "print_rows",
    "rates_picture",
    "run_summary",
    "sweep_as_dict",
    "sweep_from_dict",
    "sweep_table",
    "verdict",
    "write_json",
    "write_metrics",
]
