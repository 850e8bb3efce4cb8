"""The commands of ``lightning-kd``, for whoever asks before anything large is imported."""

from difflib import get_close_matches

from lightning_kd.cli.named_configs import list_names

COMMANDS = {
    "fit": "train a student",
    "check": "say what a run would do and what would ruin it, before it starts",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "write completions of a checkpoint to a file",
    "evaluate": "evaluate an exported student, or any model, on data",
    "export": "write the student of a checkpoint as a Hugging Face model with a card",
    "compare": "make several runs with several seeds, and a table of them",
    "cache": "write what a teacher says about the data, for CachedTeacher to read",
    "serve": "serve a teacher to runs in other processes",
    "tokenizer": "train a tokenizer on your own text",
    "demo": "train a teacher on arithmetic and distill it, offline",
}
"""Each command, and what it does."""

DESCRIPTION = f"""Distill language models with PyTorch Lightning.

{chr(10).join(f"  lightning-kd {name:10} {what}" for name, what in COMMANDS.items())}

Give a method and its data in a YAML file, or by the name of one that comes along, and change any value
on the command line, for example:
  lightning-kd fit --config supervised_kd --model.divergence GeneralizedJSD
  lightning-kd test --config runs/version_0/config.yaml --ckpt_path last
All options of a command, and those of one method, divergence or teacher:
  lightning-kd fit --help
  lightning-kd fit --model.help GKD
What a run would use, without running it:
  lightning-kd fit --config gkd --print_config
Configs that come along, for fit, to be put over these, and for compare; a file that exists comes first:
{list_names("  ")}
Errors are short; LIGHTNING_KD_TRACEBACK=1 shows where they come from.
"""


def unknown_command(name: str) -> str:
    """Return what is said of a word that is no command.

    Example:
        >>> unknown_command("fti").partition(";")[0]
        "there is no command 'fti'"
        >>> unknown_command("train").splitlines()[-1]
        '  lightning-kd demo       train a teacher on arithmetic and distill it, offline'
    """
    meant = get_close_matches(name, COMMANDS, n=1)
    lines = [f"  lightning-kd {command:10} {what}" for command, what in COMMANDS.items()]
    hint = f"did you mean {meant[0]}? The commands are" if meant else "the commands are"
    return "\n".join([f"there is no command {name!r}; {hint}", *lines])
