"""PyTorch's scaled_dot_product_attention, or its gradients alone, for hyperattn-bench.

    peer_torch.py cpu|cuda

Reads one request a line, writes one answer a line:

    (at the start)                              ready torch VERSION
    prepare backend=BACKEND name=value ...      prepared
    run BACKEND COUNT WARM_UP                   seconds TIME ... (COUNT of them)

or `error SENTENCE`. Ends with its input. With WARM_UP 1 a call that is not timed goes before the others. Back ends of
the same problem share their inputs: on the CPU there is `default`, PyTorch's own choice, on a GPU `cudnn` and `flash`.
"""

import contextlib
import sys
import time


def answer(*words):
    print(*words, flush=True)


def sentence(error):
    return " ".join(str(error).split()) or type(error).__name__


def inputs(torch, settings, device):
    """Standard normal q, k, v, shaped [batch, heads, sequence, head_dim] whatever their order in memory."""
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[settings["dtype_q"]]
    # On a GPU they are drawn in place, as copies of long ones take their time.
    drawn = dtype if device == "cuda" else torch.float32
    batch, head_dim = int(settings["batch"]), int(settings["head_dim"])

    def make(heads, rows):
        if settings["layout"] == "bshd":
            shape = (batch, rows, heads, head_dim)
            return torch.randn(shape, device=device, dtype=drawn).to(dtype).transpose(1, 2)
        return torch.randn((batch, heads, rows, head_dim), device=device, dtype=drawn).to(dtype)

    query = make(int(settings["heads_q"]), int(settings["n_q"]))
    key = make(int(settings["heads_kv"]), int(settings["n_k"]))
    tensors = query, key, make(key.shape[1], key.shape[2])
    if settings["pass"] == "backward":
        for tensor in tensors:
            tensor.requires_grad_()
    return tensors


def on_cpu(torch):
    def choose(backend):
        return contextlib.nullcontext()

    def run(call, count, warm_up):
        if warm_up:
            call()
        times = []
        for _ in range(count):
            start = time.perf_counter()
            result = call()
            times.append(time.perf_counter() - start)
            del result
        return times

    return choose, run


def on_cuda(torch):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

    def choose(backend):
        return sdpa_kernel(backends[backend])

    def run(call, count, warm_up):
        # One event between two calls; all are enqueued before the first is waited for.
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        if warm_up:
            call()
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in zip(events, events[1:])]

    return choose, run


def attention(torch, tensors, settings):
    query, key, value = tensors
    options = {"is_causal": settings["mask"] == "causal"}
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    return lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)


def gradients(torch, tensors, out):
    # The first gradients of a process take a second, whatever they are of.
    number = torch.ones((), requires_grad=True)
    torch.autograd.grad(2 * number, number)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True)


def timed_call(torch, tensors, settings):
    """What is to be timed; for gradients one forward is behind it, of the back end whose they are."""
    call = attention(torch, tensors, settings)
    return gradients(torch, tensors, call()) if settings["pass"] == "backward" else call


def serve(torch, device):
    choose, run = on_cuda(torch) if device == "cuda" else on_cpu(torch)
    prepared, tensors, calls = None, None, {}
    for line in sys.stdin:
        word, *rest = line.split()
        try:
            if word == "prepare":
                settings = dict(setting.split("=") for setting in rest)
                backend = settings.pop("backend")
                if settings != prepared:
                    # The old inputs make room first.
                    prepared, tensors, calls = None, None, {}
                    if device == "cuda":
                        torch.cuda.empty_cache()
                    torch.set_num_threads(int(settings["threads"]))
                    tensors = inputs(torch, settings, device)
                    prepared = settings
                # A back end that cannot compute this says so here, and what it has to build first is not timed.
                with choose(backend), contextlib.redirect_stdout(sys.stderr):
                    calls[backend] = timed_call(torch, tensors, settings)
                    if device == "cuda":
                        run(calls[backend], 1, False)
                answer("prepared")
            elif word == "run":
                backend, count, warm_up = rest
                with choose(backend), torch.inference_mode(prepared["pass"] == "forward"):
                    times = run(calls[backend], int(count), warm_up == "1")
                answer("seconds", *map(repr, times))
            else:
                answer("error unknown request", word)
        except Exception as error:  # The other side decides what it means.
            answer("error", sentence(error))


def main():
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    try:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device")
    except Exception as error:
        answer("error torch cannot be used:", sentence(error))
        return
    torch.manual_seed(0)
    answer("ready torch", torch.__version__)
    serve(torch, device)


if __name__ == "__main__":
    main()
