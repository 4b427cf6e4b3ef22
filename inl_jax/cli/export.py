"""Writes a model as a directory that Hugging Face transformers loads, and pushes it to the hub.

inl export runs/tiny --out tiny-hf [--step best] [--dtype bfloat16] [--push owner/name [--private]]

With --out model.pt it writes the published PyTorch format instead, if that can hold the model.
"""

from collections.abc import Sequence

from inl_jax.checks import require
from inl_jax.console import say
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import Parser


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = Parser("export", __doc__)
    parser.add_run()
    parser.add_path("--out", required=True, help="directory to make, or a .pt file")
    parser.add_argument("--step", default="latest", help="latest, best, or a saved update")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the weights; the run's by default"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload it to the hub")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    flags = parser.parse_flags(argv)
    require(flags.push is not None or not flags.private, "--private: is for --push owner/name")
    # Imported late: a mistake on the command line is answered before JAX starts.
    import jax

    from inl_jax.interop.exporter import PUBLISHED, check_out, read_saved, write_saved
    from inl_jax.interop.push import check_name, push

    if flags.push is not None:
        require(
            flags.out.suffix != PUBLISHED,
            f"--push {flags.push}: is for a directory, and --out is {flags.out}",
        )
        check_name(flags.push)
    signals.unwind()
    jax.config.update("jax_platforms", "cpu")  # the GPUs may be taken by a training
    check_out(flags.out, flags.dtype)
    with signals.held():
        saved = read_saved(flags.checkpoint, step=flags.step)
    write_saved(saved, flags.out, dtype=flags.dtype)
    if flags.push is not None:
        say(f"pushed: {push(flags.out, flags.push, private=flags.private)}")
    return 0
