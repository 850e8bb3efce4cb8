import pytest

from lightning_kd.rewards import exact_match, final_answer


def test_exact_match_ignores_white_space_at_the_ends():
    got = exact_match(completions=[" 12\n", "1 2", ""], references=["12", "12", ""])
    assert got == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("72 clips.\n#### 72", True),
        ("#### 71 no, #### 72", True),
        ("#### 72.0", True),
        ("####72.", True),
        ("72", False),
        ("#### 7 2", False),
        ("#### 1.2.3", False),
        ("#### ,", False),
        ("#### -72", False),
        ("", False),
    ],
)
def test_the_last_final_answer_counts(completion, right):
    reference = "She sold 48 + 24 = <<48+24=72>>72 clips.\n#### 72"
    got = final_answer(completions=[completion], references=[reference], prompts=[""], extra=["x"])
    assert got == [float(right)]


def test_thousands_may_have_commas():
    assert final_answer(completions=["#### 1,200"], references=["#### 1200"]) == [1.0]


def test_a_reference_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="'seventy-two' has no final answer"):
        final_answer(completions=["#### 72"], references=["seventy-two"])
