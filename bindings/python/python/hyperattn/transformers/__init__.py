"""hyperattn as an attention implementation of the transformers library.

Importing this module registers "hyperattn": `from_pretrained(..., attn_implementation="hyperattn")` then computes
every layer exactly. `replace` gives chosen layers another method:

    with hyperattn.transformers.replace(model, layers="last:6", method="paper", min_seq_len=1024) as replaced:
        model(input_ids)
    print([layer.seconds for layer in replaced.layers])
"""

from transformers import AttentionInterface, AttentionMaskInterface

from ._attention import attention
from ._layer import Call, Layer
from ._layers import attention_modules, select_layers
from ._mask import mask
from ._replace import Replacement, replace

AttentionInterface.register("hyperattn", attention)
AttentionMaskInterface.register("hyperattn", mask)

__all__ = ["Call", "Layer", "Replacement", "attention", "attention_modules", "mask", "replace", "select_layers"]
