"""Needle retrieval: a fact placed at a depth inside filler text, asked for at the end.

One prefill for each method and depth with the chosen layers replaced; the answer is decoded greedily with exact
attention over the cache. The score is the share of depths at which the answer contains the number asked for.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import time
from typing import Any

import torch
import transformers

from hyperattn.transformers import attention_modules, replace, select_layers

from . import model as models
from . import report, settings
from .settings import Setting

_PLACES = ("Lisbon", "Nairobi", "Oslo", "Lima", "Hanoi", "Quito", "Tunis", "Dublin", "Jakarta", "Accra", "Riga")
_SUBJECTS = ("The ferry", "A gardener", "The old bridge", "Our neighbour", "The library", "A grey cat", "The baker")
_VERBS = ("waits near", "was painted beside", "remembers", "looks towards", "is older than", "often crosses")
_OBJECTS = ("the harbour", "a row of poplars", "the market square", "the railway", "the northern hills", "a quiet lane")
_TIMES = ("in the morning", "when it rains", "every autumn", "after supper", "on most days", "before the bell rings")

# What an answer depends on besides its prompt and its method.
_SAME_IN_BOTH_PARTS = ("model", "dtype", "text", "layers", "seed", "exact", "answer_tokens")


@dataclasses.dataclass(frozen=True)
class Needle:
    """The fact, the question and what the answer must contain."""

    fact: str
    question: str
    number: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument("--tokens", default="16384", help="lengths of the prompt, with commas")
    parser.add_argument("--depths", type=int, default=11, help="how many, evenly from the start to the end")
    parser.add_argument("--text", type=pathlib.Path, help="filler; generated sentences when missing")
    parser.add_argument("--layers", default="all", help="all, first:K, last:K, every:K or numbers with commas")
    settings.add_arguments(parser)
    parser.add_argument("--exact", default="hyperattn", choices=("hyperattn", "sdpa"), help="computes the rest")
    parser.add_argument("--answer-tokens", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path, help="folder for needle.csv and needle.json")
    parser.add_argument(
        "--resume", action="store_true", help="go on after an interruption, without the answers that --out has"
    )


def make_needle(generator: random.Random) -> Needle:
    place, number = generator.choice(_PLACES), str(generator.randrange(1_000_000, 10_000_000))
    return Needle(
        fact=f" The special magic number for {place} is {number}. ",
        question=f"What is the special magic number for {place}? Answer with the number only.",
        number=number,
    )


def _filler(generator: random.Random, sentences: int) -> str:
    parts = (_SUBJECTS, _VERBS, _OBJECTS, _TIMES)
    return " ".join(" ".join(generator.choice(words) for words in parts) + "." for _ in range(sentences))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _frame(tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """What stands before and after the filler."""
    if tokenizer.chat_template:
        mark = "<<filler>>"
        messages = [{"role": "user", "content": f"Read this text.\n\n{mark}\n\n{question}"}]
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, _, after = chat.partition(mark)
    else:
        before, after = "", f"\n\nQuestion: {question}\nAnswer:"
    return _encode(tokenizer, before), _encode(tokenizer, after)


def make_prompt(tokenizer: Any, filler: list[int], needle: Needle, tokens: int, depth: float) -> torch.Tensor:
    """`tokens` tokens: the filler's beginning with the fact after the share `depth` of it, then the question.

    The fact stands at a sentence's end where there is one within 64 tokens before its place.
    """
    before, after = _frame(tokenizer, needle.question)
    fact = _encode(tokenizer, needle.fact)
    room = tokens - len(before) - len(after) - len(fact)
    if not 0 <= room <= len(filler):
        raise ValueError(f"a prompt of {tokens} tokens needs {room} tokens of filler, there are {len(filler)}")
    cut = round(depth * room)
    ends = (p for p in range(cut, max(cut - 64, 0), -1) if tokenizer.decode(filler[p - 1 : p]).rstrip().endswith("."))
    cut = next(ends, cut)
    return torch.tensor([[*before, *filler[:cut], *fact, *filler[cut:room], *after]])


def answer(model: Any, tokenizer: Any, ids: torch.Tensor, count: int) -> str:
    """Greedy decoding after one prefill, whose logits are computed for the last token only."""
    cache = transformers.DynamicCache(config=model.config)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    chosen: list[int] = []
    step = ids
    while len(chosen) < count:
        logits = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        chosen.append(int(logits[0, -1].argmax()))
        if chosen[-1] in ends:
            break
        step = torch.tensor([chosen[-1:]])
    return str(tokenizer.decode(chosen, skip_special_tokens=True))


def _question(depth: float, needle: Needle, ids: torch.Tensor, setting: Setting) -> dict[str, Any]:
    """The columns that say what was asked."""
    return {"tokens": ids.shape[1], "method": str(setting), "depth": round(depth, 4), "number": needle.number}


def _earlier_answers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What an interrupted evaluation has left in --out."""
    if options.out is None:
        raise ValueError("--resume: --out says where the answers are")
    path = options.out / "needle.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    for name in _SAME_IN_BOTH_PARTS:
        before, now = content["settings"][name], getattr(options, name)
        if str(before) != str(now):
            raise ValueError(f"--resume: {path} has answers with {name} {before}, not {now}")
    answers: list[dict[str, Any]] = content["answers"]
    return answers


