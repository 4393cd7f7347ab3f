"""Ranks: torchrun's variables, those of Slurm and MPI, and what is refused because processes could not meet.

pytest tests/unit/test_launcher.py
"""

import socket

import pytest
import torch

import main
from utils.distributed import init_distributed
from utils.errors import ConfigError
from utils.launcher import first_node, set_ranks

RANKS = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_NODELIST": "gpu[003-004,9]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-1@1",
}
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (without(RANKS, "RANK"), "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "0"}, "RANK is 0, but WORLD_SIZE is not set"),
        (without(RANKS, "MASTER_ADDR"), "MASTER_ADDR is not set"),
        (RANKS | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        (without(RANKS, "MASTER_PORT"), "MASTER_PORT is not set"),
        (RANKS | {"MASTER_PORT": "0"}, "a port from 1 to 65535"),
        (RANKS | {"MASTER_PORT": "70000"}, "a port from 1 to 65535"),
        (
            RANKS | {"RANK": "x"},
            "RANK is 'x', expected a number. Start the processes with torchrun",
        ),
        (RANKS | {"RANK": "-1"}, "RANK is '-1'"),
        (RANKS | {"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        (RANKS | {"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        (RANKS | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        (RANKS | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2"),
        (without(SLURM, "SLURM_STEP_NODELIST"), "sbatch tools/slurm.sh"),
        (without(SLURM, "SLURM_LOCALID"), "10 processes without SLURM_LOCALID"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "2 processes without SLURM_LOCALID and"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK"), "torchrun instead"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "-x MASTER_ADDR=HOST"),
        (without(MPICH, "MPI_LOCALRANKID"), "without MPI_LOCALRANKID"),
    ],
)
def test_processes_that_could_not_meet_are_refused(env, words):
    with pytest.raises(ConfigError) as error:
        set_ranks(dict(env))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"WORLD_SIZE": "1"},
        RANKS,
        # A batch script, and a shell that salloc opened: one process, which is not srun's.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"},
        {"SLURM_NTASKS": "8"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        SLURM | RANKS,  # torchrun inside of a job
    ],
)
def test_complete_variables_stay_as_they_are(env):
    seen = dict(env)
    set_ranks(seen)
    assert seen == env


def test_a_step_of_slurm_is_a_run():
    env = dict(SLURM)
    set_ranks(env)
    assert without(env, *SLURM) == {
        **{"RANK": "5", "WORLD_SIZE": "10", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        **{"MASTER_ADDR": "gpu003", "MASTER_PORT": "20009"},
    }
    env = SLURM | {"MASTER_ADDR": "other", "MASTER_PORT": "1234"}
    set_ranks(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("other", "1234")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[7]", "n7"),
        ("n[01-04,9],m1", "n01"),
        ("r[1-2]-ib", "r1-ib"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


def test_processes_of_mpirun_on_one_machine_are_a_run():
    ports = set()
    for rank in ("0", "1"):
        env = OPEN_MPI | {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        set_ranks(env)
        assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == (rank, "2", rank)
        ports.add((env["MASTER_ADDR"], env["MASTER_PORT"]))
    assert len(ports) == 1  # where they meet
    env = dict(MPICH)
    set_ranks(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("0", "2", "2")
    env = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    set_ranks(env)
    assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("4", "2")


def test_a_port_that_another_program_has_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        place = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in (RANKS | place).items():
            monkeypatch.setenv(name, value)
        words = (
            rf"cannot meet at 127\.0\.0\.1:{port}\. That port is in use: set another MASTER_PORT"
        )
        threads = torch.get_num_threads()
        with (
            pytest.raises(ConfigError, match=words),
            init_distributed("cpu", threads, timeout=20),
        ):
            pass


def test_main_says_it_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "x")
    assert main.main(["--cfg", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: RANK is 'x'")
