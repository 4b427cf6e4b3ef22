"""The architecture as a frozen dataclass."""

import dataclasses
from typing import Literal

from inl_jax.checks import (
    check_types,
    require,
    require_at_most,
    require_not_negative,
    require_positive,
)

Mixer = Literal["mean", "decay", "gated", "attention"]
DType = Literal["auto", "float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: every field that changes the parameters, or how the model is computed."""

    vocab_size: int = 50257
    """Number of tokens in the vocabulary, V; at least the tokenizer's."""
    d_model: int = 128
    """Width of the residual stream, D, in channels."""
    num_layers: int = 4
    """Number of blocks, L."""
    num_iterations: int = 3
    """Integrator steps per block, T. With 0 the model is built without the integrator."""
    d_ff: int = 512
    """Width of the feed-forward layer, F, in hidden units."""
    max_seq_len: int = 256
    """Length of the longest sequence, in tokens."""
    controller_width: int = 64
    """Width of each of the integrator's four controllers, C, in hidden units. 64 is published; at
    width 128, 8 learned as much as 32. With 0 the controllers read nothing: their outputs are
    learned constants of each channel, which take no products (docs/learning.md)."""
    context: Mixer = "gated"
    """How a block reads the earlier positions. mean: running mean, the published model. decay:
    exponential decay with a learned rate per channel. gated: decay at a rate that each token
    chooses, with a gated output. attention: causal softmax attention."""
    attention_every: int = 0
    """Every so many layers, the last of them reads the earlier positions by attention and the
    others by context; 0: all by context. A divisor of num_layers."""
    num_heads: int = 1
    """Number of query heads, each of width d_model / num_heads. For attention only."""
    num_kv_heads: int = 1
    """Number of key and value heads, each shared by num_heads / num_kv_heads query heads. For
    attention only."""
    dt: float = 0.1
    """Time step of the integrator, in the units of its own time. 0.1 is published; with gated, one
    iteration learned more with 1 (docs/learning.md)."""
    initial_beta: float = 0.5
    """beta when training begins: how strongly a step pulls the state to its equilibrium. With
    gated, 15 steps of 0.1 learned more from 0.02 than from 0.5 (docs/learning.md)."""
    excitation_amplitude: float = 0.03
    """Amplitude A of the harmonic that excites the integrator, in units of velocity."""
    kappa: float = 1.0
    """How sharply alpha falls to 0 near the equilibrium, per unit of rms(x - mu). With inf it does
    not fall, as in the published model: alpha = sigmoid(o_alpha)."""
    tol: float = 0.0
    """Adaptive depth: a token takes no more steps in a block after one whose rms over the channels,
    rms(x' - x), is below this. With 0 every token takes all num_iterations. For evaluation and
    generation only: training must have 0."""
    dropout: float = 0.0
    """Probability of dropping a value of the embedding, of the integrator's output or of the
    feed-forward layer's output."""
    param_dtype: DType = "float32"
    """Type in which parameters are stored. With bfloat16 the optimizer keeps float32 masters."""
    compute_dtype: DType = "auto"
    """Type of matrix products. auto: bfloat16 on accelerators, float32 on CPU."""
    attention_kernel: Literal["auto", "cudnn", "xla"] = "auto"
    """Kernel for attention over whole sequences. cudnn: flash attention, bfloat16 on CUDA only.
    auto: cudnn on CUDA, xla elsewhere. Training is refused if its kernel is missing; a trained
    model is evaluated all the same, by xla. For attention only."""
    remat: Literal["auto", "none", "integrator", "all_but_integrator", "block"] = "block"
    """What the backward pass recomputes to save memory. none: nothing, or on a CPU what takes no
    matrix product, which also saves time. integrator: the integrator's iterations.
    all_but_integrator: the rest of a block (with autodiff this is block: only lean marks what is
    kept). block: all of a block; only its input is kept. auto: the fastest that fits the device's
    memory, chosen and said at the start of a run (docs/memory.md); else block."""
    integrator_gradient: Literal["lean", "autodiff"] = "lean"
    """lean: the gradient written out by hand, which keeps about 2 vectors of width D per token and
    iteration. autodiff: automatic differentiation of the plain scan, about 17, for comparison."""
    integrator_segment: int = 1
    """Iterations per segment. lean keeps (x, v) before each segment and recomputes the others."""
    trajectory_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which lean keeps (x, v). bfloat16 halves that memory and rounds the gradient."""
    integrator_kernel: Literal["auto", "xla", "mosaic"] = "auto"
    """xla: any device. mosaic: kernels of our own for Hopper GPUs, with products in bfloat16
    (docs/kernels.md). auto: xla, until a GPU has run the kernels. If they are missing, training is
    refused, and a trained model is evaluated by xla."""
    integrator_chunk: int = 0
    """Positions that go through all iterations together. With 0: the whole sequence."""
    unroll: Literal["auto", "none", "iterations"] = "auto"
    """Which loop is compiled as straight code, which moves less memory and compiles more slowly.
    iterations: the integrator's. auto: iterations on GPUs, none on CPUs."""

    def __post_init__(self):
        check_types(self, "model.")
        require_positive(
            self,
            "model.",
            "vocab_size d_model num_layers d_ff max_seq_len num_heads num_kv_heads dt "
            "initial_beta kappa integrator_segment",
        )
        require_not_negative(
            self,
            "model.",
            "num_iterations controller_width attention_every excitation_amplitude tol "
            "integrator_chunk",
        )
        require_at_most(self, "model.", 10**8, "vocab_size max_seq_len integrator_chunk")
        require_at_most(self, "model.", 10**6, "d_model d_ff controller_width integrator_segment")
        require_at_most(self, "model.", 10**4, "num_layers num_iterations num_heads num_kv_heads")
        require_at_most(self, "model.", 100, "initial_beta")
        require_at_most(self, "model.", 1e30, "dt excitation_amplitude tol")
        require(0 <= self.dropout < 1, f"model.dropout={self.dropout}: must be at least 0, below 1")
        require(
            self.param_dtype != "auto",
            "model.param_dtype=auto: choose float32, bfloat16 or float64",
        )
        require(
            self.d_model % 2 == 0,
            f"model.d_model={self.d_model}: must be even (sinusoidal positions are sin, cos pairs)",
        )
        require(
            self.d_model % self.num_heads == 0 and self.head_dim % 2 == 0,
            f"model.num_heads={self.num_heads}: must divide model.d_model={self.d_model} into "
            "heads of even width",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads}: must divide model.num_heads={self.num_heads}",
        )
        for name in ("num_iterations", "controller_width"):
            require(
                not (getattr(self, name) == 0 and self.context == "mean"),
                f"model.{name}=0 with model.context=mean: nothing would read the context; "
                "use model.context decay, gated or attention",
            )
        require(
            self.attention_every != 1,
            "model.attention_every=1: all layers would be attention; write "
            "--model.context attention --model.attention_every 0",
        )
        require(
            not self.attention_every or self.context in ("decay", "gated"),
            f"model.attention_every={self.attention_every} with model.context={self.context}: "
            "attention alternates with decay or gated; set model.context gated, or "
            "model.attention_every 0",
        )
        require(
            not self.attention_every or self.num_layers % self.attention_every == 0,
            f"model.attention_every={self.attention_every}: must divide "
            f"model.num_layers={self.num_layers}, or be 0",
        )
        require(
            not (self.num_iterations == 0 and self.tol > 0),
            f"model.tol={self.tol} with model.num_iterations=0: no token takes a step; set tol 0",
        )

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixers of consecutive layers, repeated until there are `num_layers`."""
        if self.attention_every == 0:
            return (self.context,)
        return (self.context,) * (self.attention_every - 1) + ("attention",)

    @property
    def context_text(self) -> str:
        """The mixers for a reader: `gated context, attention in every 4th layer`."""
        every = f", attention in every {_ordinal(self.attention_every)} layer"
        return f"{self.context} context{every if self.attention_every else ''}"

    @property
    def uses_attention(self) -> bool:
        """Whether some layer reads the earlier positions by attention."""
        return "attention" in self.mixers

    @property
    def has_sinusoid(self) -> bool:
        """Whether positions are added to the embedding: the other mixers know the order."""
        return self.context in ("mean", "decay") and not self.uses_attention

    @property
    def head_dim(self) -> int:
        """Width of one attention head, K."""
        return self.d_model // self.num_heads


def _ordinal(n: int) -> str:
    """2nd, 3rd, 11th."""
    return f"{n}{'th' if n % 100 // 10 == 1 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"
