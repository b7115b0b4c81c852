"""hyperattn inside models of the transformers library, against its sdpa."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import decoder, encoder, tokens  # noqa: E402

import hyperattn.transformers  # noqa: E402
from hyperattn.transformers import replace, select_layers  # noqa: E402


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def near(got, wanted, bound=1e-4):
    assert (got - wanted).norm() / wanted.norm() < bound


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_exact_decoder(kind, seed):
    model, ids = decoder(kind, seed), tokens(seed, 2, 50)
    wanted = model(ids).logits
    with replace(model, method="exact") as replaced:
        near(model(ids).logits, wanted)
        assert [layer.calls for layer in replaced.layers] == [1, 1, 1]
        assert all(layer.seconds > 0 for layer in replaced.layers)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, wanted)


def test_attn_implementation(seed):
    """Without replace: every layer exact."""
    model, ids = decoder("llama", seed), tokens(seed, 1, 40)
    wanted = model(ids).logits
    model.set_attn_implementation("hyperattn")
    near(model(ids).logits, wanted)


def test_compile(seed):
    """The whole model is one graph."""
    model, ids = decoder("llama", seed, layers=1), tokens(seed, 1, 40)
    wanted = model(ids).logits
    model.set_attn_implementation("hyperattn")
    near(torch.compile(model, backend="eager", fullgraph=True)(ids).logits, wanted)


@pytest.mark.parametrize("kind, settings", [("bert", {}), ("modernbert", {"local_attention": 600})])
def test_exact_encoder(kind, settings, seed):
    model, ids = encoder(kind, seed, **settings), tokens(seed, 2, 60)
    wanted = model(ids).last_hidden_state
    with replace(model, method="exact", strict=True) as replaced:
        near(model(ids).last_hidden_state, wanted)
        assert [layer.calls for layer in replaced.layers] == [1, 1]


def test_encoder_with_a_window_in_reach(seed):
    """ModernBERT: every third layer sees everything, the others a window, which is sdpa's."""
    model, ids = encoder("modernbert", seed, local_attention=16), tokens(seed, 1, 60)
    wanted = model(ids).last_hidden_state
    with replace(model, method="exact") as replaced:
        near(model(ids).last_hidden_state, wanted)
        assert [(layer.calls, sum(layer.fallbacks.values())) for layer in replaced.layers] == [(1, 0), (0, 1)]


def test_paper_below_its_threshold_is_exact(seed):
    model, ids = decoder("llama", seed), tokens(seed, 1, 300)
    wanted = model(ids).logits
    with replace(model, method="paper", min_seq_len=300):
        near(model(ids).logits, wanted)


def test_only_the_chosen_layers_change(seed):
    """Hidden states before the first replaced layer stay, those after it differ."""
    model, ids = decoder("llama", seed), tokens(seed, 1, 300)
    wanted = model(ids, output_hidden_states=True).hidden_states
    settings = dict(method="paper", min_seq_len=64, block_size=16, sample_size=16, seed=seed)
    with replace(model, layers="last:1", **settings) as replaced:
        got = model(ids, output_hidden_states=True).hidden_states
        assert [layer.calls for layer in replaced.layers] == [0, 0, 1]
    near(got[2], wanted[2])
    assert (got[3] - wanted[3]).norm() / wanted[3].norm() > 1e-3


def test_offset_is_the_layer(seed):
    model, ids = decoder("llama", seed), tokens(seed, 1, 300)
    calls = []
    settings = dict(method="paper", min_seq_len=64, block_size=16, sample_size=16, seed=seed)
    with replace(model, layers="0,2", observer=calls.append, **settings):
        model(ids)
    assert [call.layer for call in calls] == [0, 2]
    for call in calls:
        where = dict(mask=call.mask, scale=call.scale, offset=call.layer)
        again = hyperattn.forward(call.q, call.k, call.v, **where, **settings)
        assert torch.equal(again, call.out)


@pytest.mark.parametrize("exact", ["hyperattn", "sdpa"])
def test_cache(exact, seed):
    """A prefill in two parts, then single tokens: the second part and the decoding see the whole cache."""
    model, ids = decoder("qwen2", seed), tokens(seed, 2, 60)
    wanted = model(ids).logits
    for layers in ("none", "all"):
        with replace(model, layers=layers, method="exact", exact=exact, strict=True) as replaced:
            cache = transformers.DynamicCache(config=model.config)
            parts = [model(part, past_key_values=cache).logits for part in ids.split([30, 25, 1, 1, 1, 1, 1], dim=1)]
            near(torch.cat(parts, dim=1), wanted)
            # Single queries are not the method's.
            assert all(layer.calls == (2 if layers == "all" else 0) for layer in replaced.layers)


