import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

import inl_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def make_wheel(source, folder):
    """Builds the wheel of a source folder or archive in `folder`."""
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([*PIP, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def pip_install(folder, *args):
    """Installs into a clean environment in `folder`, without its own pip; returns its commands."""
    venv.create(folder, with_pip=False)
    subprocess.run([*PIP, "--python", folder / "bin" / "python", "install", *args], check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="the dev extra is not installed")
    return make_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of commands of a clean environment with the wheel of this project."""
    bin_dir = pip_install(
        tmp_path_factory.mktemp("package") / "venv", "--no-deps", "--no-index", wheel
    )
    # The dependencies are those of the environment of the tests. A .pth file found through a .pth
    # file is not read, so an editable inl_jax of that environment stays out of sight.
    (site,) = bin_dir.parent.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return bin_dir


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    pytest.importorskip("hatchling", reason="the dev extra is not installed")
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def run(*command, at="/"):
    """Runs a command in the folder `at`, with nothing of this repository on the path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        command,
        cwd=at,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,  # on a busy machine too
    )
    return done.returncode, done.stdout, done.stderr


def test_wheel_works_in_a_clean_environment_outside_the_repository(installed):
    where = "import inl_jax; print(inl_jax.__file__)"
    assert str(installed.parent) in run(installed / "python", "-c", where)[1]
    assert run(installed / "inl", "--version") == (0, f"inl_jax {inl_jax.__version__}\n", "")
    code, listed, err = run(installed / "inl")
    assert code == 2 and "\n  3b_16gb  1,698,414,592 parameters (1.70B)" in listed, err
    assert run(installed / "python", "-m", "inl_jax") == (2, listed, "")


def test_wheel_has_the_script_of_the_guide(installed):
    code, out, err = run(installed / "python", "-m", "train_inl_llm_large")
    assert code == 2 and out == "" and "write python3 train_inl_llm_large.py --size " in err


@pytest.mark.slow
def test_wheel_has_the_function_of_the_guide(installed):
    lines = "from train_inl_llm_large import train_inl_llm as f; import inl_jax; "
    lines += "print(f is inl_jax.train_inl_llm, inl_jax.__file__)"
    code, out, err = run(installed / "python", "-c", lines)
    assert code == 0 and out.startswith(f"True {installed.parent}"), err


@pytest.mark.slow
def test_wheel_plans_a_run_with_the_config_that_it_brings(installed):
    code, out, err = run(installed / "inl", "train", "--config", "tiny", "--dry_run")
    assert code == 0 and "1,124,736 parameters" in out, err


def test_wheel_holds_every_file_of_the_package(wheel):
    files = [path for path in (ROOT / "inl_jax").rglob("*") if path.is_file()]
    kept = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    kept |= {f"inl_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert kept == {name for name in ZipFile(wheel).namelist() if name.startswith("inl_jax/")}


@pytest.mark.slow
def test_source_distribution_holds_configs_docs_tests_and_license(sdist):
    with tarfile.open(sdist) as tar:
        files = {name.partition("/")[2] for name in tar.getnames()}
    assert {"LICENSE", "README.md", "configs/3b.py", "docs/memory.md", "scripts/train.py"} <= files
    assert {"tests/conftest.py", "inl_jax/cli/main.py", "train_inl_llm_large.py"} <= files
    assert {"Dockerfile", ".dockerignore", "Makefile"} <= files
    assert not any("__pycache__" in name for name in files)


@pytest.mark.slow
def test_source_distribution_makes_the_same_wheel(wheel, sdist, tmp_path):
    def contents(path):
        with ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    assert contents(make_wheel(sdist, tmp_path)) == contents(wheel)


@pytest.mark.slow
def test_inl_trains_with_its_dependencies_alone(sdist, tmp_path):
    """From the source distribution, with nothing but what a package index gives."""
    inl = pip_install(tmp_path / "venv", sdist) / "inl"
    flags = (
        "--num_steps 3 --optim.warmup_steps 1 --batch_size 2 --data.seq_len 64 --eval_sequences 2"
    )
    text = ["--data.tokenizer", "bytes", "--data.paths", ROOT / "README.md"]
    tiny = [inl, "train", "--config", "tiny", *flags.split(), *text]
    code, out, err = run(*tiny, "--run_dir", tmp_path / "run", at=tmp_path)
    assert code == 0 and "complete: update 3" in out + err, err
    assert run(inl, "evaluate", tmp_path / "run")[0] == 0
    code, out, err = run(
        inl, "generate", tmp_path / "run", "--prompt", "a", "--max_new_tokens", "4"
    )
    assert code == 0, err
    for verb, extra in (("plot", "plot"), ("report", "report")):
        code, out, err = run(inl, verb, tmp_path / "run")
        assert code == 2 and f"pip install 'inl_jax[{extra}]'" in err, (out, err)


def test_version_is_written_once():
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "inl_jax/__init__.py"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_demo_does_not_install_what_only_the_tests_need():
    plan = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert ".[plot]" in plan and ".[dev]" not in plan and "scripts/generate.py" in plan


@pytest.fixture(scope="module")
def dockerfile():
    """Its instructions in order: [("FROM", "python:3.12-slim"), ...]."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def test_image_is_of_a_python_of_this_project_and_runs_as_no_root(dockerfile):
    found = dict(dockerfile)
    (version,) = re.findall(r"^python:(3\.\d+)-slim$", found["FROM"])
    assert f"Programming Language :: Python :: {version}" in PROJECT["project"]["classifiers"]
    extras = found["ARG"].removeprefix("EXTRAS=").split(",")
    assert set(extras) < PROJECT["project"]["optional-dependencies"].keys()
    assert int(found["USER"]) > 0 and json.loads(found["ENTRYPOINT"]) == ["inl"]


@pytest.mark.slow
def test_steps_of_the_dockerfile_install_inl(dockerfile, tmp_path):
    """In a clean environment and a folder in place of the image's, on this machine's Python."""
    pytest.importorskip("hatchling", reason="the dev extra is not installed")
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    venv.create(tmp_path / "venv", with_pip=True)
    commands = tmp_path / "venv" / "bin"
    env = {"PATH": f"{commands}:{os.environ['PATH']}", "EXTRAS": "gpu", "HOME": str(tmp_path)}
    for word, rest in dockerfile:
        if word == "WORKDIR":
            here = tmp_path / rest.strip("/")
            here.mkdir(exist_ok=True)
        elif word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert f"!{source.split('/')[0]}" in sent, f".dockerignore leaves out {source}"
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, here / target, dirs_exist_ok=True)
                else:
                    (here / target).mkdir(exist_ok=True)
                    shutil.copy(ROOT / source, here / target)
        elif word == "RUN" and "useradd" not in rest:
            subprocess.run(["bash", "-ec", rest], cwd=here, env=env, check=True)
    assert run(commands / "inl", "--version")[1] == f"inl_jax {inl_jax.__version__}\n"
    code, listed, err = run(commands / "inl")
    assert code == 2 and "\n  3b_16gb  1,698,414,592 parameters (1.70B)" in listed, err
    where = "import inl_jax, pynvml; print(inl_jax.__file__)"
    assert str(commands.parent) in run(commands / "python", "-c", where)[1]
