"""The integrator and the published block in plain PyTorch, to measure and to check ours against.

Written after the same equations (README), one line for each, with the published names of the
weights, so that `interop.params_to_torch` fills them.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from inl_jax.config import ModelConfig
from inl_jax.interop import published as interop


class Integrator(nn.Module):
    """Context and initial state to the state after all iterations, [B, S, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, C = config.d_model, config.controller_width
        self.dt, self.kappa = config.dt, config.kappa
        self.amplitude, self.num_iterations = config.excitation_amplitude, config.num_iterations
        self.mu = nn.Parameter(torch.zeros(D))
        self.excitation_gamma = nn.Parameter(torch.ones(D))
        self.excitation_phi = nn.Parameter(torch.zeros(D))
        for name in ("alpha", "beta", "gate", "v_cand"):
            controller = nn.Sequential(nn.Linear(3 * D, C), nn.ReLU(), nn.Linear(C, D))
            setattr(self, f"mlp_{name}", controller)

    def forward(self, h, x):
        """Runs the iterations from state `x` and velocity 0."""
        v = torch.zeros_like(x)
        for t in range(self.num_iterations):
            inputs = torch.cat([h, x, v], dim=-1)
            e = x - self.mu
            # The tiny term keeps the gradient of the root finite at e = 0.
            tiny = torch.finfo(x.dtype).tiny
            rms = torch.sqrt(e.square().mean(dim=-1, keepdim=True) + tiny)
            alpha = torch.sigmoid(self.mlp_alpha(inputs)) * (1 - torch.exp(-self.kappa * rms))
            beta = F.softplus(self.mlp_beta(inputs)).clamp(max=2 / self.dt)
            gate, candidate = torch.sigmoid(self.mlp_gate(inputs)), self.mlp_v_cand(inputs)
            drive = self.amplitude * torch.sin(self.excitation_gamma * t + self.excitation_phi)
            v = alpha * v + (1 - alpha) * candidate - beta * e + drive
            x = x + self.dt * gate * v
        return x


class Block(nn.Module):
    """The published block, with the mean context: x to x, [B, S, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.d_model
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-5), nn.LayerNorm(D, eps=1e-5)
        self.context_projection = nn.Linear(D, D)
        self.inl = Integrator(config)
        # The published dropout, index 2, is kept for the names; without training it does nothing.
        self.ff = nn.Sequential(
            nn.Linear(D, config.d_ff), nn.GELU(), nn.Identity(), nn.Linear(config.d_ff, D)
        )

    def forward(self, x):
        """Refines the stream."""
        n = self.norm1(x)
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        h = self.context_projection(n).cumsum(dim=1) / count
        x = x + self.inl(h, n)
        return x + self.ff(self.norm2(x))


def block_weights(params, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The first block's weights by the names used here.

    Args:
      params: the parameters of a model, or a tree of that shape, such as their gradients.
      config: the architecture, with the mean context.
    """
    prefix = "layers.0."
    published = interop.params_to_torch(params, config)
    return {
        name.removeprefix(prefix): torch.from_numpy(array.copy())
        for name, array in published.items()
        if name.startswith(prefix) and not name.endswith("global_step")
    }


def load_block(params, config: ModelConfig) -> Block:
    """A block that computes what our model's first one does, in the type of its parameters."""
    weights = block_weights(params, config)
    block = Block(config).to(weights["norm1.weight"].dtype)
    block.load_state_dict(weights)
    return block


class TorchSide:
    """What scripts/benchmark.py measures of PyTorch: the modules above, eager and compiled.

    Args:
      params: the parameters of our model, of which the first block is taken.
      config: the architecture; products are in its `compute_dtype`.
      skip_compile: leave out torch.compile.
      num_threads: CPU threads.
      want_gpu: run on CUDA if torch can.
      report: where warnings go.
    """

    def __init__(
        self,
        params,
        config: ModelConfig,
        *,
        skip_compile: bool,
        num_threads: int,
        want_gpu: bool,
        report: Callable[[str], None],
    ):
        torch.set_num_threads(num_threads)
        self.device = "cuda" if want_gpu and torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as XLA does
        elif want_gpu:
            report("WARNING: JAX runs on the GPU and torch sees none: torch is on the CPU")
        self.version = f"{torch.__version__} on {self.device}, {num_threads} threads"
        self.dtype = getattr(torch, config.compute_dtype)
        block = load_block(params, config).to(self.device)
        self.modules = {"block": block, "integrator": block.inl}
        self.ways = {"torch eager": lambda module: module}
        if not skip_compile:
            self.ways["torch.compile"] = functools.cache(torch.compile)
        self.report = report

    def matmul(self, *factors: np.ndarray) -> Callable[[], Any]:
        """A call that multiplies two matrices."""
        a, b = (torch.from_numpy(f).to(self.device, self.dtype) for f in factors)
        return self._waiting(lambda: a @ b)

    def contenders(
        self, piece: str, arrays: list[np.ndarray], *, backward: bool
    ) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
        """Calls by name, and by name why one is missing.

        Args:
          piece: "block" or "integrator".
          arrays: its inputs, and the gradient by its output.
          backward: also compute the gradients by the inputs and all parameters.
        """
        *inputs, dy = (torch.from_numpy(a).to(self.device) for a in arrays)
        inputs = [tensor.requires_grad_(backward) for tensor in inputs]
        leaves = [*self.modules[piece].parameters(), *inputs]

        def run(module):
            narrow = self.dtype == torch.bfloat16
            with torch.set_grad_enabled(backward):
                with torch.autocast(self.device, torch.bfloat16, enabled=narrow):
                    y = module(*inputs)
                return torch.autograd.grad(y, leaves, dy.to(y.dtype)) if backward else y

        working, failed = {}, {}
        for name, way in self.ways.items():
            call = self._waiting(functools.partial(run, way(self.modules[piece])))
            try:
                call()
                working[name] = call
            except Exception as error:  # torch.compile needs a C++ compiler, among other things
                if name == "torch eager":
                    raise
                failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"
                self.report(f"WARNING: {name} failed: {error}")
        return working, failed

    def _waiting(self, call: Callable) -> Callable[[], Any]:
        return call if self.device == "cpu" else lambda: (call(), torch.cuda.synchronize())
