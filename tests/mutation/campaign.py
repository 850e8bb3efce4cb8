"""Does any test notice a small change of the core? ``python -m tests.mutation.campaign``.

Takes a seeded sample of the mutants of the core's files, and runs for each the tests of its file in
a copy of the tree; with ``--wide``, those that survive meet all tests of one process. What survives
then is printed, and the exit code is 1. It needs a test, or a line with the reason in
``equivalent.txt`` if no test can tell it from the original: ``FILE :: SCOPE :: CHANGE :: REASON``,
the first three as printed. ``--only`` takes a file of such lines and runs them again.

All mutants are forked from a process that has imported everything else, so each costs what its tests
cost. Run it with ``OMP_NUM_THREADS=1``.
"""

import argparse
import importlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from tests.mutation.mutants import Mutant, mutants, mutated

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.txt")

_EVERYWHERE = ("tests/test_architecture.py::test_every_data_class_is_frozen",)
_STEPS = (
    *(
        "tests/modules/test_distillation_module.py",
        "tests/modules/test_loss.py",
        "tests/modules/test_methods.py",
    ),
    *("tests/modules/test_teacher_module.py", "tests/modules/test_half_precision.py"),
)
_STUDENT = (
    *("tests/callbacks/test_callbacks.py", "tests/models/test_loading.py", *_STEPS),
    "tests/test_named_checkpoints.py::test_random_weights_are_not_evaluated_in_python",
    *("tests/resume/test_options.py", "tests/resume/test_epochs.py"),
)
_POLICY = (
    *("tests/modules/test_unbiased.py", "tests/modules/test_rl_distillation.py"),
    *("tests/modules/test_policy_gradient.py", *_STEPS),
)
_DATA = (
    *("tests/data/test_encoding.py", "tests/data/test_framing.py", "tests/data/test_generated.py"),
    *("tests/data/test_rendering.py", "tests/data/test_datamodules.py"),
)
_LOOPS = (
    "tests/resume/test_callback_states.py",
    *("tests/resume/test_epochs.py", "tests/resume/test_options.py"),
)
_AUDIT = [
    "tests/callbacks/audit/test_evidence.py",
    "tests/callbacks/audit/test_gradient_audit.py",
]
_TEACHERS = ("tests/teachers/test_answers.py", "tests/teachers/test_contract.py")
_ROLLOUTS = ("tests/generation/test_rollouts.py", "tests/callbacks/test_on_policy_generation.py")
TESTS: dict[str, Sequence[str]] = {
    "lightning_kd/alignment/*.py": ["tests/alignment"],
    "lightning_kd/divergences/*.py": ["tests/divergences"],
    "lightning_kd/fused/*.py": ["tests/fused", *_TEACHERS, *_STEPS],
    "lightning_kd/generation/sampler.py": ["tests/generation"],
    "lightning_kd/generation/cache.py": ["tests/generation"],
    "lightning_kd/generation/options.py": ["tests/generation"],
    "lightning_kd/generation/completions.py": ["tests/generation", *_ROLLOUTS],
    "lightning_kd/generation/rollouts.py": _ROLLOUTS,
    "lightning_kd/generation/decoder.py": ["tests/generation"],
    "lightning_kd/generation/engine.py": ["tests/generation", *_ROLLOUTS],
    "lightning_kd/generation/generate.py": ["tests/generation", *_ROLLOUTS],
    "lightning_kd/teachers/*.py": ["tests/teachers", *_STEPS],
    "lightning_kd/modules/loss*.py": [*_STEPS, "tests/callbacks/test_loss_normalization.py"],
    "lightning_kd/devices.py": ["tests/test_devices.py", "tests/modules/test_host_waits.py"],
    "lightning_kd/modules/distillation_module.py": _STEPS,
    "lightning_kd/modules/counts.py": ["tests/modules/test_minillm.py", *_POLICY],
    "lightning_kd/modules/half_precision.py": _STEPS,
    "lightning_kd/modules/resume.py": _LOOPS,
    "lightning_kd/loops/*.py": [*_LOOPS, "tests/callbacks/test_callbacks.py"],
    "lightning_kd/loops/after_validation.py": ["tests/resume/test_after_validation.py"],
    "lightning_kd/loops/module_hooks.py": ["tests/resume/test_after_validation.py"],
    "lightning_kd/loops/requeue.py": ["tests/resume/test_saves_after_steps.py"],
    "lightning_kd/models/logits_backend.py": [*_STEPS, "tests/modules/test_dropped_mass.py"],
    "lightning_kd/modules/baby_llama.py": _STEPS,
    "lightning_kd/modules/gkd.py": [
        *_STEPS,
        f"{_ROLLOUTS[1]}::test_gkd_with_on_policy_generation_does_not_warn",
    ],
    "lightning_kd/modules/chunk_likelihood_kd.py": ["tests/modules/test_other_tokenizers.py"],
    "lightning_kd/modules/uld.py": ["tests/modules/test_other_tokenizers.py"],
    "lightning_kd/modules/supervised_kd.py": _STEPS,
    "lightning_kd/modules/sft.py": _STEPS,
    "lightning_kd/modules/sequence_kd.py": [*_STEPS, "tests/callbacks/test_callbacks.py"],
    "lightning_kd/modules/student_module.py": _STUDENT,
    "lightning_kd/modules/teacher_module.py": [*_STEPS, "tests/modules/test_dropped_mass.py"],
    "lightning_kd/modules/optimization.py": _STEPS,
    "lightning_kd/modules/minillm*.py": ["tests/modules/test_minillm.py", *_POLICY],
    "lightning_kd/modules/on_policy_distillation.py": _POLICY,
    "lightning_kd/modules/policy_gradient.py": _POLICY,
    "lightning_kd/modules/rl_distillation.py": [*_POLICY, _ROLLOUTS[1]],
    "lightning_kd/data/loader.py": ["tests/data/test_loader.py"],
    "lightning_kd/data/plan.py": ["tests/data/test_loader.py", _LOOPS[1]],
    "lightning_kd/data/rows.py": _DATA,
    "lightning_kd/data/collate.py": [*_DATA, "tests/data/test_loader.py"],
    "lightning_kd/data/encoding.py": _DATA,
    "lightning_kd/data/limits.py": [*_DATA, "tests/data/test_teacher_prompts.py"],
    "lightning_kd/data/teacher_prompts.py": ["tests/data/test_teacher_prompts.py"],
    "lightning_kd/teacher_rows.py": [
        "tests/data/test_teacher_prompts.py",
        "tests/teachers/test_itself.py",
    ],
    "lightning_kd/modules/self_taught.py": ["tests/teachers/test_itself.py", *_STEPS],
    "lightning_kd/functions.py": ["tests/resume/test_functions.py"],
    "lightning_kd/integrity.py": ["tests/test_checkpoints.py", "tests/test_strategies.py"],
    "lightning_kd/policy.py": ["tests/test_policy.py", "tests/modules/test_minillm.py"],
    "lightning_kd/normalization.py": [
        "tests/test_normalization.py",
        "tests/modules/test_distillation_module.py",
    ],
    "lightning_kd/scoring.py": ["tests/test_scoring.py", *_STEPS],
    "lightning_kd/schedules.py": ["tests/test_schedules.py"],
    "lightning_kd/rewards.py": ["tests/test_rewards.py"],
    "lightning_kd/evaluation/*.py": [
        "tests/evaluation/test_metrics.py",
        "tests/modules/test_dropped_mass.py",
        *_STEPS,
    ],
    "lightning_kd/callbacks/audit/gradient_audit.py": _AUDIT,
    "lightning_kd/callbacks/audit/diagnosis.py": _AUDIT,
    "lightning_kd/callbacks/audit/evidence.py": _AUDIT,
    "lightning_kd/callbacks/audit/replay.py": _AUDIT,
    "lightning_kd/callbacks/loss_normalization.py": [
        "tests/callbacks/test_loss_normalization.py",
        *_POLICY,
    ],
    "lightning_kd/callbacks/rollouts/*.py": [
        _ROLLOUTS[1],
        "tests/callbacks/rollouts/test_empty_windows.py",
    ],
    "lightning_kd/callbacks/on_policy_generation.py": [_ROLLOUTS[1]],
}
"""The core, and the tests of each of its files; its examples are tests too."""

