"""INL-LLM for transformers: blocks that refine each token by iterating a small dynamical system.

    x = sqrt(D) E[ids] + P[position]         P: sinusoid; left out with attention
    for each block:
        mean               n = LN1(x);  h = context(n)
        decay, attention   h = context(x);  x = x + h;  n = LN1(x)
        x_T = integrator: T steps from the state n, with context h
        mean               x = x + x_T
        decay, attention   x = x + x_T - n
        x = x + W2 gelu(W1 LN2(x) + b1) + b2
    logits = LN_f(x) E^T

Matrix products run in the type of the weights; states, norms, softmax, positions and the recurrence
over tokens in float32, or in float64 if the weights are.

Shapes: B batch, S tokens given, N tokens in the cache, D width, H query heads, G key-value heads, K
head width, T integrator steps.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_inl import InlConfig

CONTROLLERS = ("alpha", "beta", "gate", "candidate")
# Newer versions of transformers call the cache `cache`, in arguments and in outputs.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


def at_least_float32(tensor):
    """The type for states, sums and positions."""
    return torch.promote_types(tensor.dtype, torch.float32)


# --- cache


class InlStateLayer(CacheLayerMixin):
    """What a mean or decay context keeps of the earlier tokens: one vector per row, [B, D].

    Its size does not depend on the number of tokens, and no token can be taken back out of it.
    """

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        """Forgets all tokens."""
        self.state = None
        self.num_tokens = 0

    def update(self, state, num_tokens):
        """Replaces the state, after `num_tokens` more tokens."""
        self.state = state
        self.num_tokens += num_tokens

    def lazy_initialization(self, *args):
        """Nothing to do: the first `update` brings the state."""

    def get_seq_length(self):
        """The number of tokens read, N."""
        return self.num_tokens

    def get_mask_sizes(self, query_length):
        """Length and offset of the attention mask."""
        return self.num_tokens + query_length, 0

    def get_max_length(self):
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its older name

    def crop(self, *args):
        """Not possible.

        Raises:
          NotImplementedError: always.
        """
        raise NotImplementedError("the state of a mean or decay context cannot be cropped")

    def _select(self, indices):
        if self.state is not None:
            self.state = self.state[indices.to(self.state.device)]

    reorder_cache = _select  # for beam search
    batch_select_indices = _select

    def batch_repeat_interleave(self, repeats):
        """Repeats every row."""
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)


# --- positions


class TokenSpan(NamedTuple):
    """Where the tokens given to the model stand. Padding is counted nowhere."""

    positions: torch.Tensor  # of every token among the real tokens of its row, [B or 1, S]
    real: torch.Tensor | None  # which of the tokens given are no padding, [B, S]; None: all
    visible: (
        torch.Tensor | None
    )  # keys that a token attends to, [B or 1, 1, S, N + S]; None: all before
    rotary: tuple[torch.Tensor, torch.Tensor] | None  # sin and cos, [B or 1, 1, S, K / 2]


def find_tokens(config, attention_mask, inputs, num_past):
    """The `TokenSpan` of `inputs` [B, S, D] after `num_past` tokens in the cache.

    Raises:
      ValueError: the mask is not [B, N + S].
    """
    batch_size, length = inputs.shape[:2]
    total = num_past + length
    if attention_mask is None:
        positions = torch.arange(num_past, total, device=inputs.device)[None]
        real_keys = None
    else:
        if attention_mask.shape != (batch_size, total):
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: must be [batch, tokens in "
                f"the cache + tokens given], {(batch_size, total)}, with 0 for padding"
            )
        real_keys = attention_mask.to(inputs.device).bool()
        positions = (real_keys.long().cumsum(-1) - 1).clamp(min=0)[:, num_past:]
    real = None if real_keys is None else real_keys[:, num_past:]
    if config.context != "attention":
        return TokenSpan(positions, real, None, None)
    visible = None
    if real_keys is not None or (num_past > 0 and length > 1):
        key = torch.arange(total, device=inputs.device)
        query = key[num_past:, None]
        visible = (key <= query)[None, None]
        if real_keys is not None:
            # A padded query sees itself: without any key its softmax would be NaN.
            visible = visible & (real_keys[:, None, None] | (key == query))
    half = config.d_model // config.num_heads // 2
    angles = position_angles(positions, half, at_least_float32(inputs))[:, None]
    return TokenSpan(positions, real, visible, (angles.sin(), angles.cos()))


def position_angles(positions, num_frequencies, dtype):
    """`position * 10000^(-i / num_frequencies)`, [..., num_frequencies]."""
    index = torch.arange(2 * num_frequencies, dtype=dtype, device=positions.device)[::2]
    frequencies = torch.exp(index * (-math.log(10000.0) / (2 * num_frequencies)))
    return positions[..., None].to(dtype) * frequencies


def sinusoid(positions, width, dtype):
    """Sinusoidal positions, [..., D]: sin on even, cos on odd columns."""
    angles = position_angles(positions, width // 2, dtype)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def rotate(x, rotary):
    """Rotary positions of [B, heads, S, K], pairing column i with column i + K / 2."""
    sin, cos = rotary
    a, b = x.to(sin.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# --- contexts: how a block reads the earlier tokens


class InlMean(nn.Module):
    """`h_i = mean(u_0 .. u_i)` with `u = n Wc + bc`."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, hidden_states, tokens, cache=None):
        """Maps the normalised stream [B, S, D] to the context."""
        projected = self.proj(hidden_states)
        summands = projected.to(at_least_float32(projected))
        if tokens.real is not None:
            summands = summands * tokens.real[..., None]
        sums = summands.cumsum(1)
        if cache is not None:
            layer = cache.layers[self.layer_idx]
            if layer.state is not None:
                sums = sums + layer.state[:, None]
            layer.update(sums[:, -1], summands.shape[1])
        return (sums / (tokens.positions[..., None] + 1)).to(projected.dtype)


