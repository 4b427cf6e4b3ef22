import pytest

from inl_jax.config import InputError
from inl_jax.parallel import launch
from inl_jax.parallel.launch import Launch, find_launch

JAX = {"JAX_COORDINATOR_ADDRESS": "host-0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TORCH = {"MASTER_ADDR": "host-0", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "RANK": "5"}
TORCHRUN = TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
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
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7",
}
AT = "node01:61517"  # of job 77, step 0


@pytest.fixture(autouse=True)
def device_files(monkeypatch, tmp_path):
    """An empty folder in place of /dev: only CUDA_VISIBLE_DEVICES counts."""
    monkeypatch.setattr(launch, "DEVICE_FILES", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (JAX, Launch("host-0:1234", 4, 3)),
        (JAX | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, Launch("host-0:1234", 4, 3, (2, 3))),
        (JAX | {"JAX_NUM_PROCESSES": "1"}, None),
        (JAX | SLURM, Launch("host-0:1234", 4, 3)),
        (TORCH, Launch("host-0:29501", 8, 5, (), "torchrun")),
        (TORCH | {"JAX_COORDINATOR_PORT": "9"}, Launch("host-0:9", 8, 5, (), "torchrun")),
        (TORCH | {"MASTER_ADDR": "fd00::1"}, Launch("[fd00::1]:29501", 8, 5, (), "torchrun")),
        (TORCHRUN, Launch("host-0:29501", 8, 5, (1,), "torchrun")),
        (TORCHRUN | SLURM, Launch("host-0:29501", 8, 5, (1,), "torchrun")),  # srun torchrun
        (TORCH | {"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "1"}, None),
        (SLURM, Launch(AT, 8, 5, (1,), "Slurm")),
        (SLURM | {"SLURM_STEP_ID": "1"}, Launch("node01:61768", 8, 5, (1,), "Slurm")),
        (SLURM | {"JAX_COORDINATOR_PORT": "7000"}, Launch("node01:7000", 8, 5, (1,), "Slurm")),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, Launch(AT, 8, 5, (), "Slurm")),
        (SLURM | {"MASTER_ADDR": "host-0"}, Launch(AT, 8, 5, (1,), "Slurm")),
        (SLURM | TORCH | {"WORLD_SIZE": "1", "RANK": "0"}, Launch(AT, 8, 5, (1,), "Slurm")),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"}, Launch("a:1", 8, 5, (1,))),
        (SLURM | {"PMI_SIZE": "8", "PMI_RANK": "5"}, Launch(AT, 8, 5, (1,), "Slurm")),  # mpi=pmi2
        (SLURM | {"PMIX_RANK": "5", "PMI_SIZE": ""}, Launch(AT, 8, 5, (1,), "Slurm")),  # mpi=pmix
        (SKYPILOT, Launch("10.0.0.4:8476", 2, 1, (), "SkyPilot")),
        (SKYPILOT | {"JAX_COORDINATOR_PORT": "9"}, Launch("10.0.0.4:9", 2, 1, (), "SkyPilot")),
        (SKYPILOT | TORCH, Launch("host-0:29501", 8, 5, (), "torchrun")),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, None),
        (SLURM_JOB, None),  # a batch script without srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # the shell of salloc, or srun -n 1
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, None),
        ({"PBS_NP": "8", "LSB_DJOB_NUMPROC": "8", "NHOSTS": "2", "AWS_BATCH_JOB_ID": "a"}, None),
        ({"PMI_SIZE": "1", "PMI_RANK": "0", "SM_HOSTS": '["algo-1"]', "TF_CONFIG": "{}"}, None),
    ],
)
def test_find_launch_reads_the_variables_of_the_innermost_launcher(env, expected):
    assert find_launch(env) == expected
    assert find_launch(env, num_processes=1) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("node[001,007-015],host2", "node001"),
        ("rack[2-3]n[04-05]", "rack2n04"),
        ("n1-[7-9]-ib,m2", "n1-7-ib"),
    ],
)
def test_process_0_of_slurm_is_on_the_first_host_of_the_step(nodes, first):
    assert find_launch(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{first}:61517"


MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "10.96.0.1:62624"),
        ("1531576320.0;tcp://10.96.0.1:34911", "10.96.0.1:62624"),
        ("1531576320.0;tcp6://[fd00::2,2620::2]:43370", "[fd00::2]:62624"),
    ],
)
def test_process_0_of_open_mpi_is_where_mpirun_runs(uri, expected):
    env = MPI | {"OMPI_MCA_orte_hnp_uri": uri}
    assert find_launch(env) == Launch(expected, 4, 3, (1,), "Open MPI")
    assert find_launch(env | SLURM) == find_launch(env)  # mpirun in a Slurm job
    assert find_launch(env | {"OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_find_launch_joins_the_job_that_kubeflow_made_for_jax():
    env = {"COORDINATOR_ADDRESS": "job-worker-0", "COORDINATOR_PORT": "6666"}
    env |= {"NUM_PROCESSES": "3", "PROCESS_ID": "2"}
    assert find_launch(env) == Launch("job-worker-0:6666", 3, 2, (), "Kubeflow JAXJob")
    with pytest.raises(InputError, match=r"NUM_PROCESSES=3, PROCESS_ID=2, .* without COORDINATOR_"):
        find_launch({k: v for k, v in env.items() if k != "COORDINATOR_ADDRESS"})


def test_find_launch_puts_flags_above_the_environment():
    flags = dict(coordinator="b:9", num_processes=2, process_id=1)
    for env in ({}, JAX, SLURM, {"RANK": "3"}, {"PMI_SIZE": "8"}):
        assert find_launch(env, **flags) == Launch("b:9", 2, 1)
    assert find_launch(JAX, process_id=0) == Launch("host-0:1234", 4, 0)


@pytest.mark.parametrize(
    ("env", "flags", "named"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, {}, "num_processes=4 without --coordinator or JAX_COORD"),
        ({}, {"process_id": 1}, "process_id=1 without .*--num_processes or JAX_NUM_PROCESSES"),
        ({}, {"coordinator": "a:1", "num_processes": 2}, "a:1, num_processes=2 without --process_"),
        ({"WORLD_SIZE": "8", "RANK": "5"}, {}, "WORLD_SIZE=8, RANK=5 .* without MASTER_ADDR, MAST"),
        ({"MASTER_ADDR": "host-0"}, {}, "_ADDR=host-0 .* without WORLD_SIZE, RANK, MASTER_PORT"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, "OMPI_COMM_WORLD_SIZE=2 .* without OMPI_COMM_WORLD_R"),
        (SLURM | {"SLURM_STEP_NODELIST": None}, {}, "JOB_ID=77.* without SLURM_STEP_NODELIST"),
        (JAX | {"JAX_PROCESS_ID": "4"}, {}, "process_id=4: must be less than num_processes=4"),
        (JAX | {"JAX_PROCESS_ID": "one"}, {}, "process_id=one: must be a whole number"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "host"}, {}, "coordinator=host: must be host:port"),
    ],
)
def test_find_launch_names_what_is_missing_or_impossible(env, flags, named):
    with pytest.raises(InputError, match=named):
        find_launch({k: v for k, v in env.items() if v is not None}, **flags)


