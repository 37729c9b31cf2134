"""Compare our exports with what other programs make of them, and their SAEs with what we make of these.

    python scripts/verify_formats.py --work WORK [--environments DIR]

It builds an environment for each program (verify_environments.py), trains an SAE of each sparsifier on the bundled
model, exports each to every format that can hold it, and lets the format's own program compute codes and
reconstructions of 4096 held-out activations. Then each program trains SAEs of its own and saves them, and
`sae_train.load` opens these. Last come exports with a mistake, which must be told from right ones. It ends with tables
in Markdown, and with status 1 where anything is not as it should be. WORK keeps what is done, for the next time.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import torch
from safetensors.torch import load_file
from torch import Tensor
from verify_environments import DEFAULT, ENVIRONMENTS, python_of
from verify_peers import SAE_BENCH
from verify_subjects import ATTENTION, activations, exported, mistakes, rows_of, subjects, train

import sae_train
from sae_train.formats.comparison import MOST_CODES, MOST_RECONSTRUCTION, Verified, compare
from sae_train.formats.peers import PEERS
from sae_train.formats.registry import FORMATS
from sae_train.sae.autoencoder import SparseAutoencoder

SCRIPTS = Path(__file__).resolve().parent
PROGRAMS = {"sae_lens": "saelens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning",
            "llamascopium": "llamascopium"}  # fmt: skip
"""Programs that train, and the formats in which they save."""

WITH_SAE_BENCH = ("gemma_scope", "dictionary_learning")
"""Formats that SAEBench reads by loaders of its own."""


class Item(NamedTuple):
    """One directory that a program reads. `ours` and `theirs` make it."""

    format: str
    subject: str
    mistake: str
    """Name of the mistake that was made on purpose, or nothing."""
    directory: Path
    sae: SparseAutoencoder
    """What the codes are compared with."""
    out: Path
    package: str
    """The program that reads it."""
    has_own_norms: bool = False
    """Whether its decoder's rows may have any norm. Ours are folded to norm 1, and the codes with them."""


class Result(NamedTuple):
    item: Item
    verified: Verified | None
    """None where the program could not load the files."""
    problem: str

    @property
    def is_equal(self) -> bool:
        """Whether rounding explains all differences, by the plain bounds, which large activations would widen."""
        if self.verified is None or not self.verified.is_equal:
            return False
        return self.verified.codes <= MOST_CODES and self.verified.reconstruction <= MOST_RECONSTRUCTION

    @property
    def is_right(self) -> bool:
        return self.is_equal != bool(self.item.mistake)


def environment_of(package: str) -> str:
    return next(name for name, each in ENVIRONMENTS.items() if package in each.programs)


def ours(work: Path) -> Iterator[Item]:
    """Yield our SAEs in every format that holds them, and wrong copies of two of them."""
    folder = fresh(work / "ours")
    for name, opened in subjects(work).items():
        wrong = mistakes(opened.sae) if name in ("mutual_choice", "topk") else {}
        for format_name in PEERS:
            to = FORMATS[format_name]
            if to.refusal(opened.sae) is not None:
                continue
            for mistake, sae in {"": opened.sae, **wrong}.items():
                out = folder / re.sub(r"\W+", "_", f"{format_name} {name} {mistake}".strip())
                directory = exported(sae, opened.manifest, to, out)
                for package in readers(format_name, name, mistake):
                    found = out.with_suffix(f".{package}.safetensors")
                    yield Item(format_name, name, mistake, directory, opened.sae, found, package)


