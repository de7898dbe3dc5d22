"""Reports: one self-contained page, and its tables and figures as files."""

from potstill.report.data import ReportData, collect, parity_points
from potstill.report.run import write_report
from potstill.report.study import (
    StudyRow,
    study_figures,
    study_tables,
    study_verdicts,
    write_study_report,
)

__all__ = [
    "ReportData",
    "StudyRow",
    "collect",
    "parity_points",
    "study_figures",
    "study_tables",
    "study_verdicts",
    "write_report",
    "write_study_report",
]