def test_generate(seed):
    model, ids = decoder("llama", seed), tokens(seed, 1, 40)
    settings = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    wanted = model.generate(ids, **settings)
    with replace(model, method="paper", min_seq_len=64, strict=True):
        assert torch.equal(model.generate(ids, **settings), wanted)


def test_padding(seed):
    model, ids = decoder("llama", seed), tokens(seed, 2, 50)
    padded = torch.ones_like(ids)
    padded[0, :20] = 0
    wanted = model(ids, attention_mask=padded).logits
    with replace(model, method="exact") as replaced:
        got = model(ids, attention_mask=padded).logits
        near(got[0, 20:], wanted[0, 20:])
        near(got[1], wanted[1])
        assert all(layer.calls == 0 and list(layer.fallbacks.values()) == [1] for layer in replaced.layers)
        model(ids, attention_mask=torch.ones_like(ids))
        assert all(layer.calls == 1 for layer in replaced.layers)
    with replace(model, method="exact", strict=True):
        with pytest.raises(ValueError, match="padding"):
            model(ids, attention_mask=padded)


def test_static_cache(seed):
    """A cache with room for more keys than there are: the free places must not be seen."""
    model, ids = decoder("llama", seed), tokens(seed, 1, 40)
    wanted = model(ids).logits
    with replace(model, method="exact") as replaced:
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        near(model(ids, past_key_values=cache).logits, wanted)
        assert all(layer.calls == 0 for layer in replaced.layers)


def test_sliding_window(seed):
    """Layers whose window is shorter than the text are sdpa's."""
    model = decoder("qwen2", seed, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    ids = tokens(seed, 1, 50)
    wanted, wanted_short = model(ids).logits, model(ids[:, :15]).logits
    with replace(model, method="exact") as replaced:
        near(model(ids).logits, wanted)
        assert [layer.calls for layer in replaced.layers] == [1, 0, 0]
    with replace(model, method="exact", strict=True):
        near(model(ids[:, :15]).logits, wanted_short)


def gradients(model, ids):
    """Those of the loss of predicting each token, by parameter."""
    with torch.enable_grad():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gradients(kind, seed):
    """Exact ones are those of eager attention, with checkpoints in training too; padding is sdpa's."""
    model, ids = decoder(kind, seed), tokens(seed, 2, 50)
    model.set_attn_implementation("eager")
    wanted = gradients(model, ids)
    with replace(model, method="exact", strict=True) as replaced:
        got = gradients(model, ids)
        model.train().activation_checkpointing_enable()
        again = gradients(model, ids)
        assert [layer.calls for layer in replaced.layers] == [3, 3, 3]
    assert wanted and all(gradient.norm() > 0 for gradient in wanted.values())
    for name, gradient in wanted.items():
        near(got[name], gradient)
        near(again[name], gradient)


@pytest.mark.parametrize("method", ["paper", "refined"])
def test_training(method, seed):
    """A model learns a text by heart with an estimator in all of its layers."""
    model, ids = decoder("llama", seed, layers=2).train(), tokens(seed, 1, 300)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    few = dict(min_seq_len=64, block_size=16, sample_size=16, budget=64, num_first_keys=4, band=16, target_error=0.0)
    with replace(model, method=method, strict=True, **few), torch.enable_grad():
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_what_cannot_be_trained(seed):
    """Dropout in attention, and estimates of errors beside gradients."""
    with torch.enable_grad():
        model = encoder("bert", seed).train()
        with replace(model, method="exact"):
            with pytest.raises(ValueError, match="dropout, but attention has one of 0.1"):
                model(tokens(seed, 1, 20))
        model = decoder("llama", seed)
        with replace(model, method="paper", min_seq_len=8, estimate_errors=True):
            with pytest.raises(ValueError, match="estimate_errors"):
                model(tokens(seed, 1, 20))


def test_replace_twice_is_refused(seed):
    model = decoder("llama", seed)
    with replace(model):
        with pytest.raises(RuntimeError, match="already"):
            replace(model)
    replace(model).restore()


def test_select_layers():
    assert select_layers("all", 4) == [0, 1, 2, 3] and select_layers("none", 4) == []
    assert select_layers("last:3", 8) == [5, 6, 7] and select_layers("first:2", 8) == [0, 1]
    assert select_layers("every:2", 7) == [0, 2, 4, 6]
    assert select_layers("5,1,-1", 7) == [1, 5, 6] and select_layers([2, 0], 7) == [0, 2]
    for wrong in ("last:9", "last", "some", "every:0", "8", [-9]):
        with pytest.raises(ValueError, match="layers="):
            select_layers(wrong, 8)
