"""`sae-export`: SAEs in the formats of other programs, and on the Hugging Face Hub.

Everything is checked and written to a temporary directory before it takes the place of `--out`, and an upload begins
after that. torch and the other heavy libraries are imported once the arguments are right.
"""

import os
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sae_train.cli.export_help import Options, parse
from sae_train.cli.process import INTERRUPTED, complain, run_and_exit
from sae_train.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_train.formats.comparison import Verified
    from sae_train.formats.export import Written
    from sae_train.formats.foreign import Format
    from sae_train.sae.autoencoder import SparseAutoencoder


def main() -> None:
    """Run the command of `sys.argv` and exit with its status."""
    run_and_exit(run_command)


def run_command(arguments: list[str]) -> int:
    """Run the command of these arguments; return the exit status."""
    try:
        options = parse(arguments)
        if options is not None:
            _export(options)
    except UserError as error:
        complain(str(error), everywhere=True)
        return error.status
    except KeyboardInterrupt:
        complain("Interrupted.", everywhere=True)
        return INTERRUPTED
    return 0


def _export(options: Options) -> None:
    from sae_train.cli.export_sources import find_sources
    from sae_train.formats import own
    from sae_train.formats.export import export
    from sae_train.formats.hub_files import check_target, upload
    from sae_train.formats.registry import format_named
    from sae_train.phases import Phases
    from sae_train.training.console import ProgressBar, say

    to: Format = own if options.to is None else format_named(options.to)
    target = None if options.push is None else check_target(options.push, private=options.private)
    sources, left_out = find_sources(options.run, options.sae)
    for line in left_out:
        say(line)
    checks = _Checks(verifies=options.verify)
    with ExitStack() as stack:
        out = _out(options, stack)
        has_card = options.card or target is not None
        written = export(
            sources,
            to,
            out,
            model=options.model,
            layer=options.layer,
            site=options.site,
            check=checks,
            complete=partial(_write_card, options, to, checks, out) if has_card else None,
            phases=Phases(show=partial(ProgressBar, is_first=True)),
        )
        for line in _assumptions(written, has_license=options.license is not None or not has_card):
            say(line)
        for each in written:
            if each.verified is not None:
                say(f"{each.source.name}: {_verdict(each.verified)}")
        url = None if target is None else upload(target, out)
    say(_last_line(written, to, options.out and out, url))


def _out(options: Options, stack: ExitStack) -> Path:
    """Return the directory of the export. Without `--out` it is a temporary one, which is gone after the upload."""
    if options.out is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sae-export-"))) / "export"
    out = Path(os.path.abspath(Path(options.out).expanduser()))
    if not out.name:
        raise CheckpointError(f"--out {options.out}: holds something else than an export. Choose a new directory.")
    return out


class _Checks:
    """The checks of each SAE once it is written: formats that hold it, and with `--verify` a second reading."""

    def __init__(self, *, verifies: bool) -> None:
        self._verifies = verifies
        self.able: list[str] | None = None
        """Formats that hold all SAEs so far exactly."""

    def __call__(self, to: "Format", directory: Path, sae: "SparseAutoencoder") -> "Verified | None":
        from sae_train.formats.registry import formats_that_hold

        able = formats_that_hold(sae)
        self.able = able if self.able is None else [name for name in self.able if name in able]
        if not self._verifies:
            return None
        from sae_train.formats.verify import verify_export

        verified = verify_export(to, directory, sae)
        if not verified.is_equal:
            raise CheckpointError(
                f"--verify: {verified.reader} reads another SAE than the one that was exported: "
                f"{_differences(verified)}. Nothing was written. Please report it."
            )
        return verified


def _verdict(verified: "Verified") -> str:
    return f"verified with {verified.reader}: {_differences(verified)}"


def _differences(verified: "Verified") -> str:
    return (
        f"{verified.support_differences} supports differ, codes by at most {verified.codes:.1e}, reconstructions by at "
        f"most {verified.reconstruction:.1e}"
    )


def _write_card(
    options: Options, to: "Format", checks: _Checks, out: Path, partial_out: Path, written: "Sequence[Written]"
) -> None:
    from sae_train.formats.card import write_card

    write_card(
        partial_out,
        [each.folder(out) for each in written],
        format_name=to.NAME,
        able=checks.able or [],
        repo=options.push,
        license_name=options.license,
    )


def _assumptions(written: "Sequence[Written]", *, has_license: bool) -> list[str]:
    """Return a line for each assumption, with the number of SAEs where it is of several."""
    counts: dict[str, list[str]] = {}
    for each in written:
        for sentence in each.origin.assumed:
            counts.setdefault(sentence, []).append(each.source.name)
    lines = []
    for sentence, names in counts.items():
        whose = "" if len(written) == 1 else f" of {names[0]}" if len(names) == 1 else f" of {len(names)} SAEs"
        lines.append(f"assumed{whose}: {sentence}")
    return lines if has_license else [*lines, "the model card states no licence: --license gives one."]


def _last_line(written: "Sequence[Written]", to: "Format", out: "Path | str | None", url: str | None) -> str:
    count = "1 SAE" if len(written) == 1 else f"{len(written)} SAEs"
    place = "" if not out else f" to {out}"
    pushed = "" if url is None else f"{' and' if place else ''} pushed to {url}" if place else f" to {url}"
    return f"{count} as {to.NAME}{place}{pushed}"
