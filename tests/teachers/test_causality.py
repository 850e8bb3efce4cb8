"""Lists that stand beside their positions are found out, whatever k is."""

import pytest
import torch

from lightning_kd.fused import TopKAndToken
from lightning_kd.teachers.servers import VLLMServer
from lightning_kd.teachers.servers.causality import check_causality
from lightning_kd.wire import WireError
from tests.support.toys import tiny_llama

V = 18
IDS = [3, 4, 9, 8, 5, 6, 12, 10, 7]
MODEL = tiny_llama(1)


class Lists(VLLMServer):
    """A server whose lists of likely tokens, and of the rows' own, are moved to the right."""

    def __init__(self, lists=0, labels=0, rounding=0.0, constant=False):
        super().__init__()
        self.lists, self.labels, self.rounding, self.constant = lists, labels, rounding, constant

    def answer(self, ask, question, device):
        with torch.no_grad():
            log_probs = MODEL(question.input_ids).logits.log_softmax(-1)
        if self.constant:
            log_probs = log_probs[:1, :1].expand_as(log_probs)
        log_probs = log_probs + self.rounding * torch.randn_like(log_probs)
        best = log_probs.topk(question.k)
        own = log_probs[:, :-1].gather(-1, question.input_ids[:, 1:, None])[..., 0]
        values, ids = (moved(each[:, :-1], self.lists).flatten(0, 1) for each in best)
        return TopKAndToken(ids, values, label_log_probs=moved(own, self.labels).flatten())


def moved(values, by):
    """Entries that stand so much later than they should; the ends are repeated."""
    last = values.shape[1] - 1
    return values[:, (torch.arange(last + 1) - by).clamp(0, last)]


def check(k, **faults):
    check_causality("http://there", Lists(**faults), None, IDS, range(V), k, torch.device("cpu"))


@pytest.mark.parametrize("k", [1, 2, 8, 17, 18])
@pytest.mark.parametrize("rounding", [0.0, 0.02])
def test_sound_lists_pass(k, rounding):
    torch.manual_seed(0)
    check(k, rounding=rounding)


@pytest.mark.parametrize("k", [1, 2, 8, 17, 18])
@pytest.mark.parametrize(("by", "said"), [(1, "1 later"), (-1, "1 earlier"), (2, "2 later")])
@pytest.mark.parametrize("what", ["lists", "labels"])
def test_shifted_lists_are_found_out(k, by, said, what):
    torch.manual_seed(0)
    with pytest.raises(WireError, match=f"the list is shifted: entries stand {said}"):
        check(k, **{what: by}, rounding=0.01)


def test_answers_that_do_not_depend_on_the_row_are_found_out():
    with pytest.raises(WireError, match="do not depend on what comes before"):
        check(4, constant=True)
