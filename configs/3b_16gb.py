"""3b_16gb: 1,698,414,592 parameters (1.70B), the 3b on one GPU of 16 GB.

    export XLA_PYTHON_CLIENT_MEM_FRACTION=.95
    inl train --config 3b_16gb --data.paths YOUR_TEXT --run_dir runs/3b_16gb

Recipe     The 3b, with three changes. Masters and moments live in host memory and pass through the
           device one layer at a time. The mean over micro-batches is kept in bfloat16, rounded
           stochastically. The integrator keeps two segments and works on half a sequence at a time.
           On 16 GB that is 64 micro-batches of one sequence, remat block; on more, as it is chosen.
Shape      As the 3b: D 2048, 40 layers x 15 iterations, F 8192, sequences of up to 4096 tokens.
Hardware   One CUDA GPU of 16 GB; 24 GB of free host memory, of which 20.4 GB stay pinned.
Memory     12.6 GiB and 19.0 GiB of host memory, estimated. XLA's CUDA compiler says 12.7 GiB and
           19.0 GiB: inl estimate --config 3b_16gb --device rtx4060ti-16gb --compile cuda.
           No GPU was at hand to see it.
           docs/memory.md compares this recipe with recipes that need less.
Time       Not measured yet. Each update moves 41 GB over PCIe, which takes 1.6 s at 25 GB/s, and
           computes on 262,144 tokens, which takes about 100 s at an assumed 40 TFLOP/s.
Loss       Not measured yet.
"""

from pathlib import Path

from inl_jax.config import with_fields
from inl_jax.config_file import load_config

config = with_fields(
    load_config(Path(__file__).with_name("3b.py")),
    {
        "name": "3b_16gb",
        "model.integrator_segment": 8,
        "model.integrator_chunk": 2048,
        "optim.state_memory": "pinned_host",
        "optim.accumulator_dtype": "bfloat16",
        "run_dir": "runs/3b_16gb",
    },
)
