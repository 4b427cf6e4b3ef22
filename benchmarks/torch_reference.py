"""The integrator and the published block in plain PyTorch, to time and to check ours against.

Each equation of the README is one line here. The weights have their published names, so that
`interop.published` fills them.

Shapes: B batch, S sequence, D width, C controller width.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from inl_jax.config import ModelConfig
from inl_jax.console import first_line, say
from inl_jax.interop.published import published_layout


class Integrator(nn.Module):
    """Maps the context and the initial state to the state after all iterations, [B, S, D]."""

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
        """Runs all iterations from the state `x` and velocity 0."""
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
    """The published block, which has the mean context."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.d_model
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-5), nn.LayerNorm(D, eps=1e-5)
        self.context_projection = nn.Linear(D, D)
        self.inl = Integrator(config)
        # nn.Identity stands for the published dropout, so that the last layer is named ff.3.
        self.ff = nn.Sequential(
            nn.Linear(D, config.d_ff), nn.GELU(), nn.Identity(), nn.Linear(config.d_ff, D)
        )

    def forward(self, x):
        """The stream after this block, [B, S, D]."""
        n = self.norm1(x)
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        h = self.context_projection(n).cumsum(dim=1) / count
        x = x + self.inl(h, n)
        return x + self.ff(self.norm2(x))


def block_weights(params, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The first block's weights by their names in `Block`.

    Args:
      params: the parameters of a model, or a tree of the same structure, such as their gradients.
      config: of that model; its context is the mean.
    """
    prefix = "layers.0."
    published = published_layout(params, config)
    return {
        name.removeprefix(prefix): torch.from_numpy(array.copy())
        for name, array in published.items()
        if name.startswith(prefix) and not name.endswith("global_step")
    }


def load_block(params, config: ModelConfig) -> Block:
    """A copy of our model's first block, in the type of its parameters."""
    weights = block_weights(params, config)
    block = Block(config).to(weights["norm1.weight"].dtype)
    block.load_state_dict(weights)
    return block


class TorchSide:
    """What integrator.py times of PyTorch: the modules above, eager and compiled.

    Args:
      params: the parameters of our model; its first block is measured.
      config: of that model; products are computed in its `compute_dtype`.
      skip_compile: leave out torch.compile.
      num_threads: CPU threads.
      want_gpu: run on CUDA if torch finds a GPU.
    """

    def __init__(
        self,
        params,
        config: ModelConfig,
        *,
        skip_compile: bool,
        num_threads: int,
        want_gpu: bool,
    ):
        torch.set_num_threads(num_threads)
        self.device = "cuda" if want_gpu and torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, which XLA uses by default
        elif want_gpu:
            say("WARNING: JAX runs on the GPU, but torch finds no GPU and runs on the CPU")
        self.version = f"{torch.__version__} on {self.device}, {num_threads} threads"
        self.dtype = getattr(torch, config.compute_dtype)
        block = load_block(params, config).to(self.device)
        self.modules = {"block": block, "integrator": block.inl}
        self.ways = {"torch eager": lambda module: module}
        if not skip_compile:
            self.ways["torch.compile"] = functools.cache(torch.compile)

    def matmul(self, *factors: np.ndarray) -> Callable[[], Any]:
        """A call that multiplies two matrices."""
        a, b = (torch.from_numpy(f).to(self.device, self.dtype) for f in factors)
        return self._waiting(lambda: a @ b)

    def contenders(
        self, piece: str, arrays: list[np.ndarray], *, backward: bool
    ) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
        """The calls that work, by name, and for those that fail the reason, by name.

        Args:
          piece: "block" or "integrator".
          arrays: its inputs, then the gradient by its output.
          backward: also compute the gradients by the inputs and by all parameters.
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
            except Exception as error:  # torch.compile needs a C++ compiler, for example
                if name == "torch eager":
                    raise
                failed[name] = f"{type(error).__name__}: {first_line(error)[:60]}"
                say(f"WARNING: {name} failed: {error}")
        return working, failed

    def _waiting(self, call: Callable) -> Callable[[], Any]:
        return call if self.device == "cpu" else lambda: (call(), torch.cuda.synchronize())