CLUSTER = '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "chief"}}'


@pytest.mark.parametrize(
    ("env", "ranked"),
    [
        (MPI, True),  # of Open MPI 5, which does not say where mpirun runs
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, True),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"} | SLURM_JOB, True),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"} | SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "3"}, True),
        ({"JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_RANK": "3"}, True),
        ({"HOROVOD_SIZE": "4", "HOROVOD_RANK": "3"}, True),
        ({"FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "3"}, True),
        ({"PET_NNODES": "4", "PET_NODE_RANK": "3"}, True),
        ({"SKYPILOT_NUM_NODES": "4", "SKYPILOT_NODE_RANK": "3"}, True),
        ({"AWS_BATCH_JOB_NUM_NODES": "4", "AWS_BATCH_JOB_NODE_INDEX": "3"}, True),
        ({"NNODES": "4", "NODE_RANK": "3"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "3"}, True),
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "prterun-1"}, False),
        ({"PALS_RANKID": "0"}, False),
        ({"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "0"}, False),
        ({"SM_HOSTS": '["algo-1", "algo-2"]', "SM_CURRENT_HOST": "algo-1"}, False),
        ({"TF_CONFIG": CLUSTER}, False),
        ({"CLUSTER_SPEC": CLUSTER, "WORLD_SIZE": "1"}, False),
    ],
)
def test_find_launch_refuses_a_launcher_that_does_not_say_where_process_0_is(env, ranked):
    with pytest.raises(InputError) as refused:
        find_launch(env)
    assert "--num_processes 1 (or JAX_NUM_PROCESSES=1) to run a single" in str(refused.value)
    if ranked:  # what the line advises is enough
        assert "without --coordinator or JAX_COORDINATOR_ADDRESS: give it" in str(refused.value)
        assert find_launch(env, coordinator="a:1")[:3] == ("a:1", 4, 3)
    assert find_launch(env, num_processes=1) is None


@pytest.mark.parametrize(
    ("env", "tasks", "devices"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 4, [(0,), (1,), (2,), (3,)]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 1, [()]),
        ({"CUDA_VISIBLE_DEVICES": "6"}, 4, [()] * 4),  # one for each, by a wrapper script
        ({"CUDA_VISIBLE_DEVICES": ""}, 4, [()] * 4),
        ({"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 2, [(0,), (1,)]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2", "JAX_PLATFORMS": "cpu"}, 2, [(), ()]),
        ({}, 2, [(0,), (1,)]),
        # srun --gpus-per-task 4: each sees four others of the node's eight
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "8"}, 2, [(), ()]),
    ],
)
def test_processes_of_a_host_share_its_visible_gpus_evenly(env, tasks, devices):
    env |= SLURM | {"SLURM_STEP_NUM_TASKS": str(2 * tasks)}
    env |= {"SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)", "SLURM_NODEID": "1"}
    found = [
        find_launch(env | {"SLURM_PROCID": str(tasks + i), "SLURM_LOCALID": str(i)}).devices
        for i in range(tasks)
    ]
    assert found == devices


def test_gpus_of_the_machine_count_if_no_variable_chooses_them(device_files):
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{i}" for i in range(8))):
        (device_files / name).touch()
    assert find_launch(TORCHRUN).devices == (2, 3)


def test_gpus_that_do_not_divide_are_refused_with_both_numbers():
    env = TORCHRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "LOCAL_WORLD_SIZE": "3"}
    with pytest.raises(InputError, match=r"3 processes .* 8 GPUs .* start 1, 2, 4 or 8 on a host"):
        find_launch(env)
    assert find_launch(env | {"JAX_LOCAL_DEVICE_IDS": "6,7"}).devices == (6, 7)
