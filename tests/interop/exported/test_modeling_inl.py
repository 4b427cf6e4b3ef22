import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported_dir import from_named, to_named
from lively import lively_params

import inl_jax
from inl_jax.interop import exported
from inl_jax.interop.exported_config import to_json_fields
from inl_jax.interop.named_weights import weights_of
from inl_jax.model.language_model import init_params

CONTEXTS = pytest.mark.parametrize(
    "kind",
    [
        {"context": "mean"},
        {"context": "decay"},
        {"context": "gated"},
        {"context": "attention"},
        {"context": "gated", "attention_every": 2},
    ],
    ids=["mean", "decay", "gated", "attention", "gated, attention"],
)
KINDS = pytest.mark.parametrize(
    "kind",
    [
        {"context": "mean", "kappa": float("inf")},
        {"context": "decay"},
        {"context": "gated"},
        {"context": "attention"},
        {"context": "decay", "attention_every": 3, "num_layers": 3},
        {"context": "decay", "num_iterations": 0},
        {"context": "attention", "num_iterations": 0},
        {"context": "gated", "attention_every": 2, "num_layers": 4, "num_iterations": 0},
        {"context": "gated", "controller_width": 0},
    ],
    ids=[
        *["mean", "decay", "gated", "attention", "decay, attention"],
        *["decay alone", "attention alone", "gated, attention alone", "constant controllers"],
    ],
)
IDS = np.random.default_rng(0).integers(0, 300, (3, 24))
PROMPTS = [[5, 6, 7, 8], [9, 1, 2, 3, 4, 5, 6], [11]]


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


def in_torch(config, params, dtype="float32"):
    """The model in PyTorch, from our parameters, in this process."""
    import torch

    from inl_jax.interop.exported.configuration_inl import InlConfig
    from inl_jax.interop.exported.modeling_inl import InlForCausalLM

    model = InlForCausalLM(InlConfig(**to_json_fields(config))).to(getattr(torch, dtype))
    weights = {name: torch.tensor(a) for name, a in to_named(params, config).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    return model.eval()


def write_export(folder, config, params, num_shards=1):
    """What an export leaves, without tokenizer and card."""
    from safetensors.numpy import save_file

    folder.mkdir()
    weights = to_named(params, config)
    shards, of = [{} for _ in range(num_shards)], {}
    for i, (name, array) in enumerate(weights.items()):
        shards[i % num_shards][name] = array
        of[name] = f"model-{i % num_shards + 1:05d}-of-{num_shards:05d}.safetensors"
    if num_shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        for file in set(of.values()):
            shard = {name: array for name, array in weights.items() if of[name] == file}
            save_file(shard, folder / file, {"format": "pt"})
        size = sum(array.nbytes for array in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    described = {
        "model_type": "inl",
        "architectures": ["InlForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_inl.InlConfig",
            "AutoModelForCausalLM": "modeling_inl.InlForCausalLM",
        },
        "dtype": config.param_dtype,
    }
    (folder / "config.json").write_text(json.dumps(to_json_fields(config) | described))
    for code in Path(exported.__file__).parent.glob("*_inl.py"):
        shutil.copy(code, folder)
    return folder


@pytest.fixture
def load(torch, tmp_path, monkeypatch):
    """Loads a directory as users do, offline; its code is copied to `tmp_path` and runs there."""
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    def forget_code():
        for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
            del sys.modules[name]

    def load(folder, **settings):
        return AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, local_files_only=True, **settings
        )

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    forget_code()
    yield load
    forget_code()


def logits_of(model, ids, **inputs):
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(ids), **inputs).logits.float().numpy()


def left_padded(prompts):
    """Ids and mask of prompts of several lengths."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def continued(model, ids, mask=None, **settings):
    """The new tokens of every row."""
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | settings
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()


def assert_near(found, wanted, relative):
    """No further apart than `relative` times the largest of `wanted`."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=relative * np.abs(wanted).max())


