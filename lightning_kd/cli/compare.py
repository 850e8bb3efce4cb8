"""The command ``lightning-kd compare``."""

import resource
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console

from lightning_kd.callbacks import TrainingCost
from lightning_kd.cli.distillation_cli import DistillationCLI
from lightning_kd.cli.messages import ShortErrors
from lightning_kd.cli.named_configs import with_config_files
from lightning_kd.cli.parsing import ParsingCLI
from lightning_kd.cli.preparation import prepare
from lightning_kd.cli.trainer_command import trainer_command
from lightning_kd.comparison.execution import Execution, Outcome, check_unchanged
from lightning_kd.comparison.experiment import Experiment
from lightning_kd.comparison.figures import check_can_draw
from lightning_kd.comparison.places import cannot, locked
from lightning_kd.comparison.plan import plan, values_of
from lightning_kd.comparison.reading import of_configs, read_experiment
from lightning_kd.comparison.records import Records
from lightning_kd.comparison.report import Report, check_page
from lightning_kd.comparison.run_files import write_json
from lightning_kd.comparison.tokenizers import LearnedTokenizers
from lightning_kd.comparison.workers import Workers


def compare(words: Sequence[str]) -> None:
    """Make the runs of an experiment with several seeds, and show them side by side.

    Args:
        words: The command line behind ``lightning-kd compare``.

    Raises:
        ValueError: If something could not be run as it is given; nothing has begun then.
        SystemExit: With 1 if a run has failed, and with 128 and its number after a signal.
    """
    given = _parser().parse_args(with_config_files(["compare", *words])[1:])
    if (given.config is None) == (given.configs is None):
        raise ValueError("give --config with an experiment file, or --configs with ordinary ones")
    if given.config is not None:
        experiment = read_experiment(Path(given.config))
    else:
        experiment = of_configs([Path(path) for path in given.configs])
    run_comparison(
        experiment,
        given.seeds,
        Path(given.output or default_output(experiment, quick=given.quick)),
        given=given.set or [],
        quick=given.quick,
        at_once=given.jobs,
        rerun_changed=given.rerun_changed,
        page=None if given.write is None else Path(given.write),
        command=["lightning-kd", "compare", *words],
    )


def default_output(experiment: Experiment, *, quick: bool) -> str:
    """Return where runs go by themselves."""
    return f"runs/{experiment.name}{'_quick' if quick else ''}"


