"""The text of `sae-train --help`: commands, groups and keys, with the help line and the range of each key."""

import ast
import inspect
from textwrap import fill
from typing import Any

from sae_train import config as schema
from sae_train.cli.compose import Offer
from sae_train.cli.overrides import NAMES_OF_CHOICES
from sae_train.config.launcher import GROUP, PREFIX, SlurmLauncher
from sae_train.config.ranges import ranges

INTRODUCTION = """\
sae-train: train sparse autoencoders on the activations of language models.

  sae-train                                            the bundled model and corpus, on a CPU
  sae-train sparsifier=topk k=64                       choose from a group, turn a dial
  sae-train -m sparsifier=topk,mutual_choice k=16,32   a sweep: four runs, one after another
  sae-train -m hydra/launcher=slurm k=16,32            the same, each run a SLURM job
  sae-train 'grid={layer:[residual,mlp],k:[16,32]}'    four SAEs in one run, from one pass over the model
  sae-train 'variants=["k=16","sparsifier=topk k=24"]' two SAEs, each with settings of its own
  sae-train model=gpt2 data=files data.id=PATH         another language model, text of your own
  sae-train harvest=tensors harvest.path=DIR           activations from anywhere
  sae-train dry_run=true                               the plan, and what is wrong with it

The same command resumes a run that was stopped. Where the run is finished, it prints a message and ends.
Exit status: 0 finished, 1 a fault of this program or a lost rank, 2 an error in what was given,
3 stopped by the numbers, 75 preempted and saved.
"""

FLAGS = """\
Flags
  -m, --multirun     make a run for each combination of comma lists
  --cfg job          print the composed configuration and stop (--resolve fills in ${...})
  --config-dir DIR   more choices: DIR/GROUP/NAME.yaml, DIR/experiment/NAME.yaml
  --info, --shell-completion, --hydra-help: see https://hydra.cc
  --version, --help (with choices before it: their keys)
"""


def field_lines(config_class: type) -> dict[str, str]:
    """Return the docstring under each field of a configuration class and of its bases."""
    lines: dict[str, str] = {}
    for owner in reversed(config_class.__mro__[:-1]):
        (tree,) = ast.parse(inspect.getsource(owner)).body
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                line = after.value if isinstance(after, ast.Expr) else None
                lines[field.target.id] = str(line.value) if isinstance(line, ast.Constant) else ""
    return lines


def help_lines(config_class: type) -> dict[str, str]:
    """Return the help line of each field: the lines under it as one, then its range."""
    found, lines = ranges(config_class), field_lines(config_class)
    ends = {name: f"{'One of' if each.choices else 'Range'}: {each.words}." for name, each in found.items()}
    return {name: " ".join([*line.split(), ends.get(name, "")]).strip() for name, line in lines.items()}


def usage(offer: Offer) -> str:
    """Return the help text of the groups and keys in `offer`."""
    dials = help_lines(schema.RunConfig)
    text = [INTRODUCTION, "Dials (key=value)"]
    text += [_entry(key, value, dials[key]) for key, value in offer.values.items() if key not in offer.classes]
    text += ["", "Groups (group=choice), each with the keys of what it is set to now"]
    for group, config_class in offer.classes.items():
        lines = help_lines(config_class)
        text += ["", f"  {group}: {', '.join(offer.choices[group])}"]
        text += [
            _entry(f"{group}.{key}", value, lines[key])
            for key, value in offer.values[group].items()
            if f"{group}.{key}" not in NAMES_OF_CHOICES
        ]
    lines = help_lines(SlurmLauncher)
    text += ["", f"Where a sweep is made: here, or with -m {GROUP}=slurm", "", f"  {GROUP}: slurm"]
    text += [_entry(f"{PREFIX}{key}", value, lines[key]) for key, value in offer.launcher.items()]
    return "\n".join([*text, "", FLAGS])


def _entry(key: str, value: Any, line: str) -> str:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    start = f"    {key}={shown}"
    return fill(line, width=116, initial_indent=f"{start:<40} ", subsequent_indent=" " * 41) if line else start
