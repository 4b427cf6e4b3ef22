import pytest


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--tasks", "bpb", "--data", "a.txt"), "--data ['a.txt']: is not for --tasks; leave"),
        (("--limit", "4"), "--limit 4.0: is of --tasks; give both"),
        (("--tasks", "bpb", "--limit", "0"), "--limit 0: must be a whole number"),
        (("--tasks", "bpb", "--limit", "1.5"), "--limit 1.5: must be a whole number"),
        (("--tasks", "bpb", "--num_fewshot", "-1"), "--num_fewshot -1: must be 0 or more"),
        (("--tasks", "bpb", "--metadata", "[1]"), "[1]: must be a JSON object, as"),
        (("--tasks", "bpb", "--output", "no/a.json"), "--output no/a.json: there is no folder no"),
        (("--tasks", "bpb", "--output", "."), "--output .: is a folder; name a file"),
        (("--tasks", "bpb", "--include_path", "no"), "--include_path no: there is no such folder"),
        (("--tasks", "bpb", "--gen_kwargs", "a=1,b"), "--gen_kwargs b: must be NAME=VALUE"),
        (("--tasks", ","), "--tasks: names no task"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(inl, flags, message):
    code, out, err = inl("evaluate", "run", *flags)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
