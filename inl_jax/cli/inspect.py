"""Draws what the integrator does with a text, by layer, iteration and token.

inl inspect runs/tiny --prompt "def fibonacci(n):" [--step best] [--out page.html]

Prints one table for each prompt and writes one page for all. The page needs no network.
"""

from collections.abc import Sequence

from inl_jax.config import InputError
from inl_jax.console import plural, reason, say
from inl_jax.files import write_text
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import Parser, add_mesh_flags, lines_on_stderr, mesh_from


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = Parser("inspect", __doc__)
    parser.add_path("run_dir")
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one or more")
    parser.add_argument("--step", default="latest", help="latest, best, or a saved update")
    parser.add_path("--out", help="the page; RUN_DIR/inspect.html by default")
    add_mesh_flags(parser)
    flags = parser.parse_flags(argv)
    out = flags.out or flags.run_dir / "inspect.html"
    if out.is_dir() or out.suffix not in (".html", ".htm"):
        raise InputError(f"--out {out}: is no page; name one, such as inspect.html")
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise InputError("inl inspect needs plotly: pip install 'inl_jax[report]'") from None
    # Imported late: a mistake on the command line is answered before JAX starts.
    from inl_jax.planning.programs.xla import use_compile_cache
    from inl_jax.report.inspect_page import inspect_page
    from inl_jax.sampling import LanguageModel
    from inl_jax.storage.run_dir import read_config
    from inl_jax.watch.inspection import inspect_prompts

    signals.unwind()
    config = read_config(flags.run_dir).model
    if config.num_iterations == 0:
        raise InputError(f"{flags.run_dir}: model.num_iterations=0, so it has no integrator")
    with lines_on_stderr():
        use_compile_cache()
    with signals.held():
        model = LanguageModel.from_run(flags.run_dir, step=flags.step, mesh=mesh_from(flags))
    inspected = inspect_prompts(model, flags.prompt)
    facts = (
        f"Checkpoint {flags.step}: {plural(config.num_layers, 'layer')} of "
        f"{plural(config.num_iterations, 'iteration')}, {config.d_model:,} channels, "
        f"{config.context_text}, dt = {config.dt:g}."
    )
    text = inspect_page(f"Inside {flags.run_dir.resolve().name}", facts, inspected)
    try:
        write_text(out, text)
    except OSError as error:
        raise InputError(f"--out {out}: {reason(error)}; name another file") from None
    for one in inspected:
        say(f"{one.prompt!r}: {plural(len(one.texts), 'token')}\n{table(one.dynamics)}\n")
    say(f"page: {out}")
    return 0


def table(dynamics: dict[str, list[list[float | None]]]) -> str:
    """A line for each layer: the first and the last iteration, or over all of them."""
    heads = ("rms(x - mu)", "rms(x' - x)", "alpha", "beta", "gate", "dt gate beta", "cosine")
    lines = ["layer  {:18}  {:18}  {:5}  {:5}  {:5}  {:>12}  {:>6}".format(*heads)]
    for layer, rows in enumerate(zip(*dynamics.values(), strict=True), start=1):
        one = dict(zip(dynamics, rows, strict=True))
        cells = [f"{layer:5}"]
        cells += [f"{_ends(one[n]):18}" for n in ("rms_error", "rms_step")]
        cells += [f"{sum(one[n]) / len(one[n]):5.3f}" for n in ("alpha", "beta", "gate")]
        cells.append(f"{max(one['stiffness']):12.4f}")
        cells.append("     -" if one["cosine"][-1] is None else f"{one['cosine'][-1]:6.3f}")
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _ends(values: Sequence[float]) -> str:
    """The first iteration's value and, if there are more, the last one's."""
    first = f"{values[0]:7.4f}"
    return first if len(values) == 1 else f"{first} -> {values[-1]:7.4f}"
