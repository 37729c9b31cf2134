"""The arguments of `sae-export`: their help, and the options that they give. Light: imports no torch."""

import argparse
import ast
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import NoReturn

import sae_train
from sae_train.errors import ConfigError, raise_all, suggest

SITES = ("residual", "mlp", "attention")
"""Values of `--site`, as in `formats/foreign.py`."""

INTRODUCTION = """\
sae-export: write SAEs in the formats of other programs, or push them to the Hugging Face Hub.

  sae-export runs/NAME --to saelens --out DIR               every SAE of a run
  sae-export runs/NAME/saes/SAE --to sparsify --out DIR     one of them
  sae-export DIR --to saelens --out OTHER                   an SAE that another program wrote
  sae-export hf://ORG/NAME --to saelens --out DIR           an SAE on the Hub
  sae-export runs/NAME --push ORG/NAME                      to the Hub, in our own format, with a model card

RUN is a run's directory, the directory or file of an SAE, an export, or hf://ORG/NAME[@REVISION][/FOLDER].
An SAE that was stopped is left out. One SAE goes straight into DIR, several into DIR/SAE. A format that cannot
hold an SAE exactly is refused.
Exit status: 0 written, 1 a fault of this program, 2 an error in what was given, 130 interrupted.
"""

FLAGS = {
    "--to FORMAT": "Format of the files. Default: our own, which --push and --card take.",
    "--out DIR": "Directory of the export: new, empty, or with an earlier export of the same SAEs. Default: none; "
    "--push needs none.",
    "--sae NAME": "Export one SAE of several, by its name or folder. Default: all.",
    "--model ID": "Model that headers and card name. Default: as recorded.",
    "--layer N": "Block of the site, from 0. Default: as recorded.",
    "--site SITE": f"Kind of site: {', '.join(SITES)}. Default: as recorded.",
    "--verify": "Load each SAE again with the format's own library, or a built-in reader, and compare. Nothing is "
    "written where they differ. Default: off.",
    "--card": "Write a model card, README.md. Default: off; --push always writes it.",
    "--license ID": "Licence in the model card, such as mit. Default: none stated.",
    "--push ORG/NAME": "Upload the export to the Hugging Face Hub. Default: off.",
    "--private": "Make the new repository private. Default: public.",
    "--version, --help": "Print the version, or this text.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The arguments of the command. `parse` makes them, and `cli/export.py` takes them."""

    run: str
    to: str | None
    out: str | None
    sae: str | None
    model: str | None
    layer: int | None
    site: str | None
    verify: bool
    card: bool
    license: str | None
    push: str | None
    private: bool


class _Parser(argparse.ArgumentParser):
    """argparse, with messages of this program in place of its own."""

    def error(self, message: str) -> NoReturn:
        value = re.match(r"argument (\S+): expected one argument", message)
        if value:
            raise ConfigError(f"{value[1]}: needs a value. `sae-export --help` lists the flags.")
        extra = re.match(r"argument (\S+): ignored explicit argument (.*)", message)
        if extra:
            raise ConfigError(f"{extra[1]}={ast.literal_eval(extra[2])}: takes no value. Write {extra[1]}.")
        raise ConfigError(f"{message}. `sae-export --help` lists the flags.")


def parse(arguments: list[str]) -> Options | None:
    """Return the options, or None where help or the version was asked for and is printed.

    Raises:
        ConfigError: lists every argument that is wrong.
    """
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(usage())
        return None
    if "--version" in arguments:
        sys.stdout.write(f"sae-export {sae_train.__version__}\n")
        return None
    parser = _Parser(prog="sae-export", add_help=False, allow_abbrev=False)
    parser.add_argument("run", nargs="?")
    known = []
    for flag in FLAGS:
        name, _, value = flag.partition(" ")
        if "," not in name:
            known.append(name)
            parser.add_argument(name, action="store" if value else "store_true")
    found, unknown = parser.parse_known_args(arguments)
    flags = [text for text in unknown if text.startswith("-")]
    problems = [_unknown(text, known) for text in flags or unknown]  # other texts may be the values of these flags
    options = vars(found)
    given = [text.partition("=")[0] for text in arguments]
    problems += [f"{name}: given {given.count(name)} times. Give it once." for name in known if given.count(name) > 1]
    problems += [
        f"{'RUN' if name == 'run' else f'--{name}'}: has no value. Give one, or remove it."
        for name, value in options.items()
        if value == ""
    ]
    problems += _wrong(options)
    if not unknown:  # it may be among these, misspelt
        problems += _missing(options)
    raise_all(problems)
    return Options(**options | {"layer": None if found.layer is None else int(found.layer)})


def _unknown(text: str, known: Iterable[str]) -> str:
    if text.startswith("-"):
        flag = text.partition("=")[0]
        return f"{flag}: no such flag.{suggest(flag, known)} `sae-export --help` lists them."
    return f"{text}: a second RUN, or the value of a flag that takes none. Give one RUN."


def _wrong(options: dict[str, str | None]) -> list[str]:
    """Return a message for each option that is wrong by itself, or has no effect."""
    problems, formats = [], descriptions()
    to, push = options["to"], options["push"]
    if to is not None and to not in formats:
        problems.append(f"--to {to}: no such format.{suggest(to, formats)}")
    if options["layer"] is not None and not re.fullmatch(r"[0-9]{1,6}", options["layer"]):
        problems.append(f"--layer {options['layer']}: not a block. Give a whole number, from 0.")
    if options["site"] is not None and options["site"] not in SITES:
        problems.append(f"--site {options['site']}: no such kind of site.{suggest(options['site'], SITES)}")
    if push is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", push):
        problems.append(f"--push {push}: not an id on the Hugging Face Hub. Write ORG/NAME.")
    if options["private"] and push is None:
        problems.append("--private: of the repository of --push. Remove it, or add --push ORG/NAME.")
    if options["license"] is not None and not (push or options["card"]):
        problems.append("--license: of the model card. Remove it, or add --card.")
    return problems


def _missing(options: dict[str, str | None]) -> list[str]:
    """Return a message for each option that is missing."""
    problems, push = [], options["push"]
    if options["run"] is None:
        problems.append("RUN is missing. Give a run's directory, an SAE or hf://ORG/NAME.")
    if options["to"] is None and not (push or options["card"]):
        known = ", ".join(descriptions())
        problems.append(f"--to FORMAT is missing. Known: {known}. Or push our own format with --push ORG/NAME.")
    if options["out"] is None and push is None:
        problems.append("--out DIR is missing. Give a new directory.")
    return problems


def usage() -> str:
    """Return the help text, with the formats and what each holds."""
    text = [INTRODUCTION, "Flags"]
    text += [_entry(f"  {flag}", line) for flag, line in FLAGS.items()]
    text += ["", "Formats and the SAEs that each holds exactly"]
    text += [_entry(f"  {name}", f"{holds}.") for name, holds in descriptions().items()]
    return "\n".join(text) + "\n"


def _entry(start: str, line: str) -> str:
    return fill(line, width=116, initial_indent=f"{start:<24} ", subsequent_indent=" " * 25)


def descriptions() -> dict[str, str]:
    """Return the phrase of each format about the SAEs that it holds, in the order of the registry.

    The modules need torch, so their sources are read.
    """
    folder = Path(sae_train.__file__).parent / "formats"
    modules: list[str] = []
    for node in _statements(folder / "registry.py"):
        if isinstance(node, ast.ImportFrom) and node.module == "sae_train.formats":
            modules += [alias.name for alias in node.names]
    found: dict[str, str] = {}
    for module in modules:
        words = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in _statements(folder / f"{module}.py")
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in ("NAME", "HOLDS")
        }
        found[words["NAME"]] = words["HOLDS"]
    return found


def _statements(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body
