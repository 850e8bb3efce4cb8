"""Preflight: what is known of a run before it starts, and what would ruin it."""

from lightning_kd.preflight.callback import Preflight
from lightning_kd.preflight.collect import check
from lightning_kd.preflight.facts import Facts
from lightning_kd.preflight.findings import MISMATCHES, Finding
from lightning_kd.preflight.report import Report

__all__ = ["MISMATCHES", "Facts", "Finding", "Preflight", "Report", "check"]
