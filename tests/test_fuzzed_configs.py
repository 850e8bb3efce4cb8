"""Configs with a wrong value somewhere: whatever it is, nobody sees a traceback."""

from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.command_line import fit

pytestmark = pytest.mark.filterwarnings("ignore")

KD = ["--model.teacher.name_or_path", "teacher"]
TEXTS = ["", "text", "nan", "./teacher", "{}", "[1, 2]"]
THINGS = [[], {}, [1], ["a"], {"a": 1}, {"class_path": "torch.optim.SGD"}, {"class_path": "GKD"}]
VALUES = st.sampled_from([None, True, -1, 0, 1, 2, 0.5, -0.5, 1e9, *TEXTS, *THINGS])
# What would rightly start many processes, wait long or use much memory; and options of TensorBoard's
# writer, which has no types for them.
LEFT_ALONE = {
    "flush_secs",
    "max_queue",
    "devices",
    "num_nodes",
    "num_workers",
    "limit_val_batches",
    "max_steps",
    "max_time",
}
SIZES = {
    "batch_size",
    "eval_batch_size",
    "train_size",
    "validation_size",
    "test_size",
    "max_epochs",
}


def leaves(config, path=()):
    """The place of every value in a config, and of every mapping."""
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


@pytest.mark.usefixtures("teacher")
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    # A found config says it all; a smaller one would take minutes.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_wrong_config_gives_a_traceback(cli, capsys, data):
    """One or two values of a whole config are others: it runs, or says what is wrong."""
    method = data.draw(st.sampled_from(["sft", "supervised_kd", "gkd"]), label="method")
    arguments = fit(method, *(KD if method != "sft" else []))
    with pytest.raises(SystemExit):
        cli(*arguments, "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    places = [place for place in leaves(config) if not LEFT_ALONE & set(place)]
    for _ in range(data.draw(st.integers(1, 2), label="changes")):
        place = data.draw(st.sampled_from(places), label="place")
        inside = config
        for key in place[:-1]:
            inside = inside.get(key) if isinstance(inside, dict) else None
        value = data.draw(VALUES, label="value")
        huge = value == 1e9 and (place[-1] in SIZES or "config" in place)
        if isinstance(inside, dict) and not huge:
            inside[place[-1]] = value
    Path("fuzzed.yaml").write_text(yaml.safe_dump(config))
    with suppress(SystemExit):
        cli("fit", "--config", "fuzzed.yaml")
    assert "Traceback" not in capsys.readouterr().err