WIDE = (
    *("tests/divergences", "tests/fused", "tests/generation", "tests/data", "tests/callbacks"),
    "tests/teachers",
    *(*_POLICY, "tests/modules/test_minillm.py", "tests/modules/test_dropped_mass.py"),
    *("tests/evaluation/test_metrics.py", "tests/test_normalization.py", "tests/test_policy.py"),
    *("tests/test_rewards.py", "tests/test_schedules.py", "tests/test_scoring.py", "tests/models"),
    *_LOOPS,
)
"""The tests of one process, without the command line."""

_OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--ignore-glob=*/test_sharded_heads.py")
"""Of pytest; tests that start processes are slow, and a formula should not have to wait for them."""

WARM = (
    *("torch", "lightning.pytorch", "lightning.pytorch.cli", "jsonargparse", "datasets", "pytest"),
    *("transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2"),
    *("peft", "scipy.stats", "tokenizers", "safetensors.torch", "torch.distributed.fsdp"),
    *("torch.utils.tensorboard", "tensorboard.backend.event_processing.event_accumulator"),
    *("lightning.pytorch.loggers", "lightning.pytorch.strategies"),
)
"""What is imported once for all mutants; nothing of this library."""

_FORKING = threading.Lock()
"""A process that is forked while another thread prints could never print again."""

SECONDS = 300
"""Of the tests of a mutant; one that takes longer has been noticed."""


@dataclass(frozen=True)
class Place:
    """A mutant of a file."""

    file: str
    mutant: Mutant

    @property
    def key(self) -> str:
        """What it is called in ``equivalent.txt``."""
        return f"{self.file} :: {self.mutant.scope} :: {self.mutant.change}"


def core_tests() -> dict[str, list[str]]:
    """The core's files, with their tests."""
    found = {}
    for pattern, tests in TESTS.items():
        for path in sorted(ROOT.glob(pattern)):
            if path.name != "__init__.py":
                name = str(path.relative_to(ROOT))
                found[name] = [*dict.fromkeys([name, *_EVERYWHERE, *tests])]
    return found


def places(file: str) -> list[Place]:
    """All mutants of a file."""
    return [Place(file, mutant) for mutant in mutants((ROOT / file).read_text())]


def equivalents() -> dict[str, str]:
    """Mutants that no test can notice, and why."""
    lines = EQUIVALENT.read_text().splitlines()
    entries = [line.rsplit(" :: ", 1) for line in lines if line and not line.startswith("#")]
    return {entry[0]: entry[1] for entry in entries}


def sample(files: Sequence[str], count: int, seed: int) -> list[Place]:
    """Mutants of some files, each file's share by the root of how many it has."""
    everything = {file: places(file) for file in files}
    roots = {file: len(of) ** 0.5 for file, of in everything.items()}
    total, chosen = sum(roots.values()), []
    for file, of in everything.items():
        draw = random.Random(f"{seed} {file}")
        chosen += draw.sample(of, min(len(of), max(1, round(count * roots[file] / total))))
    return chosen


