"""Tiny randomly initialised models and a tokenizer: nothing is fetched."""

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM


def decoder(kind, seed, layers=3, max_tokens=2048, **settings):
    """A causal model with grouped queries: kind is "llama" or "qwen2"."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_tokens,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def encoder(kind, seed, **settings):
    """A bidirectional model: kind is "bert" or "modernbert"."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        **settings,
    )
    return AutoModel.from_config(config).eval()


def tokens(seed, batch, count):
    """Random token numbers that are not special."""
    return torch.randint(3, 256, (batch, count), generator=torch.Generator().manual_seed(seed))
