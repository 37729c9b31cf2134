"""Virtual environments of the programs whose formats verify_formats.py checks.

Each gets the newest releases from the configured package index, and none gets this package. An environment is complete
once there is a file NAME.complete, with the versions that were found; a complete one is used again.
"""

import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

DEFAULT = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sae-train" / "peers"


class Environment(NamedTuple):
    """Packages that install beside each other, and what has to hold for them."""

    requirements: tuple[str, ...]
    programs: tuple[str, ...]
    """The packages whose formats are checked."""


ENVIRONMENTS = {
    "main": Environment(
        ("sae-lens", "eai-sparsify", "dictionary-learning"), ("sae-lens", "eai-sparsify", "dictionary-learning")
    ),
    # transformer-lens 4 has no HookedTransformer, which llamascopium imports
    "llamascopium": Environment(("llamascopium", "transformer-lens<4"), ("llamascopium",)),
    # it pins numpy 1, and its type checks break with a newer beartype
    "sae-bench": Environment(("sae-bench", "beartype==0.14.1"), ("sae-bench",)),
}
UNWANTED = ("torchvision", "torchaudio")
"""Builds for CUDA that come as dependencies, beside a torch without it; transformers then fails in its import."""
VERSIONS = "from importlib.metadata import version; import sys; print(*(n + '==' + version(n) for n in sys.argv[1:]))"


def python_of(root: Path, name: str) -> Path:
    """Return the interpreter of an environment. Build the environment first, unless it is complete."""
    folder, marker = root / name, root / f"{name}.complete"
    python = folder / "bin" / "python"
    if marker.exists() and python.exists():
        return python
    environment = ENVIRONMENTS[name]
    print(f"building {folder}: {', '.join(environment.requirements)} (minutes)", flush=True)
    root.mkdir(parents=True, exist_ok=True)
    venv.create(folder, clear=True, with_pip=True)
    pip = [python, "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check"]
    torch = f"torch=={version('torch').partition('+')[0]}"  # the same arithmetic on both sides
    subprocess.run([*pip, "install", torch, *environment.requirements], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *UNWANTED], check=True, stderr=subprocess.DEVNULL)
    found = subprocess.run(
        [python, "-c", VERSIONS, "torch", *environment.programs], check=True, capture_output=True, text=True
    )
    marker.write_text(found.stdout)
    return python


if __name__ == "__main__":
    for each in ENVIRONMENTS:
        print(python_of(Path(sys.argv[1]) if sys.argv[1:] else DEFAULT, each), flush=True)
