import dataclasses
import typing

import pytest

from inl_jax.cli import estimate, prepare, train
from inl_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from inl_jax.config_help import GROUPS, WIDTH, field_docs, kind_of

FIRST = {"train": train.FIRST, "estimate": estimate.FIRST, "prepare": prepare.FIRST}


def every_field():
    for field in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(field.type):
            yield from (f"--{field.name}.{inner.name}" for inner in dataclasses.fields(field.type))
        else:
            yield f"--{field.name}"


def flags_in(text):
    return [line.split()[0] for line in text.splitlines() if line.startswith("  --")]


@pytest.mark.parametrize("verb", FIRST)
def test_help_shows_the_flags_most_needed_and_is_short(inl, verb):
    code, out, err = inl(verb, "--help")
    assert (code, err) == (0, "") and len(out.splitlines()) <= 50
    shown = flags_in(out)
    assert shown[: 1 + len(FIRST[verb])] == ["--config", *(f"--{name}" for name in FIRST[verb])]
    assert all(f"inl {verb} --help {group} " in out for group in (*GROUPS, "all"))


def test_help_shows_the_flags_of_the_verb_itself(inl):
    _, out, _ = inl("estimate", "--help")
    assert {"--device", "--devices", "--compile", "--json"} <= set(flags_in(out))
    assert "  --device STR (h100-80gb) " in out and "  --compile [{cpu,cuda}] " in out


def test_help_all_shows_every_field_in_one_line(inl):
    code, out, _ = inl("train", "--help", "all")
    assert code == 0 and sorted(flags_in(out)) == sorted(every_field())
    assert len(out.splitlines()) == len(list(every_field())) + 3 * len(GROUPS) - 1


@pytest.mark.parametrize("group", GROUPS)
def test_help_of_a_group_has_the_whole_text_of_its_fields(inl, group):
    sections = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "mesh": MeshConfig}
    code, out, _ = inl("train", "--help", group)
    words = " ".join(out.split())
    for name, doc in field_docs(sections.get(group, TrainConfig)).items():
        assert f"--{group}.{name} " in words or f"--{name} " in words
        assert doc in words


@pytest.mark.parametrize("about", ["short", "all", *GROUPS])
def test_help_fits_100_columns(inl, about):
    for name in ("tiny", "3b_16gb"):
        _, out, _ = inl("train", "--config", name, "--help", about)
        assert max(map(len, out.splitlines())) <= WIDTH == 100


def test_help_shows_the_values_of_the_config_and_of_the_command_line(inl):
    _, out, _ = inl("train", "--config", "3b", "--batch_size", "7", "--accumulate_steps=7", "-h")
    assert "--batch_size INT (7) " in out and "--optim.learning_rate FLOAT (0.0002) " in out


def test_help_names_what_it_takes(inl):
    code, out, err = inl("train", "--help", "modle")
    assert code == 2 and out == "" and "'modle'" in err and "'model'" in err
    assert err.count("\n") == 1


def test_every_field_has_a_docstring():
    for section in (TrainConfig, ModelConfig, DataConfig, OptimConfig, MeshConfig):
        fields = {
            f.name for f in dataclasses.fields(section) if not dataclasses.is_dataclass(f.type)
        }
        docs = field_docs(section)
        assert fields == set(docs) and all(doc.endswith((".", ")")) for doc in docs.values())


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (int, "INT"),
        (tuple[str, ...], "STR ..."),
        (typing.Literal["a", "b"], "{a,b}"),
        (int | typing.Literal["rest"], "INT|{rest}"),
        (tuple[typing.Literal["a"], ...], "{a} ..."),
    ],
)
def test_type_is_shown_as_a_command_line_takes_it(kind, shown):
    assert kind_of(kind) == shown
