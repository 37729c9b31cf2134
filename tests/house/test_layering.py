"""The house rules that can be read off the source: who imports whom, what costs what, how long a file may be."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sae_train"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"errors", "assets", "phases"},
    {"hub"},
    {"config"},
    {"ranks", "sites"},
    {"kernels"},
    {"sae"},
    {"sparsifiers", "harvest", "formats"},
    {"evaluation"},
    {"training"},
    {"sweeps"},
    {"cli"},
    {"__main__"},
]
"""A module imports from its own folder and from the layers above it in this list; inside a layer nothing else."""

OUTSIDE = {
    "accelerate": {"ranks/distributed.py"},
    "datasets": {"harvest/dataset_rows.py"},
    "huggingface_hub": {"formats/hub_files.py"},
    "pandas": {"training/finished_run.py"},
    "pyarrow": {"harvest/dataset_rows.py"},
    "submitit": {"sweeps/submit.py"},
    "wandb": {"training/wandb_worker.py"},
    "hydra": {"cli/*"},
    "omegaconf": {"cli/*"},
    "yaml": {"cli/library.py", "training/hardware.py", "training/run_directory.py"},
    "tqdm": {"training/console.py"},
    "safetensors": {
        "training/checkpoint.py",
        "training/checkpoint_files.py",
        "training/restore.py",
        "formats/*",
        "harvest/tensor_files.py",
    },
    "triton": {"kernels/triton_*"},
    "transformers": {
        "harvest/language_model.py",
        "harvest/model_facts.py",
        "harvest/checkpoints.py",
        "harvest/architecture.py",
    },
}
"""Which files may import each of the heavy libraries."""

LIGHT = [
    "__init__.py",
    "__main__.py",
    "cli/compose.py",
    "cli/entries.py",
    "cli/export.py",
    "cli/export_help.py",
    "cli/from_python.py",
    "cli/help.py",
    "cli/hydra_flags.py",
    "cli/library.py",
    "cli/never_read.py",
    "cli/overrides.py",
    "cli/parsing.py",
    "cli/point.py",
    "cli/process.py",
    "cli/quoting.py",
    "cli/suite.py",
    "cli/train.py",
    "cli/typed_settings.py",
    "config/run.py",
    "errors.py",
    "ranks/launcher_env.py",
    "ranks/threads.py",
]
"""What runs before it is known that there is anything to run: no import of these leads to torch."""

HEAVY = {"torch", "numpy", *OUTSIDE} - {"hydra", "omegaconf", "yaml"}

LONGEST = 300
MOST_KERNEL_LINES = 1700


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted modules that are imported anywhere in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield str(node.module)
            if node.module == "sae_train":
                yield from (f"sae_train.{alias.name}" for alias in node.names)


def at_module_level(tree: ast.Module) -> ast.Module:
    """Return the statements that importing a module runs: no function bodies, no `if TYPE_CHECKING`."""
    kept = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return ast.Module(body=kept, type_ignores=[])


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def layer_of(module: str) -> int:
    (number,) = [number for number, names in enumerate(LAYERS) if module in names]
    return number


def test_every_module_has_a_layer() -> None:
    there = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert there == set().union(*LAYERS)


@pytest.mark.parametrize("path", [path for path in FILES if path != PACKAGE / "__init__.py"], ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    own = relative(path).split("/")[0].removesuffix(".py")
    for module in imports(parsed(path)):
        name, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if name == "sae_train" and other not in ("", "conf", own, "__version__"):
            assert layer_of(other) < layer_of(own), f"{relative(path)} imports {module}"


def test_the_settings_of_a_whole_run_end_at_the_run() -> None:
    """Rooms below the command line and `training/run.py` take a `SourceConfig`, a `SaeConfig` or a smaller part."""
    users = {relative(path) for path in FILES if re.search(r"\bRunConfig\b", path.read_text(encoding="utf-8"))}
    assert {path for path in users if not path.startswith(("config/", "cli/"))} == {"training/run.py"}


@pytest.mark.parametrize("library", OUTSIDE)
def test_a_heavy_library_is_imported_where_its_name_says(library: str) -> None:
    users = {relative(p) for p in FILES for module in imports(parsed(p)) if module.partition(".")[0] == library}
    allowed = {relative(path) for pattern in OUTSIDE[library] for path in PACKAGE.glob(pattern)}
    assert users - allowed == set()


def test_collectives_live_in_ranks() -> None:
    users = {relative(path) for path in FILES if re.search(r"torch\.distributed|\bdist\.", ast.unparse(parsed(path)))}
    assert users == {"ranks/distributed.py"}


@pytest.mark.parametrize("name", LIGHT)
def test_nothing_heavy_is_imported_before_it_is_needed(name: str) -> None:
    waiting, seen = [PACKAGE / name], set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for module in imports(at_module_level(parsed(path))):
            root, *rest = module.split(".")
            assert root not in HEAVY, f"{name} by way of {relative(path)}"
            file, folder = PACKAGE.joinpath(*rest).with_suffix(".py"), PACKAGE.joinpath(*rest) / "__init__.py"
            if root == "sae_train":
                waiting += [found for found in (file, folder) if found.exists() and found not in seen]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_sources_are_ascii() -> None:
    files = [*FILES, *(path for folder in ("conf", "scripts", "tests", "slurm") for path in (ROOT / folder).rglob("*"))]
    texts = [path for path in files if path.suffix in {".py", ".yaml", ".sbatch", ".sh", ".md"}]
    assert [str(path) for path in texts if not path.read_bytes().isascii()] == []


def test_nothing_is_printed_or_warned_at_import() -> None:
    for path in FILES:
        for node in at_module_level(parsed(path)).body:
            found = re.search(r"\bprint\(|basicConfig|set_num_threads|manual_seed", ast.unparse(node))
            assert found is None, relative(path)


def test_the_kernels_stay_small() -> None:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (PACKAGE / "kernels").glob("*.py"))
    assert lines <= MOST_KERNEL_LINES
