"""How to load an export, in this library and in others: the code in a model card.

Each piece of code was run with the newest release of its library (docs/hub.md).
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

from sae_train.formats import own

LIBRARIES = {
    own.NAME: "sae_train",
    "saelens": "saelens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "llamascopium": "llamascopium",
}
"""Names for the front matter of a card, `library_name`, by format. Formats without a library of their own have ours."""
TITLES = {
    "saelens": "SAELens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
    "llamascopium": "Llamascopium",
}
LOADERS = {
    "saelens": 'from sae_lens import SAE\n\nsae = SAE.load_from_disk({directory}, device="cpu")',
    "dictionary_learning": (
        "from dictionary_learning.utils import load_dictionary\n\n"
        'sae, config = load_dictionary({directory}, device="cpu")'
    ),
    "sparsify": 'from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_disk({directory}, device="cpu")',
    "llamascopium": (
        "from llamascopium import SparseDictionary\n\nsae = SparseDictionary.from_pretrained({directory})"
    ),
}
"""Code that loads a directory of a format in the library that the format belongs to. The first ones are preferred."""
PEERS = 2
"""Other libraries that a card shows."""


def loading_section(*, repo: str | None, folder: PurePosixPath, format_name: str, able: Sequence[str]) -> str:
    """Return the part of a card about loading.

    Args:
        repo: ORG/NAME on the Hub. None where the export stays in a directory.
        folder: of one SAE, below the export's directory.
        format_name: of the export.
        able: names of the formats that hold all of the SAEs exactly.
    """
    inside = "" if folder == PurePosixPath() else f"/{folder}"
    address = f"hf://{repo}{inside}" if repo else f"DIR{inside}"
    ours = f'import sae_train\n\nsae = sae_train.load("{address}")\ncodes = sae.encode(x)  # x [tokens, d_model], raw\n'
    ours += "reconstruction = sae.decode(codes)"
    parts = ["## How to load", "" if repo else "`DIR` is the directory of this file.", "### sae-train", _code(ours)]
    peers = [name for name in (format_name, *LOADERS) if name in LOADERS and name in able]
    for name in list(dict.fromkeys(peers))[:PEERS]:
        parts += [f"### {TITLES[name]}", *_peer(name, format_name, repo=repo, inside=inside, address=address)]
    return "\n\n".join(part for part in parts if part)


def _peer(name: str, format_name: str, *, repo: str | None, inside: str, address: str) -> list[str]:
    """Return the code for another library: of these files, or of a copy in the library's own format."""
    if name != format_name:
        command = f"sae-export {address} --to {name} --out COPY"
        return [
            "A command of sae-train makes a copy in this library's format:",
            _code(command, language="bash"),
            _code(LOADERS[name].format(directory='"COPY"')),
        ]
    if repo is None:
        return [_code(LOADERS[name].format(directory=f'"DIR{inside}"'))]
    only = f', allow_patterns="{inside[1:]}/*"' if inside else ""
    fetched = f'from huggingface_hub import snapshot_download\n\ndirectory = snapshot_download("{repo}"{only})\n\n'
    directory = f'f"{{directory}}{inside}"' if inside else "directory"
    return [_code(fetched + LOADERS[name].format(directory=directory))]


def _code(text: str, *, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"
