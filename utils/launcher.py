"""Launchers: ranks and addresses from the variables of torchrun, Slurm (srun), Open MPI and MPICH (mpirun).

Imports no torch. Variables that are missing or absurd are a ConfigError, before anything else happens.
"""

import os
import re
import zlib
from collections.abc import MutableMapping

from utils.errors import ConfigError

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
REMEDY = "Start the processes with torchrun, which sets it, or unset it to run one process."
# Rank, number of processes, the same on this node; Open MPI's names and those of MPICH and Intel MPI.
MPI = {
    "OMPI_COMM_WORLD_RANK": (
        *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    "PMI_RANK": ("PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")  # one of them names the job
FIRST_PORT, PORTS = 20_000, 20_000


def set_ranks(env: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables from those of another launcher, where there is one, and check them all.

    Raises ConfigError for processes that could not meet: each would take itself for the only one.
    """
    if not {"RANK", "WORLD_SIZE"} & env.keys():
        env.update(_slurm(env) or _mpi(env))
    numbers = {name: _number(name, env[name]) for name in NUMBERS if name in env}
    size = numbers.get("WORLD_SIZE", 1)
    for name in ("RANK", "WORLD_SIZE"):
        other = "WORLD_SIZE" if name == "RANK" else "RANK"
        if other in numbers and name not in numbers and (name == "WORLD_SIZE" or size != 1):
            raise ConfigError(f"{other} is {numbers[other]}, but {name} is not set. {REMEDY}")
    for name, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if name in numbers and of in numbers and numbers[name] >= numbers[of]:
            raise ConfigError(
                f"{name} is {numbers[name]}, but {of} is {numbers[of]}: ranks count from 0. {REMEDY}"
            )
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not env.get(name):
                raise ConfigError(f"WORLD_SIZE is {size}, but {name} is not set. {REMEDY}")
        if not 0 < _number("MASTER_PORT", env["MASTER_PORT"]) < 2**16:
            raise ConfigError(
                f"MASTER_PORT is {env['MASTER_PORT']}, expected a port from 1 to 65535."
            )


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or (name.endswith("SIZE") and int(text) == 0):
        raise ConfigError(f"{name} is {text!r}, expected a number. {REMEDY}")
    return int(text)


def _slurm(env: MutableMapping[str, str]) -> dict[str, str]:
    """torchrun's variables of a process that srun started beside others; empty for other processes."""
    in_step = "SLURM_STEP_ID" in env or env.get("SLURM_PROCID", "0") != "0"
    size = env.get("SLURM_STEP_NUM_TASKS") or (env.get("SLURM_NTASKS", "1") if in_step else "1")
    if size == "1":
        return {}
    needed = ["SLURM_PROCID", "SLURM_LOCALID"]
    needed += [] if "MASTER_ADDR" in env else ["SLURM_STEP_NODELIST"]
    if missing := [name for name in needed if not env.get(name)]:
        raise ConfigError(
            f"Slurm started {size} processes without {' and '.join(missing)}. Start the run with "
            "sbatch tools/slurm.sh, or the processes of each node with torchrun."
        )
    job, step = (int(env.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    found = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_node(env["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": env.get("MASTER_PORT") or str(FIRST_PORT + (job + step) % PORTS),
    }
    tasks = _expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = env.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(tasks):
        found["LOCAL_WORLD_SIZE"] = str(tasks[int(node)])
    return found


def first_node(nodes: str) -> str:
    """The first host of Slurm's list, such as gpu[003-007,9]-ib,login1."""
    prefix, first, rest = re.match(
        r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,\[]*)", nodes.strip()
    ).groups()
    return f"{prefix}{first or ''}{rest}"


def _expand_counts(text: str) -> list[int]:
    """Slurm's tasks of each node: 8(x2),4 are 8, 8 and 4."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]


def _mpi(env: MutableMapping[str, str]) -> dict[str, str]:
    """torchrun's variables of a process that mpirun started beside others; empty for other processes."""
    for rank, (size, local_rank, local_size) in MPI.items():
        if env.get(size, "1") == "1":
            continue
        if missing := [name for name in (rank, local_rank, local_size) if not env.get(name)]:
            raise ConfigError(
                f"mpirun started {env[size]} processes without {' and '.join(missing)}. Start the run with "
                "torchrun instead, or with sbatch tools/slurm.sh."
            )
        if env[local_size] != env[size] and not (env.get("MASTER_ADDR") and env.get("MASTER_PORT")):
            raise ConfigError(
                f"mpirun started {env[size]} processes on several nodes: name the first node to all of them, with "
                "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500, or start the processes of each node with torchrun."
            )
        job = next((env[name] for name in MPI_JOBS if name in env), "")
        return {
            "RANK": env[rank],
            "WORLD_SIZE": env[size],
            "LOCAL_RANK": env[local_rank],
            "LOCAL_WORLD_SIZE": env[local_size],
            "MASTER_ADDR": env.get("MASTER_ADDR") or "127.0.0.1",
            "MASTER_PORT": env.get("MASTER_PORT")
            or str(FIRST_PORT + zlib.crc32(job.encode()) % PORTS),
        }
    return {}