def run_comparison(
    experiment: Experiment,
    seeds: Sequence[int],
    output: Path,
    *,
    given: Sequence[str],
    quick: bool = False,
    at_once: int = 1,
    rerun_changed: bool,
    page: Path | None = None,
    command: Sequence[str],
) -> list[Outcome]:
    """Make the runs that are not there yet, print the tables, and write the report.

    Args:
        experiment: What is compared.
        seeds: Of every run.
        output: Directory of all of it.
        given: Values of placeholders, as ``NAME=VALUE``.
        quick: Whether the smaller sizes are meant.
        at_once: How many runs are made at the same time; they share the threads.
        rerun_changed: Whether runs that are there, but with other options, are made anew.
        page: A page that tables and pictures go into.
        command: What was typed; it is in the report.

    Raises:
        ValueError: If something could not be run as it is given; nothing has begun then.
        SystemExit: With 1 if a run has failed, and with 128 and its number after a signal.
    """
    console = Console(markup=False)  # titles and commands may have brackets
    check_can_draw()
    if page is not None:
        check_page(page, experiment)
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: give each seed once, from 0 on")
    if at_once < 1:
        raise ValueError(f"--jobs {at_once}: give a number of runs at once, from 1 on")
    values = values_of(experiment, given)
    tokenizers = LearnedTokenizers(experiment.tokenizers, values, output)
    arguments, sys.argv = sys.argv, sys.argv[:1]
    parser = trainer_command(ParsingCLI)
    sys.argv = arguments
    values |= tokenizers.places
    number = len(seeds) * experiment.runs_of_a_seed
    console.print(f"{experiment.title}: reading {number} runs", soft_wrap=True)
    jobs = plan(
        experiment, seeds, output, values, parser.whole_config, build=parser.build, quick=quick
    )
    with locked(output):
        names = [metric.name for metric in experiment.metrics]
        records = Records(jobs, output, names, experiment.all_files)
        states = [records.state(job) for job in jobs]
        states = check_unchanged(jobs, states, rerun=rerun_changed)
        records.check_metrics(jobs, states)
        done = sum(state.tested for state in states)
        console.print(
            f"{experiment.title}: {len(jobs)} runs in {output}, {done} of them there; what each prints "
            "is in its log.txt",
            soft_wrap=True,
        )
        unmade = [job for job, state in zip(jobs, states, strict=True) if not state.tested]
        with cannot("a tokenizer cannot be learned"):
            tokenizers.learn(unmade, console)
        workers = Workers(partial(run_command, experiment.all_files, at_once), __name__)
        execution = Execution(jobs, records, workers, experiment.metrics, console, at_once)
        outcomes = execution.run_all(states)
        report = Report(experiment, outcomes, command, jobs)
        if report.results:
            report.show(console)
            with cannot("the runs are there, but not their report, which the same command writes"):
                report.write(output)
            for line in dict.fromkeys(chain(*report.without_curve.values())):
                console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
            console.print(
                f"Tables and pictures are in {output}/report.md; tensorboard --logdir {output}",
                soft_wrap=True,
            )
        if workers.received:
            console.print(f"Stopped; go on with: {shlex.join(command)}", soft_wrap=True)
            raise SystemExit(128 + workers.received)
        failed = [outcome for outcome in outcomes if outcome.result is None]
        if page is not None and not failed:
            with cannot(f"--write {page}: it is not written, and the same command writes it"):
                report.write_into(page, output)
    if failed:
        console.print(f"{len(failed)} of {len(jobs)} runs failed:")
        for outcome in failed:
            console.print(f"  {outcome.job.title}: {outcome.error}", markup=False, soft_wrap=True)
        console.print(f"Make them again with: {shlex.join(command)}", soft_wrap=True)
        raise SystemExit(1)
    return outcomes


def run_command(configs: Sequence[str], at_once: int, words: Sequence[str], left: Path) -> None:
    """Run a command of the trainer in this process, and write what came of it.

    Args:
        configs: Files that a user's own classes may lie beside.
        at_once: How many such processes share the threads.
        words: The command line behind ``lightning-kd``.
        left: JSON file.
    """
    sys.argv = [sys.argv[0], *words]
    if at_once > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // at_once))
    prepare([*configs, *words])
    trainer: L.Trainer = trainer_command(DistillationCLI).trainer
    write_json(left, {**_what_came(trainer), "jobs": at_once})


def _what_came(trainer: L.Trainer) -> dict[str, Any]:
    numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
    device = trainer.strategy.root_device
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    name = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        name = torch.cuda.get_device_name(device)
    # A test whose callbacks are others counts nothing.
    counting = [c for c in trainer.callbacks if isinstance(c, TrainingCost)]  # type: ignore[attr-defined]
    totals = counting[0].totals if counting else {}
    return {
        "metrics": numbers,
        "cost": {**totals, "peak_memory_mb": peak},
        "device": name if trainer.world_size == 1 else f"{trainer.world_size} x {name}",
    }


def _parser() -> ShortErrors:
    parser = ShortErrors(
        prog="lightning-kd compare",
        description="Make the runs of an experiment with several seeds, and show them side by side. "
        "Typed again, it goes on where it has stopped (docs/comparing.md).",
    )
    parser.add_argument(
        "--config", help="An experiment file, or a name: experiments/stories comes along."
    )
    parser.add_argument(
        "--configs", nargs="+", help="Configurations of fit, or names, in place of an experiment."
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="Each run is made with each of them."
    )
    parser.add_argument(
        "--quick", action="store_true", help="Use the smaller sizes that the experiment names."
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="How many runs are made at once; they share the threads and the devices.",
    )
    parser.add_argument(
        "--output", help="Directory of all runs and the report. Defaults to runs/NAME."
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="What stands for {NAME} in the experiment file; may be given several times.",
    )
    parser.add_argument(
        "--rerun_changed",
        action="store_true",
        help="Make runs anew that are there with other options or versions.",
    )
    parser.add_argument(
        "--write", help="Page with <!-- results --> marks that tables and pictures are put into."
    )
    return parser