class DecayScan(torch.autograd.Function):
    """`h_i = decay h_(i-1) + (1 - decay) u_i` from `h_(-1) = start`, in log2(S) passes over u.

    u [B, S, D], decay [D] and start [B, D] have one type. The gradient is the same recurrence run
    backwards, `g_i = dh_i + decay g_(i+1)`, and keeps u and h alone.
    """

    @staticmethod
    def forward(ctx, u, decay, start):
        """Returns h, [B, S, D]."""
        drive = (1 - decay) * u
        drive[:, 0] += decay * start
        h = DecayScan.linear_scan(drive, decay)
        ctx.save_for_backward(u, decay, start, h)
        return h

    @staticmethod
    def backward(ctx, dh):
        """Returns the gradients by u, decay and start."""
        u, decay, start, h = ctx.saved_tensors
        g = DecayScan.linear_scan(dh.flip(1), decay).flip(1)
        earlier = torch.cat([start[:, None], h[:, :-1]], dim=1)
        return (1 - decay) * g, (g * (earlier - u)).sum((0, 1)), decay * g[:, 0]

    @staticmethod
    def linear_scan(drive, decay):
        """`h_i = decay h_(i-1) + drive_i` from 0. Writes over `drive`."""
        shift = 1
        while shift < drive.shape[1]:  # h_i holds the terms of the last `shift` tokens
            drive[:, shift:] += decay**shift * drive[:, :-shift]
            shift *= 2
        return drive