def test_exported_model_gives_our_logits_and_tokens(torch, model_config):
    config = model_config()
    params = lively_params(config)
    model = in_torch(config, params)
    # Measured: 3e-6; either is as far from the result in float64.
    ours = np.asarray(jax.jit(inl_jax.apply, static_argnums=0)(config, params, IDS))
    assert_near(logits_of(model, IDS), ours, 1e-5)
    ours = inl_jax.generate(config, params, PROMPTS, max_new_tokens=4)
    found = continued(model, *left_padded(PROMPTS), max_new_tokens=4)
    assert found == [row.tolist() for row in ours]


# --- beside inl_jax


@pytest.mark.slow
@KINDS
def test_loaded_model_gives_our_logits_and_tokens(load, model_config, tmp_path, kind):
    config = model_config(**kind)
    for name, params, tolerance in [
        ("initial", init_params(config, jax.random.key(0)), 2e-6),
        ("lively", lively_params(config), 1e-5),
    ]:
        model = load(write_export(tmp_path / name, config, params, num_shards=3))
        assert not model.training
        ours = np.asarray(inl_jax.apply(config, params, IDS))
        assert_near(logits_of(model, IDS), ours, tolerance)
        ours = inl_jax.generate(config, params, PROMPTS, max_new_tokens=12)
        ours = [row.tolist() for row in ours]
        assert continued(model, *left_padded(PROMPTS)) == ours
        import torch

        alone = [continued(model, torch.tensor([prompt]))[0] for prompt in PROMPTS]
        assert alone == ours


@pytest.mark.slow
@KINDS
def test_model_in_bfloat16_is_near_ours(load, model_config, tmp_path, kind):
    config = model_config(**kind, param_dtype="bfloat16", compute_dtype="bfloat16")
    params = init_params(config, jax.random.key(0))
    named = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
    model = load(write_export(tmp_path / "out", config, params))
    assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}
    exact = np.asarray(inl_jax.apply(model_config(**kind), named, IDS))
    ours = np.asarray(inl_jax.apply(config, params, IDS))
    found = logits_of(model, IDS)
    assert np.abs(found - exact).max() < 2 * np.abs(ours - exact).max() + 0.02
    assert len(continued(model, *left_padded(PROMPTS))) == 3


@pytest.mark.slow
@KINDS
def test_logits_and_gradients_are_ours_in_float64(torch, model_config, kind):
    with jax.enable_x64(True):
        config = model_config(**kind, param_dtype="float64")
        params = jax.tree.map(lambda a: a.astype("float64"), lively_params(model_config(**kind)))
        weight = np.random.default_rng(1).normal(size=(*IDS.shape, config.vocab_size))

        def loss(params):
            return jnp.mean(inl_jax.apply(config, params, IDS) * weight)

        ours = np.asarray(inl_jax.apply(config, params, IDS))
        grads = to_named(jax.grad(loss)(params), config)
        model = in_torch(config, params, "float64")
    found = model(torch.tensor(IDS)).logits
    # The softmax of jax.nn.dot_product_attention is float32, and the integrator amplifies it.
    tolerance = 1e-4 if config.uses_attention else 1e-11
    assert_near(found.detach().numpy(), ours, tolerance)
    (found * torch.tensor(weight)).mean().backward()
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert theirs.keys() == grads.keys()
    for name, grad in grads.items():
        assert_near(theirs[name], grad, tolerance)


@pytest.mark.slow
@CONTEXTS
def test_model_reads_beyond_the_trained_length(torch, model_config, kind):
    config = model_config(**kind)
    params = init_params(config, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 300, (1, 4 * config.max_seq_len))
    ours = np.asarray(inl_jax.apply(config, params, ids))
    assert_near(logits_of(in_torch(config, params), ids), ours, 1e-4)  # angles in float32


# --- the recurrence


