"""Tiny randomly initialised models and a tokenizer: nothing is fetched."""

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM


def decoder(kind, seed, layers=3, max_tokens=2048, vocab_size=256, **settings):
    """A causal model with grouped queries: kind is "llama", "qwen2" or another of their family."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=vocab_size,
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


def save_with_tokenizer(model, folder):
    """The model and a tokenizer with one token for a byte, as a folder."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    specials = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: model.config.vocab_size - len(specials)]
    bytes_only = Tokenizer(BPE({symbol: number for number, symbol in enumerate(specials + alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer
