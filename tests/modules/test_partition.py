"""The first promise: no cut of a batch changes its loss or its gradient."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_kd.models import StudentSpec
from lightning_kd.modules import SupervisedKD
from lightning_kd.teachers import LocalTeacher
from tests.modules.partition_grid import CASES, CUTS, STEPS, run
from tests.support.harness import fit_one_step
from tests.support.scripts import written_by
from tests.support.toys import ragged_batch, tiny_llama, with_prompts


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """All cuts over two ranks, in one start of real ddp."""
    return written_by("modules/partition_grid.py", tmp_path_factory.mktemp("grid") / "grid.pt")


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_no_cut_changes_loss_gradient_or_weights(case, two_processes):
    whole = run(case, CUTS[0])
    assert len(whole["gradients"]) == STEPS.get(case[0], 2)
    # Losses of its validations, too.
    assert len(whole["losses"]) == (6 if case[0] == "adaptive" else 2)
    assert case[0] != "adaptive" or whole["generated"] == [False, False, True]
    for cut in CUTS[1:]:
        other = run(case, cut) if cut[0] == 1 else two_processes["grid"][(case, cut)]
        assert other["losses"] == pytest.approx(whole["losses"], rel=1e-10)
        for a, b in zip(other["gradients"], whole["gradients"], strict=True):
            assert (a - b).norm() / b.norm() < 1e-10
        assert (other["weights"] - whole["weights"]).norm() / whole["weights"].norm() < 1e-12
    if case[2] is not None:
        norms = [gradient.norm().item() for gradient in whole["gradients"]]
        assert norms == pytest.approx([case[2]] * 2, rel=1e-3)


def test_a_rank_or_a_window_without_a_label_is_no_obstacle(two_processes):
    (one_rank, finite), (no_rank, also_finite) = two_processes["empty"]
    assert finite
    assert also_finite
    assert one_rank[0] > 0
    assert one_rank[1] > 0
    assert no_rank == [0, 0]


def test_the_text_of_references_has_no_part_in_the_gradient():
    """What is scored are tokens: other reference text, longer or shorter, changes no bit."""
    batch = with_prompts(ragged_batch([(2, 5), (1, 3)]))
    gradients = []
    for factor in (1, 4, 16):
        module = SupervisedKD(
            student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1))
        )
        texts = [text * factor for text in batch["completion"]]
        _, gradient = fit_one_step(module, [batch | {"completion": texts}])
        gradients.append(gradient)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_mixed_precision_and_the_gradient_scaler_keep_the_promise(precision, clip):
    """To the rounding of half precision; the divided, unscaled gradient is what is clipped."""
    rows = ragged_batch([(2, 5), (1, 3), (3, 7), (2, 1)])
    halves = [{k: v[part] for k, v in rows.items()} for part in (slice(0, 2), slice(2, 4))]

    def step(batches):
        module = SupervisedKD(
            student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1))
        )
        # As a plugin: by flag alone, Lightning puts bfloat16 in float16's place on a CPU.
        scaler = torch.amp.GradScaler("cpu", init_scale=256) if precision == "16-mixed" else None
        plugin = MixedPrecision(precision, "cpu", scaler)
        return fit_one_step(module, batches, plugins=[plugin], gradient_clip_val=clip)

    (loss, gradient), (other_loss, other) = step([rows]), step(halves)
    exact_loss, exact = fit_one_step(
        SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1))),
        [rows],
        gradient_clip_val=clip,
    )
    assert loss == pytest.approx(other_loss, rel=2e-3)
    assert loss == pytest.approx(exact_loss, rel=3e-2)
    assert (gradient - other).norm() / gradient.norm() < 2e-2
    assert torch.nn.functional.cosine_similarity(gradient, exact, dim=0) > 0.98
    assert gradient.norm().item() == pytest.approx(exact.norm().item(), rel=0.1)
