import pytest
import torch

from lightning_kd.models import StudentSpec
from lightning_kd.models.placement import on_compute_device, place_model
from lightning_kd.modules import SupervisedKD
from lightning_kd.teachers import LocalTeacher, RoutedTeacher, TeacherEnsemble
from tests.support.harness import fit_one_step
from tests.support.toys import ragged_batch, tiny_llama

BATCH = ragged_batch([(2, 5), (1, 3)])
CPU = torch.device("cpu")


@pytest.mark.parametrize("placement", ["offloaded", "cpu"])
def test_where_a_teacher_is_kept_changes_nothing(placement):
    def step(placement):
        module = SupervisedKD(
            student=StudentSpec.of(tiny_llama(0)),
            teacher=TeacherEnsemble(
                [LocalTeacher.of(tiny_llama(seed), placement=placement) for seed in (1, 2)]
            ),
        )
        return fit_one_step(module, [BATCH])

    (loss, gradient), (expected, reference) = step(placement), step("replicated")
    assert loss == expected
    assert torch.equal(gradient, reference)


def test_an_offloaded_model_keeps_its_weights_where_they_were():
    model = tiny_llama(0).requires_grad_(False)
    kept = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    place_model(model, "offloaded", CPU, None)
    with on_compute_device(model, "offloaded", CPU) as there:
        assert there == CPU
        for parameter in model.parameters():  # as a copy to an accelerator does
            parameter.data = parameter.data.clone()
    # Not copied back: these are the weights that stayed.
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == kept


def test_a_teacher_on_a_device_of_its_own_stays_there():
    model = tiny_llama(0).requires_grad_(False)
    place_model(model, "meta", CPU, None)
    with on_compute_device(model, "meta", CPU) as there:
        assert {p.device for p in model.parameters()} == {there} == {torch.device("meta")}


@pytest.mark.parametrize("placement", ["moon", "meta"])
def test_an_unknown_placement_lists_the_choices(placement):
    with pytest.raises(ValueError, match=f"unknown placement '{placement}'; choose replicated, sh"):
        LocalTeacher("somewhere", placement=placement)


def test_rows_with_teachers_of_their_own_cannot_have_them_in_shards():
    with pytest.raises(ValueError, match="each process asks the teachers of its own rows"):
        RoutedTeacher({"a": LocalTeacher.of(tiny_llama(0), placement="sharded")})


QUANTIZED = [
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "Linear8bitLt", 0.05),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "Linear4bit", 0.3),
]


@pytest.mark.parametrize(("quantization", "layer", "off"), QUANTIZED)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt.* inputs will be cast:UserWarning")
def test_a_quantized_teacher_teaches_nearly_the_same(quantization, layer, off, tmp_path):
    """Through transformers and bitsandbytes, from a directory, as a user would load it."""
    size = {"hidden_size": 64, "intermediate_size": 256}
    tiny_llama(1, **size).save_pretrained(tmp_path)
    teacher = LocalTeacher(str(tmp_path), quantization=quantization)
    module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    loss, gradient = fit_one_step(module, [BATCH])
    small = teacher.model
    assert type(small.model.layers[0].mlp.up_proj).__name__ == layer
    assert small.get_memory_footprint() < 0.5 * tiny_llama(1, **size).get_memory_footprint()

    whole = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher(str(tmp_path)))
    expected, reference = fit_one_step(whole, [BATCH])
    assert loss == pytest.approx(expected, rel=off)
    assert (gradient - reference).norm() < off * reference.norm()


def test_only_weights_that_are_loaded_can_be_quantized():
    with pytest.raises(ValueError, match="give name_or_path"):
        LocalTeacher(config={"model_type": "llama"}, quantization={"quant_method": "bitsandbytes"})
