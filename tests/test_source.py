"""What the project's own code never does: run code that came as data, or a shell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for place in ("inl_jax", "configs", "scripts", "benchmarks", "tests", "train_inl_llm_large.py")
    for path in ([ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py")))
]

# Modules whose readers run code from what they read.
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# Functions and methods, by their last name, of whatever module.
FUNCTIONS = {
    *("exec_module", "read_pickle"),
    *("system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"),
}
# Settings that let a library run code, and their safe value.
SETTINGS = {"shell": False, "weights_only": True, "allow_pickle": False, "trust_remote_code": False}

ALLOWED = {
    "inl_jax/config_file.py": {"runpy"},  # a config is a Python file
    "tests/test_checks.py": {"pickle"},  # an error that it has made itself
    # code of this project, exported by the test itself
    "tests/interop/exported/test_modeling_inl.py": {"trust_remote_code"},
    "tests/parallel/launched.py": {"pickle"},  # arrays of processes that it has started itself
}


def dangers(source: str) -> set[str]:
    """What in a module runs code that came as data, or a shell."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").partition(".")[0], *(alias.name for alias in node.names)}
            found |= names & (MODULES | FUNCTIONS)
        elif isinstance(node, ast.Name):
            found |= {node.id} & BUILTINS
        elif isinstance(node, ast.Attribute):
            found |= {node.attr} & FUNCTIONS
            owner = ast.unparse(node.value)
            if owner == "builtins" and node.attr in BUILTINS:
                found.add(node.attr)
            if owner == "yaml" and not node.attr.startswith("safe_load"):
                found.add(f"yaml.{node.attr}")
        elif isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            found |= unsafe(given)
            if ast.unparse(node.func) == "torch.load" and "weights_only" not in given:
                found.add("torch.load")
        elif isinstance(node, ast.Dict):
            found |= unsafe(
                {
                    key.value: value
                    for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant)
                }
            )
    return found


def unsafe(given: dict) -> set[str]:
    """The settings among `given`, name to expression, that have another value than the safe one."""
    return {
        name
        for name, safe in SETTINGS.items()
        if name in given and getattr(given[name], "value", None) is not safe
    }


def test_no_code_of_the_project_runs_data_or_a_shell():
    found = {str(path.relative_to(ROOT)): dangers(path.read_text()) for path in FILES}
    assert {path: words for path, words in found.items() if words} == ALLOWED


@pytest.mark.parametrize(
    "source, danger",
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("import runpy", "runpy"),
        ("eval('1')", "eval"),
        ("run = exec", "exec"),
        ("builtins.compile(text, '', 'exec')", "compile"),
        ("os.system('ls')", "system"),
        ("from os import popen", "popen"),
        ("subprocess.run(command, shell=True)", "shell"),
        ("subprocess.run(command, shell=flag)", "shell"),
        ("yaml.load(text)", "yaml.load"),
        ("yaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "weights_only"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("load(**{'trust_remote_code': True})", "trust_remote_code"),
        ("spec.loader.exec_module(module)", "exec_module"),
    ],
)
def test_dangers_are_seen(source, danger):
    assert dangers(source) == {danger}


@pytest.mark.parametrize(
    "source",
    [
        "re.compile('a')",
        "step.lower().compile()",
        "subprocess.run(['ls'], shell=False)",
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "text = 'AutoModel.from_pretrained(folder, trust_remote_code=True)'",
    ],
)
def test_what_is_safe_is_not_called_dangerous(source):
    assert not dangers(source)
