import atexit
import dataclasses
import fcntl
import math
import os
import shutil
import tempfile
from pathlib import Path

# Tests spend their time compiling: one cache for the run, its workers and what they start.
_IN_A_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _IN_A_WORKER:
    _cache = tempfile.mkdtemp(prefix="inl_jax_xla_")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# Halves the compile time; JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # before any other use of JAX

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from inl_jax import trainer  # noqa: E402
from inl_jax.cli.main import run as run_inl  # noqa: E402
from inl_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig  # noqa: E402
from inl_jax.data.corpus import prepare  # noqa: E402
from inl_jax.parallel.sharding import make_mesh  # noqa: E402
from inl_jax.report.run import Run  # noqa: E402
from inl_jax.training import step  # noqa: E402

MODEL = {
    "vocab_size": 300,
    "d_model": 16,
    "num_layers": 2,
    "context": "decay",
    "num_iterations": 3,
    "d_ff": 32,
    "max_seq_len": 32,
    "controller_width": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "remat": "none",
}


# What a training step does not depend on.
NOT_COMPILED = """name run_dir init_from num_steps num_epochs log_every eval_every eval_sequences
save_every keep_last patience sample_every sample_prompts sample_tokens max_nonfinite_steps
stall_limit""".split()


@pytest.fixture(scope="session", autouse=True)
def _step_compiled_once():
    """Runs with the same training step share the compiled program."""
    programs, compile_step = {}, trainer.compile_step

    def compile_once(config, mesh, layout):
        fields = dataclasses.asdict(config)
        seq_len = fields.pop("data")["seq_len"]
        fields = {name: value for name, value in fields.items() if name not in NOT_COMPILED}
        key = step.loss_fn, mesh, seq_len, repr(fields)
        if key not in programs:
            programs[key] = compile_step(config, mesh, layout)
        return programs[key]

    trainer.compile_step = compile_once
    yield
    trainer.compile_step = compile_step


def assert_same(a, b):
    """Equal bits and types, leaf by leaf."""

    def check(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(check, a, b)


def mesh_of(data=1, fsdp=1, tensor=1):
    """A mesh of virtual CPU devices."""
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


@pytest.fixture
def said(monkeypatch):
    """The lines said so far, in order."""
    lines = []
    monkeypatch.setattr("inl_jax.console.tqdm.write", lambda line, **_: lines.append(line))
    return lines


@pytest.fixture
def tell(capsys):
    """Prints a line past pytest: a figure that docs/reliability.md quotes."""

    def tell(line):
        with capsys.disabled():
            print(f"\n{line}", flush=True)

    return tell


@pytest.fixture
def model_config():
    """Makes a narrow model: `model_config(context="mean", num_layers=4)`."""
    return lambda **fields: ModelConfig(**(MODEL | fields))


@pytest.fixture
def text_file(tmp_path):
    """About 40 kB of varied text in one file."""
    path = tmp_path / "text.txt"
    words = ("the quick brown fox jumps over the lazy dog while seven wizards brew potions").split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 12)) for i in range(700)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def train_config(tmp_path, text_file):
    """Makes a run of seconds on bytes of `text_file`; takes fields by section."""

    def make(*, model=(), data=(), optim=(), **fields):
        return TrainConfig(
            model=ModelConfig(**(MODEL | dict(model))),
            data=DataConfig(
                **{
                    "paths": (str(text_file),),
                    "tokenizer": "bytes",
                    "seq_len": 32,
                    "validation_fraction": 0.1,
                    "cache_dir": str(tmp_path / "cache"),
                }
                | dict(data)
            ),
            optim=OptimConfig(**{"learning_rate": 1e-2, "warmup_steps": 2} | dict(optim)),
            **{
                "mesh": MeshConfig(data=1),
                "run_dir": str(tmp_path / "run"),
                "num_steps": 8,
                "batch_size": 8,
                "log_every": 1,
                "eval_every": 4,
                "eval_sequences": 16,
                "save_every": 4,
            }
            | fields,
        )

    return make


