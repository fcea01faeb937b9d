"""One HTML file that tells what a pruning run did: no network, nothing beside it."""

from secateur.report.files import write_run
from secateur.report.page import render, write_report

__all__ = ["render", "write_report", "write_run"]
