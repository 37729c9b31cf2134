"""What depends on the processor, once more with the instructions of an older one: AVX2, no AVX-512, no bf16."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OLDER = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_kernels", "test_approximate", "test_selection", "test_examples"])
def test_with_avx2_alone(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(HERE / f"{name}.py")]
    done = subprocess.run(
        command, env=os.environ | OLDER, capture_output=True, text=True, timeout=600, check=False, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_the_lowered_processor_is_lower() -> None:
    """Else the test above would show nothing."""
    script = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | OLDER, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in ("AVX2", "DEFAULT")