@pytest.mark.slow
def test_decay_is_the_recurrence_and_its_gradient(torch):
    from inl_jax.interop.exported.contexts_inl import DecayScan

    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    decay = torch.tensor([0.0, 1e-30, 0.3, 0.9, 0.9999, 1 - 1e-7, 1.0], dtype=torch.float64)
    u, start = torch.randn(2, 4096, 7, **make), torch.randn(2, 7, **make)
    h, row = [], start
    for i in range(u.shape[1]):
        row = decay * row + (1 - decay) * u[:, i]
        h.append(row)
    h = torch.stack(h, dim=1)
    torch.testing.assert_close(DecayScan.apply(u, decay, start), h, atol=1e-12, rtol=0)
    found = DecayScan.apply(u.float(), decay.float(), start.float())
    assert found.isfinite().all() and (found - h).abs()[..., :5].max() < 1e-4
    inputs = [a.clone().requires_grad_() for a in (u[:, :13], decay, start)]
    assert torch.autograd.gradcheck(DecayScan.apply, inputs)


def test_gated_scan_is_the_recurrence_and_its_gradient(torch):
    from inl_jax.interop.exported.contexts_inl import GatedScan

    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    u, start = torch.randn(2, 100, 3, **make), torch.randn(2, 3, **make)
    logit = 9 * torch.randn(2, 100, 3, **make)
    logit[0, 20:40] = torch.inf  # padding
    h, row = [], start
    for i in range(u.shape[1]):
        row = logit[:, i].sigmoid() * row + (-logit[:, i]).sigmoid() * u[:, i]
        h.append(row)
    h = torch.stack(h, dim=1)
    torch.testing.assert_close(GatedScan.apply(u, logit, start), h, atol=1e-13, rtol=0)
    found = GatedScan.apply(u.float(), logit.float(), start.float())
    torch.testing.assert_close(found.double(), h, atol=2e-6, rtol=0)
    inputs = [a.clone().requires_grad_() for a in (u[:, :9], logit[:, :9], start)]
    assert torch.autograd.gradcheck(GatedScan.apply, inputs)
    inputs = [a.clone().requires_grad_() for a in (u, logit, start)]
    GatedScan.apply(*inputs).sum().backward()
    assert all(a.grad.isfinite().all() for a in inputs)
    assert not inputs[0].grad[0, 20:40].any() and not inputs[1].grad[0, 20:40].any()


# --- padding and cache


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]],
    "holes": [[1, 1, 0, 0, 1, 0, 1, 0], [0, 1, 0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1]],
}


@pytest.mark.slow
@CONTEXTS
@pytest.mark.parametrize("padding", MASKS)
def test_padding_is_as_if_it_were_not_there(torch, model_config, kind, padding):
    config = model_config(**kind)
    model = in_torch(config, lively_params(config), "float64")
    mask = torch.tensor(MASKS[padding])
    ids = torch.tensor(IDS[:, :8])
    found = model(ids, attention_mask=mask).logits
    assert found.isfinite().all()
    cache, pieces = None, []
    for start, end in [(0, 3), (3, 4), (4, 5), (5, 8)]:
        piece = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        cache = piece.past_key_values
        pieces.append(piece.logits)
    assert cache.get_seq_length() == 8
    for b in range(3):
        real = mask[b].bool()
        alone = model(ids[b : b + 1, real]).logits[0]
        torch.testing.assert_close(found[b, real], alone, atol=1e-10, rtol=0)
        torch.testing.assert_close(torch.cat(pieces, 1)[b, real], alone, atol=1e-10, rtol=0)


@pytest.mark.slow
@CONTEXTS
def test_generation_with_cache_is_generation_without(torch, model_config, kind):
    config = model_config(**kind)
    model = in_torch(config, lively_params(config))
    inputs = left_padded(PROMPTS)
    for settings in [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
    ]:
        rows = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            rows.append(continued(model, *inputs, use_cache=use_cache, **settings))
        assert rows[0] == rows[1]


@pytest.mark.slow
@CONTEXTS
def test_generation_continues_from_its_cache(torch, model_config, kind):
    config = model_config(**kind)
    model = in_torch(config, lively_params(config))
    settings = {"do_sample": False, "pad_token_id": 0}
    prompt = torch.tensor([PROMPTS[1]])
    whole = model.generate(prompt, max_new_tokens=12, **settings)
    first = model.generate(prompt, max_new_tokens=5, return_dict_in_generate=True, **settings)
    rest = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=7, **settings
    )
    assert torch.equal(rest, whole)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["mean", "decay", "gated"])
