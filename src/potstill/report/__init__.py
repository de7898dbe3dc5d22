"""Reports: one self-contained page, and its tables and figures as files."""

from potstill.report.study import (
    StudyRow,
    study_figures,
    study_tables,
    study_verdicts,
    write_study_report,
)

__all__ = ["StudyRow", "study_figures", "study_tables", "study_verdicts", "write_study_report"]