@pytest.fixture
def make_corpus(tmp_path):
    """Prepares `paths`, by default as bytes, half held out, with a cache in `tmp_path`."""

    def make(*paths, using=None, **fields):
        defaults = {"tokenizer": "bytes", "validation_fraction": 0.5}
        data = DataConfig(
            paths=tuple(map(str, paths)), cache_dir=str(tmp_path / "cache"), **defaults | fields
        )
        return prepare(data, tokenizer=using)

    return make


@pytest.fixture
def inl(capsys):
    """Runs `inl` with a command line in this process; returns (exit code, stdout, stderr)."""

    def run(*argv):
        capsys.readouterr()
        try:
            code = run_inl([str(word) for word in argv])
        except SystemExit as stop:  # --help
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


TINY_RUN = """
from inl_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
config = TrainConfig(
    model=ModelConfig(vocab_size=300, d_model=16, num_layers=2, num_iterations=3, d_ff=32,
                      max_seq_len=32, controller_width=8, num_heads=2, num_kv_heads=1,
                      context="decay", remat="none"),
    data=DataConfig(paths=({text!r},), tokenizer="bytes", seq_len=32, validation_fraction=0.1,
                    cache_dir={cache!r}),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
    mesh=MeshConfig(data=1),
    run_dir={run_dir!r},
    num_steps=4, batch_size=8, log_every=1, eval_every=4, eval_sequences=16, save_every=4,
)
"""


def write_tiny_run(folder):
    """Writes a text and the config file of a run of seconds on it; returns that and its run_dir."""
    words = "the quick brown fox jumps over the lazy dog while seven wizards brew potions".split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 12)) for i in range(700)]
    (folder / "text.txt").write_text("\n".join(lines))
    config = folder / "config.py"
    config.write_text(
        TINY_RUN.format(
            text=str(folder / "text.txt"), cache=str(folder / "cache"), run_dir=str(folder / "run")
        )
    )
    return config, folder / "run"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A config file of a run of seconds, and its run directory, which nobody has trained."""
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """As `tiny_run`, trained by `inl train`: once for all workers, so no test may change it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if _IN_A_WORKER else base) / "trained"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder / "config.py", folder / "run"
        folder.mkdir()
        config, run_dir = write_tiny_run(folder)
        assert run_inl(["train", "--config", str(config)]) == 0
        return config, run_dir


@pytest.fixture
def make_run():
    """Makes a run of records: `make_run("b", updates=50, records=[...], environment={...})`."""

    def make(name="a", *, updates=20, records=(), config=(), environment=(), best=()):
        def update(step):
            loss = 3 + 5 / step
            return {
                "step": step,
                "num_steps": updates,
                "loss": loss,
                "perplexity": math.exp(loss),
                "learning_rate": 1e-3,
                "grad_norm": 1 / step,
                "seconds_per_step": 0.5,
                "tokens_per_second": 1000.0,
                "input_wait": 0.0,
                "seconds_left": 0.5 * (updates - step),
                "samples_seen": 4 * step,
                "skipped": 0,
            }

        every = [update(step) for step in range(1, updates + 1)] + list(records)
        return Run(
            name,
            Path(name),
            sorted(every, key=lambda record: record["step"]),
            {"data": {"seq_len": 128}} | dict(config),
            dict(environment),
            dict(best),
        )

    return make


@pytest.fixture
def evaluation():
    """Makes the record of an evaluation: `evaluation(10, 4.0)`."""

    def make(step, loss, **fields):
        return {
            "step": step,
            "num_steps": 20,
            "validation_loss": loss,
            "validation_perplexity": math.exp(loss),
            "validation_bits_per_byte": loss / math.log(2) / 4,
            "validation_tokens": 1000,
        } | fields

    return make


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium; skips where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="make browser installs playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if path is None:
        pytest.skip("there is no Chromium: make browser installs it")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(chromium, tmp_path):
    """Shows a page at a width; returns the tab, its console's errors, and what it asked to load."""

    def show(text, width):
        path = tmp_path / "page.html"
        path.write_text(text)
        tab = chromium.new_page(viewport={"width": width, "height": 900})
        errors, loaded = [], []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda line: line.type == "error" and errors.append(line.text))
        tab.on("request", lambda request: loaded.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector("html[data-drawn]")
        return tab, errors, [url for url in loaded if not url.startswith(("file:", "data:"))]

    return show
