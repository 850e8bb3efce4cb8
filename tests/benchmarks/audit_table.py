"""Table of what the audit finds: ``python -m tests.benchmarks.audit_table [--write FILE]``.

Every module of :mod:`tests.callbacks.audit.audited_modules` is trained for a step and audited; the
table is printed, or put between the two marks of a document such as ``docs/normalization.md``.
"""

import argparse
import logging
import warnings
from pathlib import Path

from lightning_kd.comparison.documents import replace_between_marks
from tests.callbacks.audit.audit_runs import Outcome, audit, audit_two_processes
from tests.callbacks.audit.audited_modules import CORRECT, PLANTED, Case

HEADINGS = "| module | processes x micro-batches | result |\n| --- | --- | --- |"


def row_of(case: Case, outcome: Outcome) -> str:
    """Return the table row of a case."""
    result = "; ".join(cause.split(":")[0] for cause in outcome.causes)
    if not outcome.causes and outcome.warnings:
        result = outcome.warnings[0].split("of step 1 was ")[-1].split(" (")[0].split(", so ")[0]
        result = result.split("; ")[0].replace("ValueError: ", "")
    elif outcome.notes:
        result = "no warning; notes that single samples would differ"
    return f"| {case.name} | {case.processes} x {case.accumulate} | {result or 'no warning'} |"


def table() -> str:
    """Audit all modules, and return the table."""
    both = {name: found[0] for name, found in audit_two_processes().items()}
    lines = []
    for title, cases in (("with a fault", PLANTED), ("that are correct", CORRECT)):
        lines += [f"Modules {title}:\n\n{HEADINGS}"]
        for case in cases:
            outcome = Outcome(**both[case.name]) if case.processes == 2 else audit(case)
            lines.append(row_of(case, outcome))
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="document whose table is replaced")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    made = table()
    if arguments.write is None:
        print(made)
        return
    try:
        replace_between_marks(arguments.write, "audit table", made)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
