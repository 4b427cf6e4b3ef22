"""The integrator as kernels for Hopper GPUs, written in Pallas Mosaic GPU.

`forward.py` is one iteration, `backward.py` its gradient, `tiles.py` what both are made of, and
`run_mosaic.py` the function that stands beside `dynamics.run`. docs/kernels.md says what has been
shown.

This package alone uses `jax.experimental.pallas`: there is no public name for it.
"""