def test_state_does_not_grow(torch, model_config, context):
    config = model_config(context=context)
    model = in_torch(config, lively_params(config))
    cache = None
    for _ in range(3):
        cache = model(torch.tensor(IDS), past_key_values=cache).past_key_values
        assert [layer.state.shape for layer in cache.layers] == [(3, config.d_model)] * 2
    assert cache.get_seq_length() == 3 * IDS.shape[1]


@pytest.mark.slow
@CONTEXTS
def test_assisted_generation_is_right_or_refused(torch, model_config, kind):
    config = model_config(**kind)
    model = in_torch(config, lively_params(config))
    prompt = torch.tensor([PROMPTS[1]])
    if kind == {"context": "attention"}:
        lookup = {"prompt_lookup_num_tokens": 2, "eos_token_id": 299}
        assert continued(model, prompt, **lookup) == continued(model, prompt, eos_token_id=299)
    else:
        with pytest.raises(ValueError, match="assisted generation is not supported"):
            continued(model, prompt, prompt_lookup_num_tokens=2)


@pytest.mark.slow
def test_inputs_that_cannot_be_followed_are_named(torch, model_config):
    from transformers import DynamicCache

    model = in_torch(model_config(), lively_params(model_config()))
    ids = torch.tensor(IDS)
    positions = torch.arange(24).expand(3, 24)
    for inputs, named in [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": ids, "position_ids": positions}, "position_ids"),
        ({"input_ids": ids, "output_attentions": True}, "output_attentions"),
        ({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 3, 24])}, "cu_seq_lens_q"),
        ({"input_ids": ids[:, :0]}, "no tokens"),
        ({"input_ids": ids, "attention_mask": torch.ones(3, 23)}, r"\(3, 23\).*\(3, 24\)"),
        ({"input_ids": ids, "past_key_values": DynamicCache()}, "DynamicCache"),
    ]:
        with pytest.raises(ValueError, match=named):
            model(**inputs)
    alternating = model_config(attention_every=2)
    alternating = in_torch(alternating, lively_params(alternating))
    for reads, made in [(model, alternating), (alternating, model)]:
        with pytest.raises(ValueError, match="not of this model's contexts"):
            reads(ids, past_key_values=made(ids).past_key_values)
    cache = model(ids).past_key_values
    with pytest.raises(NotImplementedError, match="cropped"):
        cache.crop(-1)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.train()(ids, past_key_values=cache)


# --- training


@pytest.mark.slow
def test_loss_shifts_labels_and_leaves_out_the_marked_ones(torch, model_config):
    model = in_torch(model_config(), lively_params(model_config()))
    ids = torch.tensor(IDS)
    labels = ids.clone()
    labels[0, :10] = -100
    out = model(ids, labels=labels)
    nats = -out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    counted = nats[labels[:, 1:] != -100]
    torch.testing.assert_close(out.loss, counted.mean())
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss
    torch.testing.assert_close(summed, counted.sum() / 10)


