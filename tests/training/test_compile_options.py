import functools

import jax
import numpy as np
import pytest

from inl_jax.parallel.sharding import make_mesh
from inl_jax.training import compile_options as options
from inl_jax.training import step
from inl_jax.training.state import init_state


def test_compile_options_are_those_of_xla_for_large_models_alone(train_config):
    mesh = make_mesh(train_config().mesh)
    step, larger = (options.compile_options(mesh, options.SMALL + n) for n in range(2))
    assert step and not larger
    small, large = (options.compile_options(mesh, options.SMALL + n, once=True) for n in range(2))
    assert large == step != small, "what runs once is worth less"


def test_compile_options_that_xla_does_not_know_are_left_out():
    assert options._is_known("xla_backend_optimization_level", 1)
    assert not options._is_known("xla_cpu_no_such_option", 1)


def test_state_before_the_first_update_depends_on_the_options_by_rounding_alone(train_config):
    config = train_config(model={"num_layers": 1, "num_iterations": 1})
    quick = options.compile_options(make_mesh(config.mesh), 0, once=True)
    init = functools.partial(init_state, config=config)
    key = jax.random.key(3)
    found, usual = (jax.jit(init, compiler_options=chosen)(key) for chosen in (quick, {}))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=3e-7), found, usual)


def test_compile_step_takes_the_options_of_its_size(train_config, monkeypatch):
    class Traced:
        def lower(self):
            return self

        def compile(self, *, compiler_options):
            raise InterruptedError(compiler_options)

    config = train_config()
    mesh = make_mesh(config.mesh)
    monkeypatch.setattr(step, "trace_step", lambda *_: Traced())
    for size, quick in ((options.SMALL, True), (0, False)):
        monkeypatch.setattr(options, "SMALL", size)
        with pytest.raises(InterruptedError) as compiled:
            step.compile_step(config, mesh, None)
        assert bool(compiled.value.args[0]) == quick
