"""PyTorch's scaled_dot_product_attention for hyperattn-bench.

Reads one request a line, writes one answer a line:

    (at the start)              ready torch VERSION
    prepare name=value ...      prepared
    run                         seconds TIME

or `error SENTENCE`. Ends with its input.
"""

import sys
import time


def answer(*words):
    print(*words, flush=True)


def inputs(torch, settings):
    """Standard normal q, k, v, shaped [batch, heads, sequence, head_dim] whatever their order in memory."""
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[settings["dtype_q"]]
    batch, head_dim = int(settings["batch"]), int(settings["head_dim"])

    def make(heads, rows):
        if settings["layout"] == "bshd":
            return torch.randn(batch, rows, heads, head_dim).to(dtype).transpose(1, 2)
        return torch.randn(batch, heads, rows, head_dim).to(dtype)

    query = make(int(settings["heads_q"]), int(settings["n_q"]))
    key = make(int(settings["heads_kv"]), int(settings["n_k"]))
    return query, key, make(key.shape[1], key.shape[2])


def serve(torch):
    call = None
    for line in sys.stdin:
        word, *rest = line.split()
        try:
            if word == "prepare":
                # The old inputs make room first.
                call = None
                settings = dict(setting.split("=") for setting in rest)
                torch.set_num_threads(int(settings["threads"]))
                query, key, value = inputs(torch, settings)
                options = {"is_causal": settings["mask"] == "causal"}
                if query.shape[1] != key.shape[1]:
                    options["enable_gqa"] = True

                def call(query=query, key=key, value=value, options=options):
                    return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)

                answer("prepared")
            elif word == "run":
                start = time.perf_counter()
                result = call()
                seconds = time.perf_counter() - start
                del result
                answer("seconds", repr(seconds))
            else:
                answer("error unknown request", word)
        except Exception as error:  # The other side decides what it means.
            answer("error", " ".join(str(error).split()))


def main():
    try:
        import torch
    except Exception as error:
        answer("error torch cannot be imported:", " ".join(str(error).split()))
        return
    torch.manual_seed(0)
    with torch.inference_mode():
        answer("ready torch", torch.__version__)
        serve(torch)


if __name__ == "__main__":
    main()