@pytest.mark.slow
@CONTEXTS
def test_gradient_checkpointing_changes_no_gradient(torch, model_config, kind):
    config = model_config(**kind, dropout=0.3)
    model = in_torch(config, lively_params(config)).train()
    ids = torch.tensor(IDS)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    for settings in ({"use_reentrant": False}, {"use_reentrant": True}):
        model.gradient_checkpointing_enable(settings)
        if settings["use_reentrant"]:
            model.enable_input_require_grads()
        for a, b in zip(plain, gradients(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_dropout_acts_in_training_alone(torch, model_config):
    config = model_config(dropout=0.5)
    model = in_torch(config, lively_params(config))
    ids = torch.tensor(IDS)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    whole = in_torch(model_config(), lively_params(model_config()))
    assert torch.equal(model.eval()(ids).logits, whole(ids).logits)


@pytest.mark.slow
@CONTEXTS
def test_trainer_fine_tunes_and_what_it_saves_comes_back(load, model_config, tmp_path, kind):
    import torch
    from transformers import Trainer, TrainingArguments

    config = model_config(**kind)
    folder = write_export(tmp_path / "out", config, init_params(config, jax.random.key(0)))
    model = load(folder)
    rows = [{"input_ids": row, "labels": row} for row in torch.tensor(IDS)] * 4
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=12,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        gradient_checkpointing=True,
        eval_strategy="steps",
        eval_steps=6,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0] - 1
    trainer.save_model(tmp_path / "tuned")
    again = load(tmp_path / "tuned")
    for (name, a), (other, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    from safetensors.numpy import load_file

    saved = load_file(tmp_path / "tuned" / "model.safetensors")
    assert saved.keys() == {weight.name for weight in weights_of(config)}
    ours = np.asarray(inl_jax.apply(config, from_named(saved.__getitem__, config), IDS))
    assert_near(logits_of(again, IDS), ours, 1e-5)


@pytest.mark.slow
@CONTEXTS
def test_model_made_from_a_config_starts_as_ours(torch, model_config, kind):
    from inl_jax.interop.exported.configuration_inl import InlConfig
    from inl_jax.interop.exported.modeling_inl import InlForCausalLM

    config = model_config(**kind, d_model=64, d_ff=128, controller_width=32)
    model = InlForCausalLM(InlConfig(**to_json_fields(config)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ours = to_named(init_params(config, jax.random.key(0)), config)
    theirs = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert theirs.keys() == ours.keys()
    for name, wanted in ours.items():
        assert theirs[name].shape == wanted.shape
        assert abs(theirs[name].mean() - wanted.mean()) < 0.1 + wanted.std(), name
        np.testing.assert_allclose(theirs[name].std(), wanted.std(), rtol=0.3, err_msg=name)


# --- the rest of the interface


@pytest.mark.slow
@CONTEXTS
def test_parts_of_the_output_are_parts_of_the_whole(torch, model_config, kind):
    config = model_config(**kind)
    model = in_torch(config, lively_params(config))
    ids = torch.tensor(IDS)
    whole = model(ids, output_hidden_states=True)
    assert len(whole.hidden_states) == config.num_layers + 1
    torch.testing.assert_close(model.lm_head(whole.hidden_states[-1]), whole.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
    chosen = torch.tensor([3, 7])
    torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, whole.logits[:, chosen])
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded.logits, whole.logits)
    as_tuple = model(ids, return_dict=False, use_cache=False)
    assert len(as_tuple) == 1 and torch.equal(as_tuple[0], whole.logits)


@pytest.mark.slow
def test_vocabulary_can_grow(torch, model_config):
    model = in_torch(model_config(), lively_params(model_config()))
    ids = torch.tensor(IDS)
    before = model(ids).logits
    model.resize_token_embeddings(310)
    after = model(ids, labels=ids)
    assert after.logits.shape == (*ids.shape, 310) and after.loss.isfinite()
    torch.testing.assert_close(after.logits[..., :300], before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
@CONTEXTS
def test_model_compiles_whole(torch, model_config, kind):
    config = model_config(**kind)
    model = in_torch(config, lively_params(config))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.tensor(IDS)
    found = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    found.sum().backward()


@pytest.mark.slow
@CONTEXTS
def test_autocast_keeps_states_in_float32(torch, model_config, kind):
    config = model_config(**kind)
    model = in_torch(config, init_params(config, jax.random.key(0)))
    ids = torch.tensor(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert_near(out.logits.float().detach().numpy(), logits_of(model, IDS), 0.05)
    layers = zip(model.config.contexts, model(ids).past_key_values.layers, strict=True)
    types = [layer.state.dtype for context, layer in layers if context != "attention"]
    assert set(types) <= {torch.float32}


@pytest.mark.slow
@CONTEXTS
def test_model_runs_from_a_device_map(load, model_config, tmp_path, kind):
    pytest.importorskip("accelerate")
    config = model_config(**kind)
    folder = write_export(tmp_path / "out", config, lively_params(config))
    parts = ["lm_head", *(f"model.{p}" for p in ("embed_tokens", "dropout", "layers.0", "norm"))]
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    offloaded = load(folder, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    whole = load(folder)
    inputs = left_padded(PROMPTS)
    assert continued(offloaded, *inputs) == continued(whole, *inputs)
