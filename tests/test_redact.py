import pytest

from inl_jax.redact import redact


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://ann:pa55@host/data.txt", "https://***@host/data.txt"),
        ("s3://b/x?X-Amz-Signature=abc&n=1", "s3://b/x?X-Amz-Signature=***&n=1"),
        ("https://host/x?access_token=abc", "https://host/x?access_token=***"),
        ("inl train --hub.token abc --seed 1", "inl train --hub.token *** --seed 1"),
        ("inl train --wandb-key=abc --lr 1", "inl train --wandb-key=*** --lr 1"),
        ("--password 'a b' x", "--password *** x"),
        ("DB_PASSWORD=abc inl", "DB_PASSWORD=*** inl"),
        ('{"api_key": "abc", "n": 1}', '{"api_key": ***, "n": 1}'),
        ("https://ann:pa@55@host/x@1", "https://***@host/x@1"),
        ("https://ann:pa/55@host/x", "https://***@host/x"),
        ("clone //ann:pa55@host/x", "clone //***@host/x"),
        ("Authorization: Bearer pa55", "Authorization: ***"),
        ("{'Authorization': 'Bearer pa55'}", "{'Authorization': ***}"),
        ("-H x-api-key:pa55 -v", "-H x-api-key:*** -v"),
        ("got Bearer abcdefgh12345678", "got Bearer ***"),
        ("--auth pa55 --passphrase pa55 --lr 1", "--auth *** --passphrase *** --lr 1"),
        ("PGPASSWORD=pa55 psql db_pwd=pa55", "PGPASSWORD=*** psql db_pwd=***"),
        ('{"pwd": "pa\\"55", "n": 1}', '{"pwd": ***, "n": 1}'),
        ("key hf_abcdefghijklmnopqrstuvwx.", "key ***."),
        ("wandb_v1_abcdefghijklmnopqrstuvwx", "***"),
    ],
)
def test_redact_hides_secrets_in_text(text, shown):
    assert redact([text]) == [shown]


def test_redact_hides_entries_named_as_secrets_and_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("PWD", "/data/runs")
    value = {"hub": {"api_key": "x", "token": "", "note": "my 0123456789abcdef in /data/runs"}}
    shown = {"hub": {"api_key": "***", "token": "", "note": "my *** in /data/runs"}}
    assert redact(value) == shown
    for name in ("pwd", "Passphrase", "proxy_auth", "MYPASSWORD"):
        assert redact({name: "x"}) == {name: "***"}


def test_redact_leaves_the_rest_as_it_is():
    value = {
        "sample_tokens": 64,
        "tokenizer": "bpe:4096",
        "paths": ("stdlib", "hf:owner/name", "/data/a@b/*.txt", "http://host:80/x?n=1"),
        "num_tokens": 5,
        "author": "Ann",
        "prose": "key: value; the author: Ann; num_tokens=5, tokens_per_second: 7e3, keys=[1]",
        "hub": "hf:ann/words@main and http://host:8080/x@1",
        "commit": "ea7d757b00000000000000000000000000000000",
        "command": "inl train --sample_tokens 64 --data.tokenizer gpt2",
        "rate": 0.5,
    }
    assert redact(value) == value
