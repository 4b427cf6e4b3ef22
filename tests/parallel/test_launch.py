import pytest

from inl_jax.config import InputError
from inl_jax.parallel.launch import Launch, find_launch

JAX = {"JAX_COORDINATOR_ADDRESS": "host-0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TORCH = {"MASTER_ADDR": "host-0", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "RANK": "5"}
TORCHRUN = TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
SLURM_JOB = {  # set in every job, even if srun starts nothing
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SLURM = SLURM_JOB | {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (JAX, Launch("host-0:1234", 4, 3)),
        (JAX | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, Launch("host-0:1234", 4, 3, (2, 3))),
        (JAX | {"JAX_NUM_PROCESSES": "1"}, None),
        (JAX | SLURM, Launch("host-0:1234", 4, 3)),
        (TORCH, Launch("host-0:29501", 8, 5)),
        (TORCHRUN, Launch("host-0:29501", 8, 5, (1,))),
        (TORCHRUN | {"CUDA_VISIBLE_DEVICES": "6"}, Launch("host-0:29501", 8, 5)),
        (TORCHRUN | {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, Launch("host-0:29501", 8, 5, (1,))),
        (TORCHRUN | SLURM, Launch("host-0:29501", 8, 5, (1,))),  # srun torchrun
        (TORCH | {"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "1"}, None),
        (MPI, Launch("", 4, 3, (1,), "ompi")),
        (MPI | SLURM, Launch("", 4, 3, (1,), "ompi")),  # mpirun in a Slurm job
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (SLURM, Launch("", 8, 5, (1,), "slurm")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, Launch("", 8, 5, (), "slurm")),
        (SLURM | {"SLURM_STEP_NUM_NODES": "8"}, Launch("", 8, 5, (), "slurm")),  # a task per node
        (SLURM | {"MASTER_ADDR": "host-0"}, Launch("", 8, 5, (1,), "slurm")),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"}, Launch("a:1", 8, 5, (1,))),
        (SLURM_JOB, None),  # a batch script without srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # the shell of salloc, or srun -n 1
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, None),
    ],
)
def test_find_launch_reads_the_variables_of_the_innermost_launcher(env, expected):
    assert find_launch(env) == expected
    assert find_launch(env, num_processes=1) is None


def test_find_launch_puts_flags_above_the_environment():
    flags = dict(coordinator="b:9", num_processes=2, process_id=1)
    for env in ({}, JAX, SLURM, {"RANK": "3"}):
        assert find_launch(env, **flags) == Launch("b:9", 2, 1)
    assert find_launch(JAX, process_id=0) == Launch("host-0:1234", 4, 0)


@pytest.mark.parametrize(
    ("env", "flags", "named"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, {}, "num_processes=4 without --coordinator or JAX_COORD"),
        ({}, {"process_id": 1}, "process_id=1 without .*--num_processes or JAX_NUM_PROCESSES"),
        ({}, {"coordinator": "a:1", "num_processes": 2}, "a:1, num_processes=2 without --process_"),
        ({"WORLD_SIZE": "8", "RANK": "5"}, {}, "WORLD_SIZE=8, RANK=5 without MASTER_ADDR, MASTER"),
        ({"MASTER_ADDR": "host-0"}, {}, "_ADDR=host-0 without MASTER_PORT, WORLD_SIZE, RANK"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, "OMPI_COMM_WORLD_SIZE=2 without OMPI_COMM_WORLD_RANK"),
        (MPI | {"OMPI_MCA_orte_hnp_uri": None}, {}, "without --coordinator or JAX_COORDINATOR"),
        (SLURM | {"SLURM_STEP_NODELIST": None}, {}, "JOB_ID=77.* without SLURM_STEP_NODELIST"),
        (JAX | {"JAX_PROCESS_ID": "4"}, {}, "process_id=4: must be less than num_processes=4"),
        (JAX | {"JAX_PROCESS_ID": "one"}, {}, "process_id=one: must be a whole number"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "host"}, {}, "coordinator=host: must be host:port"),
    ],
)
def test_find_launch_names_what_is_missing_or_impossible(env, flags, named):
    with pytest.raises(InputError, match=named):
        find_launch({k: v for k, v in env.items() if v is not None}, **flags)
