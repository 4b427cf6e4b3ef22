"""The configuration of INL-LLM for transformers."""

from transformers import PretrainedConfig


class InlConfig(PretrainedConfig):
    """The architecture of an [`InlForCausalLM`]. The standard names of transformers work too.

    Args:
      vocab_size: number of tokens in the vocabulary.
      d_model: width of the residual stream (`hidden_size`).
      num_layers: number of blocks (`num_hidden_layers`).
      num_iterations: integrator steps per block; 0 for a model without the integrator.
      d_ff: width of the feed-forward layer (`intermediate_size`).
      max_seq_len: longest sequence in training (`max_position_embeddings`). Positions are computed,
        so that longer sequences run.
      controller_width: width of each of the integrator's four controllers; 0: they are constants.
      context: how a block reads the earlier tokens: "mean", "decay", "gated" or "attention".
      attention_every: every so many layers, the last of them reads by attention and the others by
        `context`; 0: all by `context`.
      num_heads: query heads (`num_attention_heads`), for attention only.
      num_kv_heads: key and value heads (`num_key_value_heads`), for attention only.
      dt: time step of the integrator.
      excitation_amplitude: amplitude of the harmonic that excites the integrator.
      kappa: how sharply alpha falls to 0 near the equilibrium; None: it does not fall.
      dropout: of the embedding, the integrator's output and the feed-forward output.
      use_cache: whether the model returns what the next tokens need of these.
      tie_word_embeddings: must be True: the head is the embedding.
      **kwargs: of `PretrainedConfig`.

    Raises:
      ValueError: no such model can be built.
    """

    model_type = "inl"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
    }

    def __init__(
        self,
        vocab_size=50257,
        d_model=128,
        num_layers=4,
        num_iterations=3,
        d_ff=512,
        max_seq_len=256,
        controller_width=64,
        context="decay",
        attention_every=0,
        num_heads=1,
        num_kv_heads=1,
        dt=0.1,
        excitation_amplitude=0.03,
        kappa=1.0,
        dropout=0.0,
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.num_layers = num_layers
        self.num_iterations = num_iterations
        self.d_ff = d_ff
        self.max_seq_len = max_seq_len
        self.controller_width = controller_width
        self.context = context
        self.attention_every = attention_every
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.dt = dt
        self.excitation_amplitude = excitation_amplitude
        self.kappa = kappa
        self.dropout = dropout
        self.use_cache = use_cache
        if context not in ("mean", "decay", "gated", "attention"):
            raise ValueError(f"context={context!r}: must be mean, decay, gated or attention")
        if attention_every and context not in ("decay", "gated"):
            raise ValueError(
                f"attention_every={attention_every} with context={context!r}: attention alternates "
                "with decay or gated"
            )
        if attention_every and (attention_every < 2 or num_layers % attention_every):
            raise ValueError(
                f"attention_every={attention_every}: must be 0, or above 1 and divide "
                f"num_layers={num_layers}"
            )
        if d_model % (2 * num_heads) or num_heads % num_kv_heads:
            raise ValueError(
                f"d_model={d_model}, num_heads={num_heads}, num_kv_heads={num_kv_heads}: heads "
                "must have the same even width, and share key-value heads evenly"
            )
        if context == "mean" and num_iterations == 0:
            raise ValueError("num_iterations=0 with context='mean': nothing would read the context")
        if not tie_word_embeddings:
            raise ValueError("tie_word_embeddings=False: the head of this model is its embedding")
        super().__init__(tie_word_embeddings=True, **kwargs)

    @property
    def contexts(self):
        """The context of each layer, in their order."""
        every = self.attention_every
        return [
            "attention" if every and i % every == every - 1 else self.context
            for i in range(self.num_layers)
        ]
