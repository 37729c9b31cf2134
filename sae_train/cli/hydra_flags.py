"""Hydra's flags: which are accepted, and the questions that Hydra itself answers."""

import argparse
import sys

from sae_train.errors import raise_all


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Return Hydra's options.

    Raises:
        ConfigError: lists the flags that have no meaning here.
    """
    from hydra._internal.utils import get_args_parser  # Hydra has no public one; pyproject.toml holds it below 1.4

    options, unknown = get_args_parser().parse_known_intermixed_args(arguments)
    problems = [
        f"{flag}: settings take no dashes. Write {flag.lstrip('-')}."
        if "=" in flag
        else f"{flag}: no such flag. `sae-train --help` lists them."
        for flag in unknown
    ]
    if options.config_path:
        problems.append(f"--config-path={options.config_path}: would hide the package's choices. Use --config-dir.")
    if options.experimental_rerun:
        problems.append("--experimental-rerun: nothing is pickled here. Type the command of the run again.")
    if options.multirun and (options.cfg or options.info):
        problems.append("--multirun: --cfg and --info show one configuration. Remove it.")
    if (options.resolve or options.package) and not options.cfg:
        problems.append("--resolve and --package: only with --cfg.")
    raise_all(problems)
    return options


def ask_hydra(arguments: list[str]) -> None:
    """Let Hydra answer `--cfg`, `--info`, `--hydra-help` and `--shell-completion`."""
    import hydra

    from sae_train.cli.library import CONFIG_MODULE, CONFIG_NAME, VERSION_BASE
    from sae_train.cli.schemas import register_schemas

    register_schemas()
    # Hydra would merge a grid into a recipe's grid; an empty one before it takes the recipe's away
    typed = [
        a for argument in arguments for a in ([_NO_GRID, argument] if argument.startswith("grid=") else [argument])
    ]
    sys.argv[1:] = typed  # flags first: Hydra's parser takes no flag between two settings
    ask = hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, version_base=VERSION_BASE)
    ask(_no_run)()


_NO_GRID = "grid=null"


def _no_run(_: object) -> None:
    raise AssertionError("Hydra was asked a question and started a run")
