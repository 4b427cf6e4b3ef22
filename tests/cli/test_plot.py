import sys


def test_plot_draws_the_loss_of_a_run(trained, inl, tmp_path):
    code, out, err = inl("plot", trained[1])
    assert code == 0 and out == f"loss picture: {trained[1] / 'loss.png'}\n", err
    assert (trained[1] / "loss.png").stat().st_size > 5000
    assert inl("plot", trained[1], tmp_path / "here.png")[0] == 0
    assert (tmp_path / "here.png").exists()


def test_plot_names_a_run_without_records(inl):
    code, _, err = inl("plot", "nowhere")
    assert code == 2 and err.startswith("error: nowhere: no metrics.jsonl")


def test_plot_without_matplotlib_gives_the_command_that_installs_it(inl, monkeypatch, trained):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = inl("plot", trained[1])
    assert code == 2 and err == "error: inl plot needs matplotlib: pip install 'inl_jax[plot]'\n"
