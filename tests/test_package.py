import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest

import inl_jax

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of commands of a clean environment with the wheel of this project."""
    pytest.importorskip("hatchling", reason="the dev extra is not installed")
    folder = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    bin_dir = folder / "venv" / "bin"
    install = ["--python", bin_dir / "python", "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True)
    # The dependencies are those of the environment of the tests. A .pth file found through a .pth
    # file is not read, so an editable inl_jax of that environment stays out of sight.
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return bin_dir


def run(*command):
    """Runs a command at / with nothing of this repository on the path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        command,
        cwd="/",
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
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
    assert code == 0 and "1,387,776 parameters" in out, err


@pytest.mark.slow
def test_source_distribution_holds_configs_docs_tests_and_license(tmp_path):
    pytest.importorskip("hatchling", reason="the dev extra is not installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        files = {name.partition("/")[2] for name in tar.getnames()}
    assert {"LICENSE", "README.md", "configs/3b.py", "docs/memory.md", "scripts/train.py"} <= files
    assert {"tests/conftest.py", "inl_jax/cli/main.py", "train_inl_llm_large.py"} <= files
    assert not any("__pycache__" in name for name in files)


def test_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "inl_jax/__init__.py"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_demo_does_not_install_what_only_the_tests_need():
    plan = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert ".[plot]" in plan and ".[dev]" not in plan and "scripts/generate.py" in plan
