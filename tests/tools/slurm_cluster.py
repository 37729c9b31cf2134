"""A real SLURM on this machine: one controller and two nodes with their own ports, for as long as a test session.

Started by root from Debian's `slurm-wlm` and `munge`; what is lacking is a reason to skip. No accounting, as on many a
small cluster: what is known of a job is what `squeue` and `scontrol` say and what the program itself writes down.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("n1", "n2")
CPUS = 8
"""Of each node, as SLURM believes: more than there are, so that jobs do not wait for each other."""
SETTLES_WITHIN = 10.0
"""Seconds until nothing of a requeued job is left on its nodes; started before, it is given its old script's status."""

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=5
MinJobAge=600
SlurmdTimeout=60
"""


def reason_to_skip() -> str | None:
    """Return the reason why no cluster can run here, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "a SLURM cluster of one's own needs root"
    lacking = [name for name in NEEDED if _found(name) is None]
    return f"SLURM is not installed (apt-get install slurm-wlm munge): no {', '.join(lacking)}" if lacking else None


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """The daemons, and what tests ask of them.

    Args:
        folder: where keys, states and logs lie; a short path, for the sockets in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def start(self) -> None:
        """Start everything and return when both nodes are idle."""
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        ports = free_ports(1 + len(NODES))
        text = CONFIGURATION.format(folder=self.folder, port=ports[0])
        for name, port in zip(NODES, ports[1:], strict=True):
            (self.folder / f"spool.{name}").mkdir()
            text += f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} State=UNKNOWN\n"
        text += f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP\n"
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        self._spawn("munged", "--foreground", "--force", *files)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged made no socket")
        self._spawn("slurmctld", "-D")
        for name in NODES:
            self._spawn("slurmd", "-D", "-N", name)
        self._until(self._both_idle, "the nodes did not come up")

    def stop(self) -> None:
        """End all jobs and daemons."""
        if (self.folder / "slurmctld.pid").exists():
            self.ask("scancel", "--user=root", check=False)
            self._until(lambda: not self.ask("squeue", "--noheader", check=False), "jobs did not end", fail=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str, check: bool = True) -> str:
        """Return the output of a SLURM command."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False, timeout=60
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """Submit with `sbatch ARGUMENTS` and return the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            cwd=cwd,
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`, of an array those of the last task."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def queued(self, job: str) -> list[str]:
        """Return the states of a job's tasks that have not ended."""
        return self.ask("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%T", check=False).split()

    def wait(self, job: str, *, seconds: float = 300, hurry: bool = True) -> dict[str, str]:
        """Return the facts of a job once it has ended; `hurry`: requeued, it starts soon instead of in two minutes."""
        back: dict[str, float] = {}

        def ended() -> bool:
            states = self.queued(job)
            if hurry and "PENDING" in states:
                times = self.facts(job).get("Restarts", "0")
                if times != "0" and time.monotonic() - back.setdefault(times, time.monotonic()) > SETTLES_WITHIN:
                    self.ask("scontrol", "update", f"jobid={job}", "starttime=now", check=False)
            return not states

        self._until(ended, f"job {job} did not end", seconds=seconds)
        return self.facts(job)

    def wait_for(self, met: Callable[[], object], what: str, *, seconds: float = 120) -> None:
        """Return once `met()`; fail with `what` if it is not in time."""
        self._until(lambda: bool(met()), what, seconds=seconds)

    def _both_idle(self) -> bool:
        states = self.ask("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return states == ["idle"] * len(NODES)

    def _spawn(self, name: str, *arguments: str) -> None:
        program = _found(name)
        assert program is not None
        with (self.folder / f"{name}.out").open("ab") as said:
            daemon = subprocess.Popen(
                [program, *arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _until(self, met: Callable[[], bool], problem: str, *, seconds: float = 60, fail: bool = True) -> None:
        end = time.monotonic() + seconds
        while not met():
            if time.monotonic() > end:
                if fail:
                    raise AssertionError(f"{problem} within {seconds:.0f} s; {self._last_words()}")
                return
            time.sleep(0.2)

    def _last_words(self) -> str:
        logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "; ".join(f"{log.name}: {log.read_text(errors='replace')[-600:]}" for log in sorted(logs))


def free_ports(n: int) -> list[int]:
    """Return ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
