"""What a short run waits for before its first step."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SCRIPT = """
import sys
from sae_train.cli.train import main
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
unread = ("transformers", "datasets", "torch._dynamo", "triton", "submitit", "wandb")
slow = [name for name in unread if name in sys.modules]
assert not slow, slow
"""


def test_a_run_on_tensors_imports_neither_transformers_nor_torchs_compiler(tmp_path: Path) -> None:
    """Together they take as long as everything else."""
    (tmp_path / "rows").mkdir()
    save_file({"activations": torch.randn(6000, 16)}, str(tmp_path / "rows" / "x.safetensors"))
    said = ["harvest=tensors", "harvest.path=rows", "tracking=none", "tokens=1024", "batch_tokens=64", "k=4"]
    command = [sys.executable, "-c", SCRIPT, *said, "n_features=64", "harvest.calibration_tokens=512"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs").is_dir()