def theirs(work: Path, rows: Path, pythons: dict[str, Path]) -> Iterator[Item]:
    """Yield SAEs that each program trained and saved, as `sae_train.load` opens them."""
    folder = fresh(work / "theirs")
    for program, format_name in PROGRAMS.items():
        python = pythons[environment_of(PEERS[format_name].package)]
        call(python, "verify_training.py", program, str(rows), str(folder / program))
        for directory in sorted((folder / program).iterdir()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it assumes
                sae = sae_train.load(directory)
            out, package = directory.with_suffix(".safetensors"), PEERS[format_name].package
            yield Item(format_name, directory.name, "", directory, sae, out, package, has_own_norms=True)


def readers(format_name: str, subject: str, mistake: str) -> list[str]:
    """Return the packages that read an export: the format's own, and SAEBench, which opens residual sites alone."""
    also = format_name in WITH_SAE_BENCH and subject != ATTENTION and not mistake
    return [PEERS[format_name].package, SAE_BENCH] if also else [PEERS[format_name].package]


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def call(python: Path, script: str, *arguments: str) -> None:
    """Run a script in another program's environment, quietly unless it fails."""
    print(f"{script} {' '.join(Path(each).name for each in arguments)}", flush=True)
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([python, SCRIPTS / script, *arguments], env=os.environ | offline, capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{python} {script}: status {done.returncode}\n{done.stderr[-3000:]}")


def computed(items: list[Item], held_out: Path, pythons: dict[str, Path], work: Path) -> list[Result]:
    """Return the differences of each program's codes and reconstructions from the SAE's own."""
    for name, python in pythons.items():
        own = [item for item in items if environment_of(item.package) == name]
        if not own:
            continue
        listed = [
            {"format": each.format, "package": each.package, "directory": str(each.directory), "out": str(each.out)}
            for each in own
        ]
        job = work / f"job-{name}.json"
        job.write_text(json.dumps({"activations": str(held_out), "saes": listed}))
        call(python, "verify_peers.py", str(job))
    x_ND = rows_of(held_out)
    results = [result_of(item, x_ND, pythons) for item in items]
    for each in results:
        print(line_of(each), flush=True)
    return results


def result_of(item: Item, x_ND: Tensor, pythons: dict[str, Path]) -> Result:
    if not item.out.exists():
        return Result(item, None, item.out.with_suffix(".txt").read_text().splitlines()[0])
    found = load_file(item.out)
    code_NF = torch.zeros(len(x_ND), item.sae.n_features).flatten()
    code_NF = code_NF.index_put((found["index"],), found["value"]).view(len(x_ND), -1)
    if item.has_own_norms:
        norm_F, own_F = found["rows"].double().norm(dim=1), item.sae.W_dec.detach().double().norm(dim=1)
        code_NF = code_NF.double() * torch.where(own_F > 0, norm_F / own_F, 1)
    verified = compare(item.sae, x_ND, [(code_NF, found["reconstructions"])], reader=item.package)
    item.out.unlink()
    return Result(item, verified, "")


def line_of(result: Result) -> str:
    item, verified = result.item, result.verified
    verdict = "right" if result.is_right else "WRONG"
    head = f"{verdict}: {item.format} in {item.package}: {item.subject} {item.mistake}".rstrip()
    return f"{head}: {result.problem}" if verified is None else f"{head}: {figures_of([verified])}"


def figures_of(found: list[Verified]) -> str:
    """Return the worst of several results: supports that differ, errors of codes and of reconstructions."""
    different, firings = (sum(getattr(each, key) for each in found) for key in ("support_differences", "firings"))
    codes, reconstruction = (max(getattr(each, key) for each in found) for key in ("codes", "reconstruction"))
    return f"{different:,} of {firings:,} | {codes:.1e} | {reconstruction:.1e}"


def tables(results: dict[str, list[Result]], pythons: dict[str, Path]) -> str:
    """Return the tables of docs/formats.md."""
    versions = {}
    for python in pythons.values():
        marker = python.parents[1].with_suffix(".complete")
        versions |= dict(each.split("==") for each in marker.read_text().split())
    lines = [f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__} here, {versions['torch']} there", ""]
    for title, key in (("Our export, read by", "ours"), ("Trained and saved by", "theirs")):
        lines += [f"| {title} | SAEs | supports that differ | codes | reconstruction |", "|---|---|---|---|---|"]
        grouped: dict[tuple[str, str], list[Result]] = defaultdict(list)
        for each in results[key]:
            grouped[each.item.format, each.item.package].append(each)
        for (format_name, package), group in grouped.items():
            found = [each.verified for each in group if each.verified is not None]
            right = sum(each.is_right for each in group)
            count = f"{len(group)}" if right == len(group) else f"{right} of {len(group)}"
            lines.append(f"| `{format_name}`: {package} {versions[package]} | {count} | {figures_of(found)} |")
        lines.append("")
    lines += ["| mistake | exports | found | fewest supports that differ | codes |", "|---|---|---|---|---|"]
    wrong: dict[str, list[Result]] = defaultdict(list)
    for each in results["wrong"]:
        wrong[each.item.mistake].append(each)
    for mistake, group in wrong.items():
        found = [each.verified for each in group if each.verified is not None]
        fewest, codes = min(each.support_differences for each in found), min(each.codes for each in found)
        count = sum(each.is_right for each in group)
        lines.append(f"| {mistake} | {len(group)} | {count} | {fewest:,} | {codes:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for SAEs, activations and exports")
    parser.add_argument("--environments", type=Path, default=DEFAULT, help=f"default: {DEFAULT}")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    pythons = {name: python_of(args.environments.resolve(), name) for name in ENVIRONMENTS}
    train(work)
    rows, held_out = activations(work)
    ours_found = computed(list(ours(work)), held_out, pythons, work)
    results: dict[str, Any] = {
        "ours": [each for each in ours_found if not each.item.mistake],
        "wrong": [each for each in ours_found if each.item.mistake],
        "theirs": computed(list(theirs(work, rows, pythons)), held_out, pythons, work),
    }
    print(f"\n{tables(results, pythons)}")
    bad = [each for group in results.values() for each in group if not each.is_right]
    if bad:
        raise SystemExit(f"{len(bad)} are not as they should be:\n" + "\n".join(map(line_of, bad)))


if __name__ == "__main__":
    main()
