"""Run another program's own loader on SAEs and write what it computes, inside that program's environment.

Used by verify_formats.py, which compares the results in its own process. This package need not be installed here: the
loaders are those of sae_train/formats/peers.py, which is imported as a file.

    python verify_peers.py JOB.json

JOB.json: {"activations": a .safetensors file with `x`, "saes": [{"format", "package", "directory", "out"}]}. The
loader is the one of `package`. For each SAE the script writes `out` with the codes that are not 0 (`value`, and `index`
in the flat [n, n_features]), `reconstructions` [n, d_model] and `rows` [n_features, d_model], the decoder's rows. Where
a loader raises, it writes the error into `out` with the suffix .txt.
"""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LOADERS = Path(__file__).resolve().parents[1] / "sae_train" / "formats" / "peers.py"
SAE_BENCH = "sae-bench"
"""It has loaders of its own for two formats of other programs. Its other SAEs come from SAELens."""


def loaders() -> Any:
    """Return sae_train.formats.peers without its package."""
    spec = spec_from_file_location("peers", LOADERS)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["peers"] = module  # typing looks its classes up there
    spec.loader.exec_module(module)
    return module


class DatasetWise:
    """An SAE of llamascopium that its callers give scaled activations."""

    def __init__(self, module: Any, directory: str) -> None:
        self.sae = module.SparseDictionary.from_pretrained(directory)
        self.hook = self.sae.cfg.hook_point_in
        self.factor = 1.0

    def encode(self, x_ND: torch.Tensor) -> torch.Tensor:
        batch, factors = self.sae.normalize_activations({self.hook: x_ND}, return_scale_factor=True)
        self.factor = factors[self.hook]
        return self.sae.encode(batch[self.hook])

    def decode(self, code_NF: torch.Tensor) -> torch.Tensor:
        scaled = {self.hook: self.sae.decode(code_NF)}
        return self.sae.denormalize_activations(scaled, {self.hook: self.factor})[self.hook]


def sae_bench(name: str, directory: Path) -> Any:
    """Return the SAE of a directory as SAEBench's own loaders open it. They are given local files for a download."""
    from sae_bench.custom_saes import jumprelu_sae, topk_sae

    def local(repo_id: str, filename: str, **_: Any) -> str:
        return str(directory / Path(filename).name)

    jumprelu_sae.hf_hub_download = topk_sae.hf_hub_download = local
    common = {"repo_id": "local", "device": torch.device("cpu"), "dtype": torch.float32}
    if name == "gemma_scope":
        named = {"filename": "params.npz", "layer": 2, "model_name": "local"}
        return jumprelu_sae.load_gemma_scope_jumprelu_sae(**named, **common)
    trainer = json.loads((directory / "config.json").read_text())["trainer"]
    load = {
        "JumpReluTrainer": jumprelu_sae.load_dictionary_learning_jump_relu_sae,
        "TopKTrainer": topk_sae.load_dictionary_learning_topk_sae,
    }[trainer["trainer_class"]]
    return load(filename="ae.pt", layer=trainer["layer"], model_name=trainer["lm_name"], **common)


def opened(peers: Any, name: str, package: str, directory: str) -> Any:
    """Return the SAE of a directory as a program opens it."""
    if package == SAE_BENCH:
        return sae_bench(name, Path(directory))
    peer = peers.PEERS[name]
    module = peer.imported()
    header = Path(directory) / "config.json"
    if name == "llamascopium" and json.loads(header.read_text())["norm_activation"] == "dataset-wise":
        return DatasetWise(module, directory)
    return peer.load(module, Path(directory))


@torch.no_grad()
def compute(sae: Any, x_ND: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return codes, reconstructions and decoder rows."""
    codes = sae.encode(x_ND)
    unit = torch.eye(codes.shape[1])
    index = codes.flatten().nonzero()[:, 0]
    found = {
        "index": index,
        "value": codes.flatten()[index],
        "reconstructions": sae.decode(codes),
        "rows": sae.decode(unit) - sae.decode(torch.zeros_like(unit)),
    }
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    x_ND = load_file(job["activations"])["x"]
    peers = loaders()
    for item in job["saes"]:
        out = Path(item["out"])
        try:
            with peers.quiet():
                save_file(compute(opened(peers, item["format"], item["package"], item["directory"]), x_ND), out)
        except Exception as error:
            out.with_suffix(".txt").write_text(f"{type(error).__name__}: {error}")
        print(f"{item['format']}: {item['directory']}", flush=True)


if __name__ == "__main__":
    main()
