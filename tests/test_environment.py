import json
import subprocess

from inl_jax import environment as env
from inl_jax.environment import environment, record_environment, source_digest


def test_environment_says_what_ran_and_where(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SLURM_JWT", "secret")
    monkeypatch.setattr(env.sys, "orig_argv", ["python", "x.py", "--api_key", "abc", "--n", "a b"])
    found = json.loads(json.dumps(environment()))
    assert {"jax", "jaxlib", "flax", "numpy", "python", "inl_jax"} <= found["versions"].keys()
    assert found["command"] == "python x.py --api_key *** --n 'a b'"
    assert found["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8}
    assert found["processes"] == 1 and found["cpus"] > 0 and found["memory"] > 2**28
    assert found["variables"]["NCCL_DEBUG"] == "INFO" and "SLURM_JWT" not in found["variables"]


def test_source_digest_is_that_of_the_python_files_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(env.inl_jax, "__file__", str(tmp_path / "__init__.py"))
    empty = source_digest()
    (tmp_path / "notes.txt").write_text("not code")
    assert source_digest() == empty
    (tmp_path / "a.py").write_text("x = 1")
    changed = source_digest()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({empty, changed, source_digest()}) == 3


def test_git_state_is_the_one_of_the_checkout_itself(tmp_path):
    def git(*words):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *author, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert env._git_state(tmp_path) == {}
    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    assert env._git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("b")
    assert env._git_state(tmp_path)["dirty"]
    (tmp_path / "site-packages").mkdir()
    assert env._git_state(tmp_path / "site-packages") == {}


def test_git_state_is_left_out_if_there_is_no_git(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env._git_state(tmp_path) == {}


def test_record_environment_keeps_the_earlier_starts(tmp_path, monkeypatch):
    record_environment(tmp_path)
    monkeypatch.setattr(env.platform, "node", lambda: "another")
    record_environment(tmp_path)
    starts = json.loads((tmp_path / "env.json").read_text())["starts"]
    assert len(starts) == 2 and starts[0]["host"] != starts[1]["host"] == "another"
    assert [path.name for path in tmp_path.iterdir()] == ["env.json"]


def test_record_environment_never_ends_a_run(tmp_path, said):
    record_environment(tmp_path / "nowhere")
    (tmp_path / "env.json").write_text("torn")
    record_environment(tmp_path)
    assert len(said) == 2 and all("env.json was not written" in line for line in said)