def _measure(
    model: Any,
    tokenizer: Any,
    depth: float,
    needle: Needle,
    ids: torch.Tensor,
    setting: Setting,
    options: argparse.Namespace,
) -> dict[str, Any]:
    layers = select_layers(options.layers, len(attention_modules(model)))
    started = time.perf_counter()
    with replace(
        model,
        layers,
        setting.method,
        exact=options.exact,
        threads=options.threads,
        **{"seed": options.seed, **setting.params},
    ) as replaced:
        text = answer(model, tokenizer, ids, options.answer_tokens)
        attention = sum(layer.seconds for layer in replaced.layers)
    report.progress(f"{setting}, {ids.shape[1]} tokens, depth {depth:.2f}: {text.strip()!r} for {needle.number}")
    row = _question(depth, needle, ids, setting) | {"answer": text, "found": needle.number in text}
    return row | {"attention_seconds": attention, "seconds": time.perf_counter() - started}


def _summaries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each length and method."""
    lines = []
    for length, method in dict.fromkeys((row["tokens"], row["method"]) for row in rows):
        chosen = [row for row in rows if (row["tokens"], row["method"]) == (length, method)]
        found = [row["found"] for row in chosen]
        line = {"method": method, "tokens": length, "found": f"{sum(found)} of {len(found)}"}
        line["by depth"] = "".join("x" if one else "." for one in found)
        lines.append(line | {"seconds each": sum(row["seconds"] for row in chosen) / len(chosen)})
    return lines


def run(options: argparse.Namespace) -> None:
    methods = settings.parse(options)
    lengths = [int(length) for length in options.tokens.split(",")]
    model, tokenizer = models.load(options)
    if options.text:
        text = options.text.read_text()
    else:
        text = _filler(random.Random(options.seed), max(lengths) // 4 + 64)
    filler = _encode(tokenizer, text)
    depths = [step / max(options.depths - 1, 1) for step in range(options.depths)]
    prompts = []
    for length in lengths:
        generator = random.Random(f"{options.seed} {length}")
        for depth in depths:
            needle = make_needle(generator)
            prompts.append((depth, needle, make_prompt(tokenizer, filler, needle, length, depth)))
    questions = [(*prompt, setting) for prompt in prompts for setting in methods]
    asked = [_question(*question) for question in questions]
    earlier = _earlier_answers(options) if options.resume else []
    answers = [next((row for row in earlier if row.items() >= columns.items()), None) for columns in asked]
    if options.resume:
        report.progress(f"{sum(row is not None for row in answers)} of {len(answers)} answers are there")
    with torch.no_grad():
        for place, (depth, needle, ids, setting) in enumerate(questions):
            if answers[place] is not None:
                continue
            answers[place] = _measure(model, tokenizer, depth, needle, ids, setting, options)
            if options.out:
                # After every answer: a long evaluation that is interrupted keeps what it has.
                _write(options, [row for row in answers if row is not None])
    lines = _summaries([row for row in answers if row is not None])
    print(report.table(lines, list(lines[0])))


def _write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    report.write_csv(options.out / "needle.csv", rows)
    report.write_json(options.out / "needle.json", vars(options), {"summary": _summaries(rows), "answers": rows})
