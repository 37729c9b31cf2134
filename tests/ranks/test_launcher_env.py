"""The rank of a process, from the variables that each launcher was seen to set."""

import pytest

from sae_train.ranks.launcher_env import ProcessInfo, job_id, tasks_per_node, this_process

SHELL = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "5",
         "SLURM_NTASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2(x2),1"}  # fmt: skip
"""Variables of an sbatch script's shell, which is no rank."""
STEP = {**SHELL, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SUBMITIT = {"SUBMITIT_LOCAL_JOB_ID": "7", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1",
            "SUBMITIT_LOCAL_LOCALID": "1"}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({}, ProcessInfo(0, 0, 1, 1, "")),
        (SHELL, ProcessInfo(0, 0, 1, 1, "")),
        (STEP, ProcessInfo(0, 0, 5, 2, "slurm")),
        (STEP | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}, ProcessInfo(3, 1, 5, 2, "slurm")),
        (STEP | {"SLURM_PROCID": "4", "SLURM_NODEID": "2"}, ProcessInfo(4, 0, 5, 1, "slurm")),
        (STEP | {"SUBMITIT_EXECUTOR": "slurm"}, ProcessInfo(0, 0, 5, 2, "slurm")),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, ProcessInfo(0, 0, 1, 1, "")),
        (SUBMITIT, ProcessInfo(1, 1, 2, 2, "submitit")),
        (TORCHRUN, ProcessInfo(3, 1, 4, 2, "torchrun")),
        (STEP | SUBMITIT | TORCHRUN, ProcessInfo(3, 1, 4, 2, "torchrun")),
        (STEP | SUBMITIT, ProcessInfo(1, 1, 2, 2, "submitit")),
    ],
)
def test_torchrun_then_submitit_then_slurm_then_alone(environment: dict[str, str], process: ProcessInfo) -> None:
    assert this_process(environment) == process


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("2(x3)", [2, 2, 2]), ("2(x2),1", [2, 2, 1]), ("1,3(x2),2", [1, 3, 3, 2])]
)
def test_tasks_of_each_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


def test_a_task_of_an_array_is_named_by_its_index() -> None:
    assert job_id({}) is None
    assert job_id({"SLURM_JOB_ID": "12"}) == "12"
    assert job_id({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"