class InlDecay(nn.Module):
    """`h_i = decay h_(i-1) + (1 - decay) u_i` by channel, with `u = LN(x) Wc + bc`."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.norm = nn.LayerNorm(config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)
        self.decay_logit = nn.Parameter(torch.empty(config.d_model))

    def forward(self, hidden_states, tokens, cache=None):
        """Maps the stream [B, S, D] to the context."""
        projected = self.proj(self.norm(hidden_states))
        u = projected.to(at_least_float32(projected))
        layer = None if cache is None else cache.layers[self.layer_idx]
        start = torch.zeros_like(u[:, 0]) if layer is None or layer.state is None else layer.state
        if tokens.real is not None:
            # Real tokens come to the front of their row; a stable sort keeps their order.
            front = tokens.real.logical_not().long().sort(dim=1, stable=True).indices
            u = u.take_along_dim(front[..., None], dim=1)
        h = DecayScan.apply(u, self.decay_logit.to(u.dtype).sigmoid(), start)
        if tokens.real is not None:
            # The context of a token is the one after as many real tokens as there are up to it.
            count = tokens.real.long().cumsum(1)[..., None]
            h = torch.cat([start[:, None], h], dim=1).take_along_dim(count, dim=1)
        if layer is not None:
            layer.update(h[:, -1], h.shape[1])
        return h.to(projected.dtype)


class InlAttention(nn.Module):
    """Causal attention: grouped queries, rotary positions, normalised queries and keys."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.d_model // config.num_heads
        self.num_groups = config.num_heads // config.num_kv_heads
        kv_width = config.num_kv_heads * self.head_dim
        self.norm = nn.LayerNorm(config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.o_proj.init_std = (2 * config.num_layers * config.d_model) ** -0.5
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def forward(self, hidden_states, tokens, cache=None):
        """Maps the stream [B, S, D] to the context."""
        normed = self.norm(hidden_states)
        heads = (*normed.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(normed).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(normed).view(heads)).transpose(1, 2)
        value = self.v_proj(normed).view(heads).transpose(1, 2)
        query, key = rotate(query, tokens.rotary), rotate(key, tokens.rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        context = nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(self.num_groups, dim=1),
            value.repeat_interleave(self.num_groups, dim=1),
            attn_mask=tokens.visible,
            is_causal=tokens.visible is None and query.shape[2] > 1,
        )
        return self.o_proj(context.transpose(1, 2).flatten(2))


CONTEXTS = {"mean": InlMean, "decay": InlDecay, "attention": InlAttention}


# --- integrator and block


class InlIntegrator(nn.Module):
    """T steps of a dynamical system that pulls the state x of every token towards `mu`.

    x_0 = n, v_0 = 0;  for t = 0 .. T-1:
        r_k    = relu(h Wh_k + x Wx_k + v Wv_k + b_k)         k: alpha, beta, gate, candidate
        o_k    = r_k Wo_k + bo_k
        e      = x - mu
        alpha  = sigmoid(o_alpha) (1 - exp(-kappa rms(e)))
        beta   = min(softplus(o_beta), 2 / dt)
        gate   = sigmoid(o_gate)
        s      = A sin(gamma t + phi)
        v'     = alpha v + (1 - alpha) o_candidate - beta e + s
        x'     = x + dt gate v'
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, hidden = config.d_model, config.controller_width
        self.mu = nn.Parameter(torch.empty(width))
        self.gamma = nn.Parameter(torch.empty(width))
        self.phi = nn.Parameter(torch.empty(width))
        self.context_proj = nn.Linear(width, len(CONTROLLERS) * hidden)
        self.state_proj = nn.Linear(2 * width, len(CONTROLLERS) * hidden, bias=False)
        self.out_proj = nn.ModuleDict({name: nn.Linear(hidden, width) for name in CONTROLLERS})
        # Every hidden unit reads (h, x, v).
        self.context_proj.init_std = self.state_proj.init_std = (3 * width) ** -0.5
        for linear in self.out_proj.values():
            linear.init_std = 0.01

    def forward(self, context, normed):
        """The last state, from the context h and the initial state n, each [B, S, D]."""
        c = self.config
        dtype = at_least_float32(normed)
        mu, gamma, phi = self.mu.to(dtype), self.gamma.to(dtype), self.phi.to(dtype)
        from_context = self.context_proj(context)
        x = normed.to(dtype)
        v = torch.zeros_like(x)
        for t in range(c.num_iterations):
            from_state = self.state_proj(torch.cat([x, v], dim=-1).to(normed.dtype))
            hidden = torch.relu(from_context + from_state).chunk(len(CONTROLLERS), dim=-1)
            outputs = zip(self.out_proj.values(), hidden, strict=True)
            o_alpha, o_beta, o_gate, candidate = (linear(r).to(dtype) for linear, r in outputs)
            error = x - mu
            alpha = o_alpha.sigmoid()
            if c.kappa is not None:
                # Without `tiny` the gradient at an error of 0 is NaN.
                square = error.square().mean(-1, keepdim=True) + torch.finfo(dtype).tiny
                alpha = alpha * -torch.expm1(-c.kappa * square.sqrt())
            beta = nn.functional.softplus(o_beta).clamp(max=2 / c.dt)
            excitation = c.excitation_amplitude * torch.sin(gamma * t + phi)
            v = candidate + alpha * (v - candidate) - beta * error + excitation
            x = x + c.dt * o_gate.sigmoid() * v
        return x.to(normed.dtype)


class InlFeedForward(nn.Module):
    """`W2 gelu(W1 x + b1) + b2` with the exact GELU."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff)
        self.down_proj = nn.Linear(config.d_ff, config.d_model)
        self.down_proj.init_std = (2 * config.num_layers * config.d_ff) ** -0.5

    def forward(self, hidden_states):
        """Maps [B, S, D] to [B, S, D]."""
        return self.down_proj(nn.functional.gelu(self.up_proj(hidden_states)))


class InlBlock(GradientCheckpointingLayer):
    """Context, integrator, feed-forward."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.context = CONTEXTS[config.context](config, layer_idx)
        if config.num_iterations > 0:
            self.norm1 = nn.LayerNorm(config.d_model)
            self.integrator = InlIntegrator(config)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.feed_forward = InlFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states, tokens, cache=None):
        """Maps the stream [B, S, D] to the next; updates the cache."""
        if self.config.context == "mean":
            normed = self.norm1(hidden_states)
            context = self.context(normed, tokens, cache)
            hidden_states = hidden_states + self.dropout(self.integrator(context, normed))
        else:
            context = self.context(hidden_states, tokens, cache)
            hidden_states = hidden_states + context
            if self.config.num_iterations > 0:
                normed = self.norm1(hidden_states)
                moved = self.integrator(context, normed) - normed
                hidden_states = hidden_states + self.dropout(moved)
        return hidden_states + self.dropout(self.feed_forward(self.norm2(hidden_states)))


# --- models


class InlPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights."""

    config_class = InlConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InlBlock"]
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(
                module.weight, std=getattr(module, "init_std", module.in_features**-0.5)
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.d_model**-0.5)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
        elif isinstance(module, InlDecay):
            # Time constants of 1 to `max_seq_len` tokens, spread geometrically.
            steps = torch.linspace(0, 1, self.config.d_model, device=module.decay_logit.device)
            tau = self.config.max_seq_len**steps
            with torch.no_grad():
                module.decay_logit.copy_(-torch.log(torch.expm1(1 / tau)))
        elif isinstance(module, InlIntegrator):
            nn.init.zeros_(module.mu)
            nn.init.normal_(module.gamma, mean=1.0, std=0.1)
            nn.init.uniform_(module.phi, 0, 2 * math.pi)
            # At the start: alpha 0.8 before it falls, beta 0.5, gate 0.5, candidate 0.
            start = (math.log(0.8 / 0.2), math.log(math.expm1(0.5)), 0.0, 0.0)
            for linear, bias in zip(module.out_proj.values(), start, strict=True):
                nn.init.constant_(linear.bias, bias)


class InlModel(InlPreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([InlBlock(config, i) for i in range(config.num_layers)])
        self.norm = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False
        self.post_init()

    def make_cache(self):
        """An empty cache of the kind that the context needs."""
        if self.config.context == "attention":
            return DynamicCache()
        return Cache(layers=[InlStateLayer() for _ in self.layers])

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        cache=None,
    ):
        """Token ids [B, S] to hidden vectors [B, S, D]. The arguments are those of `InlForCausalLM`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        num_past = 0 if cache is None else cache.get_seq_length()
        tokens = find_tokens(self.config, attention_mask, inputs_embeds, num_past)

        dtype = at_least_float32(inputs_embeds)
        hidden_states = math.sqrt(self.config.d_model) * inputs_embeds.to(dtype)
        if self.config.context != "attention":
            hidden_states = hidden_states + sinusoid(tokens.positions, self.config.d_model, dtype)
        hidden_states = self.dropout(hidden_states).to(inputs_embeds.dtype)
        all_hidden_states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, tokens, cache=cache)
            all_hidden_states.append(hidden_states)
        all_hidden_states[-1] = hidden_states = self.norm(hidden_states)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            **{CACHE: cache},
        )

    def _cache(self, cache, use_cache):
        """The cache to read and to update, or None."""
        recomputes = self.gradient_checkpointing and self.training
        if cache is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            return self.make_cache() if use_cache and not recomputes else None
        if recomputes:
            raise ValueError("gradient checkpointing would read the tokens twice into the cache")
        keeps_states = any(isinstance(layer, InlStateLayer) for layer in cache.layers)
        if keeps_states == (self.config.context == "attention"):
            raise ValueError(
                f"this cache is not of context={self.config.context!r}: pass the one that the model "
                "returned, or model.make_cache()"
            )
        return cache


class InlForCausalLM(InlPreTrainedModel, GenerationMixin):
    """The language model: its head is the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = InlModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        # A state cannot be taken back to earlier tokens, as assisted generation would have to.
        self._is_stateful = config.context != "attention"
        self.post_init()

    def _supports_default_dynamic_cache(self):
        return self.config.context == "attention"

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        """Next-token logits [B, S, V], and the loss if there are labels.

        Args:
          input_ids: the tokens that follow those in the cache, [B, S].
          attention_mask: 0 for padding, 1 for tokens, [B, N + S], those in the cache included.
            Padding may stand anywhere: it is as if it were not there. None: no padding.
          past_key_values: the cache, as an earlier call returned it or `model.make_cache()` makes
            it; updated in place.
          inputs_embeds: rows of the embedding, [B, S, D], in the place of `input_ids`.
          labels: the tokens again, [B, S]; the model shifts them, and leaves out -100.
          use_cache: return the cache; by default the config's choice, and not in training.
          output_hidden_states: return the stream before, between and, normalised, after the blocks.
          logits_to_keep: compute the logits of the last so many tokens only (0: of all), or of the
            positions in a tensor.
          cache: the name of `past_key_values` in newer versions of transformers.
          **kwargs: of the loss, such as `num_items_in_batch`.

        Raises:
          ValueError: an argument that this model cannot follow.
        """
        for name in ("position_ids", "output_attentions"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(
                    f"{name}: not taken by this model; positions follow attention_mask"
                )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep, None)
        logits = self.lm_head(outputs.last_hidden_state[:, logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )
