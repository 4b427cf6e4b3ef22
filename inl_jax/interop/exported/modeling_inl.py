"""INL-LLM for transformers: blocks that refine each token by iterating a small dynamical system.

    x = sqrt(D) E[ids] + P[position]         P: sinusoid; for mean and decay without attention
    for each block:
        mean         n = LN1(x);  h = context(n)
        the others   h = context(x);  x = x + h;  n = LN1(x)
        x_T = integrator: T steps from the state n, with context h
        mean         x = x + x_T
        the others   x = x + x_T - n
        x = x + W2 gelu(W1 LN2(x) + b1) + b2
    logits = LN_f(x) E^T

Matrix products run in the type of the weights; states, norms, softmax, positions and the recurrence
over tokens in float32, or in float64 if the weights are.

Shapes: B batch, S tokens given, N tokens in the cache, D width, V vocabulary, T integrator steps.
"""

import math

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_inl import InlConfig
from .contexts_inl import (
    CONTEXTS,
    InlDecay,
    InlGated,
    InlStateLayer,
    at_least_float32,
    find_tokens,
    make_cache,
    sinusoid,
)

CONTROLLERS = ("alpha", "beta", "gate", "candidate")
# Newer versions of transformers call the cache `cache`, in arguments and in outputs.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


# --- integrator and block


class InlConstant(nn.Module):
    """The output of a controller that reads nothing."""

    def __init__(self, width):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(width))


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
        if hidden == 0:
            self.out_proj = nn.ModuleDict({name: InlConstant(width) for name in CONTROLLERS})
            return
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
        from_context = self.context_proj(context) if c.controller_width else None
        x = normed.to(dtype)
        v = torch.zeros_like(x)
        for t in range(c.num_iterations):
            outputs = self._outputs(from_context, torch.cat([x, v], dim=-1).to(normed.dtype))
            o_alpha, o_beta, o_gate, candidate = (o.to(dtype) for o in outputs)
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

    def _outputs(self, from_context, state):
        """o_k of each controller, from (x, v) and h Wh + b; that is None if they read nothing."""
        controllers = self.out_proj.values()
        if from_context is None:
            return [constant.bias for constant in controllers]
        hidden = torch.relu(from_context + self.state_proj(state)).chunk(len(controllers), dim=-1)
        return [linear(r) for linear, r in zip(controllers, hidden, strict=True)]


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
        self.context = CONTEXTS[config.contexts[layer_idx]](config, layer_idx)
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
        elif isinstance(module, InlDecay | InlGated):
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
        """Hidden vectors, normalised, [B, S, D]. The arguments are those of `InlForCausalLM`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        num_past = 0 if cache is None else cache.get_seq_length()
        tokens = find_tokens(self.config, attention_mask, inputs_embeds, num_past)

        dtype = at_least_float32(inputs_embeds)
        hidden_states = math.sqrt(self.config.d_model) * inputs_embeds.to(dtype)
        if {"mean", "decay"}.issuperset(self.config.contexts):
            hidden_states = hidden_states + sinusoid(tokens.positions, self.config.d_model, dtype)
        hidden_states = self.dropout(hidden_states).to(inputs_embeds.dtype)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        all_hidden_states = ()
        for layer in self.layers:
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            hidden_states = layer(hidden_states, tokens, cache=cache)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            **{CACHE: cache},
        )

    def _cache(self, cache, use_cache):
        """The cache to read and to update, or None."""
        recomputes = self.gradient_checkpointing and self.training
        if cache is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            return make_cache(self.config) if use_cache and not recomputes else None
        if recomputes:
            raise ValueError("gradient checkpointing would read the tokens twice into the cache")
        states = [i for i, layer in enumerate(cache.layers) if isinstance(layer, InlStateLayer)]
        if states != [i for i, kind in enumerate(self.config.contexts) if kind != "attention"]:
            raise ValueError(
                f"a {type(cache).__name__} that is not of this model's contexts: pass the cache "
                "that the model returned, or none"
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
          past_key_values: the cache that an earlier call returned; updated in place.
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
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: not returned by this model")
        for name in ("position_ids", "cu_seq_lens_q", "seq_idx"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}: not taken by this model; positions follow attention_mask, and a row "
                    "holds one sequence"
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