class Tree:
    """A copy of the tree, in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "runs", "build")
        shutil.copytree(ROOT, self.root, symlinks=True, ignore=ignored)
        if (ROOT.parent / "shared").exists():
            (folder / "shared").symlink_to(ROOT.parent / "shared")

    def test(
        self, tests: Sequence[str], place: Place | None = None, seconds: float = SECONDS
    ) -> tuple[str, float]:
        """Run tests with a change, or with none.

        Returns:
            ``survived`` if all passed, ``killed`` if one failed, ``too slow``; and the seconds.
        """
        began, original = time.monotonic(), None
        path = self.root / (place.file if place else "README.md")
        original = path.read_text()
        if place:
            path.write_text(mutated(original, place.mutant))
        process = multiprocessing.get_context("fork").Process(target=self._run, args=[tests])
        with _FORKING:
            process.start()
        process.join(seconds)
        late = process.is_alive()
        process.kill()
        process.join()
        path.write_text(original)
        # 4 where the tests' common file cannot be imported.
        known = {0: "survived", 1: "killed", 2: "killed", 4: "killed"}
        outcome = "too slow" if late else known.get(process.exitcode or 0)
        if outcome is None:
            raise RuntimeError(f"exit {process.exitcode} of {tests}; see {self.root / 'log.txt'}")
        return outcome, time.monotonic() - began

    def _run(self, tests: Sequence[str]) -> None:
        import pytest

        log = os.open(self.root / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[name]
        os.chdir(self.root)
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(self.root))
        os.environ |= {"PYTHONPATH": str(self.root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        code = pytest.main([*_OPTIONS, *tests])
        library = sys.modules.get("lightning_kd")
        if library is not None and not str(library.__file__).startswith(str(self.root)):
            code = 99
        os._exit(code)


def main() -> None:
    """Sample, run, and show what survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mutants", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--files",
        nargs="+",
        default=[],
        help="parts of the names of the files whose share of the sample is run",
    )
    parser.add_argument("--only", type=Path, help="file of mutants as printed, instead of a sample")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--wide", action="store_true", help="survivors meet all tests of one process"
    )
    options = parser.parse_args()
    for name in WARM:
        importlib.import_module(name)
    tests, known = core_tests(), equivalents()
    files = [f for f in tests if not options.files or any(part in f for part in options.files)]
    chosen = [p for p in sample([*tests], options.mutants, options.seed) if p.file in files]
    if options.only:
        wanted = {line.split(" (line ")[0] for line in options.only.read_text().splitlines()}
        chosen = [place for file in files for place in places(file) if place.key in wanted]
        files = [*dict.fromkeys(place.file for place in chosen)]
    counts: dict[str, Counter[str]] = {file: Counter() for file in files}
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        trees: Queue[Tree] = Queue()
        for number in range(options.workers):
            trees.put(Tree(Path(folder) / str(number)))

        def judge(place: Place) -> tuple[Place, str, float]:
            if place.key in known:
                return place, "equivalent", 0.0
            tree = trees.get()
            try:
                outcome, seconds = tree.test(tests[place.file], place)
                if outcome == "survived" and options.wide:
                    outcome, more = tree.test(WIDE, place)
                    seconds += more
            finally:
                trees.put(tree)
            return place, outcome, seconds

        check(files, tests, trees)
        with ThreadPoolExecutor(options.workers) as pool:
            for place, outcome, seconds in pool.map(judge, chosen):
                counts[place.file][outcome] += 1
                line = f"{place.file}:{place.mutant.line}"
                with _FORKING:
                    print(
                        f"{outcome:10} {seconds:4.0f} s  {line} {place.mutant.change}", flush=True
                    )
                if outcome == "survived":
                    survivors.append(place)
    show(counts, survivors)
    sys.exit(bool(survivors))


def check(files: Sequence[str], tests: dict[str, list[str]], trees: "Queue[Tree]") -> None:
    """See that all tests pass where nothing is changed.

    Raises:
        RuntimeError: If they do not: every mutant would look as if it were noticed.
    """
    tree = trees.get()
    wanted = [*dict.fromkeys(test for file in files for test in tests[file])]
    outcome, seconds = tree.test(wanted, seconds=20 * SECONDS)
    if outcome != "survived":
        raise RuntimeError(f"unchanged: {outcome}\n{(tree.root / 'log.txt').read_text()[-3000:]}")
    print(f"unchanged: all pass in {seconds:.0f} s", flush=True)
    trees.put(tree)


def show(counts: dict[str, Counter[str]], survivors: Sequence[Place]) -> None:
    """A table of the files, and the survivors."""
    columns = ("killed", "too slow", "equivalent", "survived")
    print(f"\n| file | mutants | {' | '.join(columns)} |\n|{' --- |' * (2 + len(columns))}")
    total = Counter[str]()
    for file, count in counts.items():
        total += count
        numbers = [count.total(), *(count[column] for column in columns)]
        print(f"| {file} | {' | '.join(map(str, numbers))} |")
    print(f"| all | {' | '.join(map(str, [total.total(), *(total[c] for c in columns)]))} |\n")
    for place in survivors:
        print(f"{place.key} (line {place.mutant.line})")
    print(f"{len(survivors) or 'no'} unexplained survivor{'s' if len(survivors) > 1 else ''}")


if __name__ == "__main__":
    main()
