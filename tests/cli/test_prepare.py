def test_prepare_says_where_the_tokens_are_and_how_many(tiny_run, inl):
    code, out, err = inl("prepare", "--config", tiny_run[0])
    assert code == 0 and "tokenizer bytes: 257 ids" in out and "data fingerprint " in out, err
    assert "  train " in out and "  validation " in out


def test_prepare_names_a_config_that_is_not_there(inl):
    code, _, err = inl("prepare_data", "--config", "nowhere.py")
    assert code == 2 and "config nowhere.py: no such file" in err and err.count("\n") == 1
