"""`loratool eval`: the loss is transformers' and PEFT's own, of what the model must say, at every rank; bad lines are named."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import bitsandbytes
import matplotlib
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_adapters import copy_with, save_plain_adapter, save_single_file
from tiny_models import VOCABULARY, digest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import loratool
from loratool.cli import main
from loratool.cli.rendering import bar
from loratool.errors import CheckpointError, DataError, LoratoolError, PlacementError, UnsupportedError
from loratool.formats.read import read_adapter
from loratool.running.data import IGNORED, Chat, Completion, Document, Text, TokenizedSample, read_data, tokenize_data
from loratool.running.model import beside

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

REPOSITORY = Path(__file__).parents[1]
CONTEXT = 64
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role[0] }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>a\n{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}{{ message.role }}:"
    "{% if loop.last or message.role == 'user' %}{{ message.content }}{% else %}...{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Writes the assistant's earlier turns otherwise than its last."""

TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "a cat"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "a dog"},
    {"role": "assistant", "content": "the dog sat"},
]


def tiny_tokenizer(
    *, template: str = "", begin: bool = False, eos: str = "</s>"
) -> transformers.PreTrainedTokenizerFast:
    """A byte-pair tokenizer of 131 tokens for printable ASCII; with `begin` every text begins with ``<s>``."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    ascii_letters = ["\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=ascii_letters, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog sat on the cat"] * 4, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, unk_token="<unk>"
    )
    wrapped.chat_template = template or None
    return wrapped


def with_tokenizer(model: Path, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> Path:
    """A copy of the model with a tokenizer that works."""
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return with_tokenizer(tiny_models.folder("llama", "bf16"), tmp_path / "llama", tiny_tokenizer(template=CHATML))


@pytest.fixture
def adapter(tiny_adapters: TinyAdapters) -> Path:
    return tiny_adapters.folder("llama")


@pytest.fixture
def nf4(base: Path, tmp_path: Path) -> Path:
    """The tiny llama in NF4 with double quantization, as transformers saves it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.bfloat16,
        device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model.save_pretrained(tmp_path / "nf4")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "nf4")
    return tmp_path / "nf4"


def write_lines(file: Path, *entries: Any) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One sample of each kind, of different lengths."""
    return write_lines(
        tmp_path / "data.jsonl",
        {"text": "the cat sat on the mat"},
        {"prompt": "what sat", "completion": "the dog", "source": "me"},
        {"messages": TURNS},
        {"text": "a dog"},
        {"prompt": "", "completion": "a cat sat"},
    )


def dense(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def mean_loss(model: Any, samples: Sequence[TokenizedSample]) -> float:
    """transformers' own loss of each sample by itself, weighted by its tokens."""
    summed, tokens = 0.0, 0
    for sample in samples:
        labels = torch.tensor([sample.labels])
        count = int((labels[:, 1:] != IGNORED).sum())
        with torch.no_grad():
            summed += count * float(model(input_ids=torch.tensor([sample.input_ids]), labels=labels).loss)
        tokens += count
    return summed / tokens


def tokenized(folder: Path, data: Path, **options: Any) -> list[TokenizedSample]:
    return tokenize_data(read_data(data), transformers.AutoTokenizer.from_pretrained(folder), CONTEXT, **options)


def counted(sample: TokenizedSample, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """The tokens that count, one after the other."""
    return " ".join(tokenizer.convert_ids_to_tokens([label for label in sample.labels if label != IGNORED]))


# The loss


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_loss_is_transformers_own_over_all_tokens_whatever_the_batch(
    base: Path, data: Path, batch_size: int
) -> None:
    result = loratool.eval(base, data, batch_size=batch_size, device="cpu")
    samples = tokenized(base, data)
    assert result.score.loss == pytest.approx(mean_loss(dense(base), samples), abs=2e-6)
    assert result.score.perplexity == pytest.approx(math.exp(result.score.loss))
    assert result.score.tokens == sum(sample.scored_tokens for sample in samples)
    assert (result.samples, result.adapter, result.without_adapter, result.gap) == (5, None, None, None)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox", "mistral", "qwen2", "gemma"])
def test_padding_changes_no_loss_whatever_way_positions_are_counted(
    architecture: str, tiny_models: TinyModels, tmp_path: Path, data: Path
) -> None:
    model = with_tokenizer(
        tiny_models.folder(architecture, "fp32"), tmp_path / architecture, tiny_tokenizer(template=CHATML)
    )
    result = loratool.eval(model, data, batch_size=3, device="cpu")
    assert result.score.loss == pytest.approx(mean_loss(dense(model), tokenized(model, data)), abs=2e-6)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_every_stored_type_is_computed_in_fp32(dtype: str, tiny_models: TinyModels, tmp_path: Path, data: Path) -> None:
    model = with_tokenizer(tiny_models.folder("llama", dtype), tmp_path / dtype, tiny_tokenizer(template=CHATML))
    result = loratool.eval(model, data, device="cpu")
    exact = dense(model).double()
    assert result.score.loss == pytest.approx(mean_loss(exact, tokenized(model, data)), abs=2e-6)


def test_the_loss_with_an_adapter_is_pefts_beside_that_of_the_model_alone(
    base: Path, adapter: Path, data: Path
) -> None:
    result = loratool.eval(base, data, adapter=adapter, device="cpu")
    samples = tokenized(base, data)
    alone = mean_loss(dense(base), samples)
    beside = mean_loss(peft.PeftModel.from_pretrained(dense(base), adapter).eval(), samples)
    assert abs(alone - beside) > 1e-3, "the adapter does too little to be seen"
    assert result.without_adapter is not None
    assert result.without_adapter.loss == pytest.approx(alone, abs=2e-6)
    assert result.score.loss == pytest.approx(beside, abs=2e-6)
    assert result.gap == pytest.approx(beside - alone, abs=4e-6)


def test_an_adapter_may_be_a_file_or_catalogued_and_its_scaling_is_its_own(
    base: Path, tiny_adapters: TinyAdapters, data: Path, tmp_path: Path
) -> None:
    folder = tiny_adapters.folder("llama", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5})
    expected = loratool.eval(base, data, adapter=folder, device="cpu").score.loss
    assert expected == pytest.approx(
        mean_loss(peft.PeftModel.from_pretrained(dense(base), folder).eval(), tokenized(base, data)), abs=2e-6
    )
    single = save_single_file(folder, tmp_path / "single.st")
    loratool.base_add("llama", base)
    loratool.add(folder, name="pirate", base="llama")
    for name in (single, "pirate", "pirate@1"):
        assert loratool.eval("llama", data, adapter=name, device="cpu").score.loss == expected


def test_a_bare_file_is_measured_with_the_alpha_that_is_given(base: Path, data: Path, tmp_path: Path) -> None:
    module = "model.layers.1.mlp.up_proj"
    folder = save_plain_adapter(tmp_path / "adapter", {module: (172, 64)}, r=4)
    bare = shutil.copyfile(folder / "adapter_model.safetensors", tmp_path / "bare.safetensors")
    expected = loratool.eval(base, data, adapter=folder, device="cpu").gap
    assert expected != 0
    assert loratool.eval(base, data, adapter=bare, alpha=8, device="cpu").gap == expected
    assert loratool.eval(base, data, adapter=bare, alpha=16, device="cpu").gap != expected


def test_a_merged_model_has_the_loss_of_its_base_with_the_adapter_beside_it(
    tiny_models: TinyModels, adapter: Path, data: Path, tmp_path: Path
) -> None:
    base = with_tokenizer(tiny_models.folder("llama", "fp32"), tmp_path / "fp32", tiny_tokenizer(template=CHATML))
    beside = loratool.eval(base, data, adapter=adapter, device="cpu").score.loss
    merged = loratool.merge(adapter, into=base, out=tmp_path / "merged", device="cpu").out
    assert loratool.eval(merged, data, device="cpu").score.loss == pytest.approx(beside, abs=5e-6)


def dequantized(nf4: Path, base: Path) -> Any:
    """The model in fp32 with the weights that bitsandbytes decodes from NF4."""
    stored = transformers.AutoModelForCausalLM.from_pretrained(nf4, device_map="cpu")
    model = dense(base)
    for name, module in stored.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            decoded = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            model.get_submodule(name).weight.data = decoded.view(state.shape)
    return model


def test_an_nf4_model_has_the_loss_of_its_decoded_weights_in_fp32(
    nf4: Path, base: Path, adapter: Path, data: Path
) -> None:
    model, samples = dequantized(nf4, base), tokenized(base, data)
    alone = mean_loss(model, samples)
    beside = mean_loss(peft.PeftModel.from_pretrained(model, adapter).eval(), samples)
    assert abs(alone - mean_loss(dense(base), samples)) > 1e-4, "NF4 changes too little to be seen"
    result = loratool.eval(nf4, data, adapter=adapter, device="cpu", batch_size=2)
    assert result.without_adapter is not None
    assert result.without_adapter.loss == pytest.approx(alone, abs=5e-6)
    assert result.score.loss == pytest.approx(beside, abs=5e-6)


def test_nothing_is_written_beside_the_model_or_the_data(
    base: Path, adapter: Path, data: Path, tmp_path: Path, home_of_its_own: Path
) -> None:
    before = digest(tmp_path), digest(adapter)
    loratool.eval(base, data, adapter=adapter, device="cpu")
    assert (digest(tmp_path), digest(adapter)) == before
    assert list(home_of_its_own.iterdir()) == []


@pytest.mark.gpu
def test_on_cuda_the_loss_is_the_same_but_for_the_stored_types_rounding(base: Path, adapter: Path, data: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    ours, exact = (loratool.eval(base, data, adapter=adapter, device=device) for device in ("cuda", "cpu"))
    assert ours.device == "cuda:0"
    assert ours.score.loss == pytest.approx(exact.score.loss, abs=0.02)
    assert ours.gap == pytest.approx(exact.gap, abs=0.02)


# What counts


def test_every_token_of_a_text_counts_and_it_has_the_tokenizers_special_tokens(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "x.jsonl", {"text": "the cat"})
    tokenizer = tiny_tokenizer(template=CHATML, begin=True)
    (sample,) = tokenize_data(read_data(file), tokenizer, CONTEXT)
    assert sample.input_ids == tuple(tokenizer("the cat")["input_ids"]) == sample.labels
    assert sample.input_ids[0] == tokenizer.bos_token_id
    assert sample.scored_tokens == len(sample.input_ids) - 1


def test_of_a_completion_without_template_all_after_the_prompt_counts_and_the_end_token(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "x.jsonl", {"prompt": "the cat", "completion": " sat on"})
    tokenizer = tiny_tokenizer(begin=True)
    (sample,) = tokenize_data(read_data(file), tokenizer, CONTEXT)
    prompt = tokenizer("the cat")["input_ids"]
    assert sample.input_ids == tuple(tokenizer("the cat sat on</s>")["input_ids"])
    assert sample.labels[: len(prompt)] == (IGNORED,) * len(prompt)
    assert sample.labels[len(prompt) :] == sample.input_ids[len(prompt) :]
    assert sample.labels[-1] == tokenizer.eos_token_id


def test_a_completion_is_the_assistants_turn_of_a_chat_unless_it_is_plain(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(template=CHATML, eos="<|im_end|>")
    pair = write_lines(tmp_path / "pair.jsonl", {"prompt": "a cat", "completion": "the cat"})
    chat = write_lines(tmp_path / "chat.jsonl", {"messages": TURNS[1:3]})
    assert tokenize_data(read_data(pair), tokenizer, CONTEXT) == tokenize_data(read_data(chat), tokenizer, CONTEXT)
    (plain,) = tokenize_data(read_data(pair), tokenizer, CONTEXT, plain=True)
    assert plain.input_ids == tuple(tokenizer("a catthe cat<|im_end|>")["input_ids"])


def test_a_token_across_the_end_of_the_prompt_counts_and_the_text_is_tokenized_as_a_whole(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.tokenize("the cat") == ["▁the", "▁cat"]
    file = write_lines(tmp_path / "x.jsonl", {"prompt": "the c", "completion": "at"})
    (sample,) = tokenize_data(read_data(file), tokenizer, CONTEXT)
    assert tokenizer.convert_ids_to_tokens(list(sample.input_ids)) == ["▁the", "▁cat", "</s>"]
    assert counted(sample, tokenizer) == "▁cat </s>"


words = st.text(st.sampled_from("the catsondmg,."), max_size=12)


@given(prompt=words, completion=words.filter(str.strip))
def test_the_tokens_that_count_spell_the_completion_and_at_most_a_part_of_a_token_more(
    prompt: str, completion: str
) -> None:
    tokenizer = TOKENIZER
    data = loratool.running.data.Data(Path("x"), (Completion(1, prompt, completion),))
    (sample,) = tokenize_data(data, tokenizer, CONTEXT)
    whole = tokenizer(prompt + completion + "</s>", return_offsets_mapping=True)
    assert list(sample.input_ids) == whole["input_ids"]
    ignored = [end for label, (_, end) in zip(sample.labels, whole["offset_mapping"], strict=True) if label == IGNORED]
    chosen = [place for label, place in zip(sample.labels, whole["offset_mapping"], strict=True) if label != IGNORED]
    assert all(end <= len(prompt) for end in ignored)
    assert all(end > len(prompt) for _, end in chosen)


TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize(
    "turns", [TURNS, TURNS[1:3], TURNS[:3] + TURNS[4:], [*TURNS, {"role": "user", "content": "so"}]]
)
def test_of_a_chat_that_counts_which_transformers_takes_for_the_assistants(
    turns: list[dict[str, str]], tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(template=CHATML, begin=True)
    (sample,) = tokenize_data(read_data(write_lines(tmp_path / "x.jsonl", {"messages": turns})), tokenizer, 100)
    theirs = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    assert list(sample.input_ids) == theirs["input_ids"]
    assert [int(label != IGNORED) for label in sample.labels] == theirs["assistant_masks"]
    assert sum(theirs["assistant_masks"]) > 2


def test_a_text_file_is_cut_into_windows_that_together_hold_every_token_once(tmp_path: Path) -> None:
    text = "the cat sat on the mat\n\nthe dog sat " * 9
    (tmp_path / "x.txt").write_text(text)
    for begin in (False, True):
        tokenizer = tiny_tokenizer(begin=begin)
        windows = tokenize_data(read_data(tmp_path / "x.txt"), tokenizer, 16)
        assert all(window.labels == window.input_ids for window in windows)
        assert [len(window.input_ids) for window in windows[:-1]] == [16] * (len(windows) - 1)
        assert all((window.input_ids[0] == tokenizer.bos_token_id) == begin for window in windows)
        tokens = [token for window in windows for token in window.input_ids[begin:]]
        assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"][: len(tokens)]
        assert 0 <= len(tokenizer(text, add_special_tokens=False)["input_ids"]) - len(tokens) <= 1


def test_data_are_read_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(
        '\ufeff{"text": "a\u2028b"}\r\n{"prompt": "", "completion": "c"}\n{"messages": [], "text": 1}'.encode()
    )
    with pytest.raises(DataError, match="line 3"):
        read_data(file)
    file.write_bytes(file.read_bytes().rsplit(b"\n", 1)[0])
    assert read_data(file).samples == (Text(1, "a\u2028b"), Completion(2, "", "c"))
    write_lines(file, {"messages": TURNS, "prompt": "as the Hub's chat data have it"})
    assert read_data(file).samples == (Chat(1, tuple(TURNS)),)
    for name in ("x.txt", "X.TXT"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
        assert read_data(tmp_path / name).samples == (Document("one\n\ntwo\n"),)


def test_data_are_read_without_torch(data: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from loratool.running.data import read_data
read_data(Path({str(data)!r}))
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0


# What is refused

BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"nonsense", "is not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "is not JSON"),
    "too deep": (b"[" * 100_000, "is not JSON"),
    "no object": (b'["text"]', "not an object"),
    "empty": (b"", "is empty"),
    "blank": (b"  \t", "is empty"),
    "none of the keys": (b'{"body": "x"}', "'text', or 'prompt' and 'completion', or 'messages'"),
    "a prompt alone": (b'{"prompt": "x"}', "has 'prompt'"),
    "two kinds": (b'{"text": "x y", "messages": []}', "either"),
    "an empty text": (b'{"text": " "}', "empty 'text'"),
    "an empty completion": (b'{"prompt": "x", "completion": ""}', "empty 'completion'"),
    "a text that is a number": (b'{"text": 3}', "not a string"),
    "half a character": (b'{"text": "a\\ud800"}', "surrogate"),
    "messages that are no list": (b'{"messages": "hello"}', "not a list"),
    "messages that are no objects": (b'{"messages": ["hello"]}', "not a list of objects"),
    "a message without role": (b'{"messages": [{"content": "x"}]}', "role of message 1"),
    "a message without content": (b'{"messages": [{"role": "user"}]}', "content of message 1"),
    "no assistant": (b'{"messages": [{"role": "user", "content": "x"}]}', "'assistant'"),
    "an assistant that says nothing": (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}',
        "empty 'content of message 2'",
    ),
    "an assistant first": (b'{"messages": [{"role": "assistant", "content": "x"}]}', "begins with the assistant"),
    "longer than the context": (b'{"text": "' + b"zq" * CONTEXT + b'"}', "129 tokens long and 64 are allowed"),
    "one token": (b'{"text": "cat"}', "fewer than two tokens"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``loratool eval WORDS...`` in this process."""

    def call(*words: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["loratool", "eval", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return Outcome(int(left.value.code or 0), printed.out, printed.err)

    return call


def assert_refused(done: Outcome, part: str) -> None:
    assert (done.status, done.out) == (1, "")
    assert re.fullmatch(r"Error: [^\n]{20,700}\n", done.err)
    assert "unexpected" not in done.err
    assert part in done.err


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_no_sample_is_named(case: str, base: Path, tmp_path: Path, run: Callable[..., Outcome]) -> None:
    line, problem = BAD_LINES[case]
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"text": "a good one"}\n' + line + b'\n{"text": "another one"}\n')
    done = run(base, "--data", file)
    assert_refused(done, problem)
    assert f"line 2 of '{file}'" in done.err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["BASE", "--data", "nothing.jsonl"], "there is no data at 'nothing.jsonl'"),
        (["BASE", "--data", "."], "Is a directory"),
        (["BASE", "--data", "/dev/zero"], "is a device"),
        (["BASE", "--data", "BASE/model.safetensors"], "is not JSON"),
        (["BASE", "--data", "empty.jsonl"], "is empty"),
        (["BASE", "--data", "short.txt"], "fewer than two tokens"),
        (["BASE", "--data", "bytes.txt"], "line 2 of 'bytes.txt' is not UTF-8"),
        (["nobody", "--data", "DATA"], "'nobody'"),
        (["./nowhere", "--data", "DATA"], "there is no model"),
        (["BASE/model.safetensors", "--data", "DATA"], "single file"),
        (["ADAPTER", "--data", "DATA"], "configuration"),
        (["BASE", "--data", "DATA", "--adapter", "nobody"], "'nobody'"),
        (["BASE", "--data", "DATA", "--adapter", "ADAPTER", "--alpha", "2"], "alpha"),
        (["BASE", "--data", "DATA", "--max-length", "1"], "--max-length"),
        (["BASE", "--data", "DATA", "--max-length", "65"], "64 tokens at most"),
        (["BASE", "--data", "DATA", "--max-length", "20"], "line 3 of"),
        (["BASE", "--data", "DATA", "--batch-size", "0"], "--batch-size"),
        (["BASE", "--data", "DATA", "--device", "cuda:99"], "there is no device"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_exit_status_1(
    words: list[str],
    problem: str,
    base: Path,
    adapter: Path,
    data: Path,
    tmp_path: Path,
    run: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n\n")
    Path("short.txt").write_text("cat")
    Path("bytes.txt").write_bytes(b"cat\n\xff")
    places = {"BASE": str(base), "ADAPTER": str(adapter), "DATA": str(data)}
    done = run(*(re.sub("BASE|ADAPTER|DATA", lambda match: places[match[0]], word) for word in words))
    assert_refused(done, problem)


def test_samples_that_are_cut_are_counted_and_said(base: Path, tmp_path: Path, run: Callable[..., Outcome]) -> None:
    lines = ["the cat sat on the mat " * 4, "a dog", "the dog sat on the mat " * 4]
    data = write_lines(tmp_path / "long.jsonl", *({"text": line} for line in lines))
    words = (base, "--data", data, "--max-length", "12", "--truncate")
    printed = json.loads(run(*words, "--json").out)

    assert (printed["samples"], printed["truncated"]) == (3, 2)
    assert "3 samples (2 of them cut), " in run(*words).out


def rewritten(model: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_a_model_that_transformers_cannot_compute_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    cases = {
        "another quantization": (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            UnsupportedError,
            "gptq",
        ),
        "an unknown architecture": ({"model_type": "no-such-model"}, CheckpointError, "no-such-model"),
        "other shapes": ({"hidden_size": 32}, CheckpointError, "transformers cannot load the model"),
        "more layers than are stored": ({"num_hidden_layers": 3}, CheckpointError, "lacks"),
        "code of its own": (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
            CheckpointError,
            "configuration",
        ),
    }
    for place, (config, kind, problem) in enumerate(cases.values()):
        folder = rewritten(base, tmp_path / str(place), **config)
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(kind, match=problem):
            loratool.eval(folder, data, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_model_without_a_tokenizer_or_with_anothers_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    without = shutil.copytree(base, tmp_path / "without")
    for file in without.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        loratool.eval(without, data, device="cpu")
    larger = tiny_tokenizer(template=CHATML)
    larger.add_tokens([f"zebra-{number}-" for number in range(VOCABULARY)])
    with pytest.raises(CheckpointError, match="the model has only 131"):
        loratool.eval(
            with_tokenizer(base, tmp_path / "larger", larger),
            write_lines(tmp_path / "mat.jsonl", {"text": "a zebra-130-"}),
            device="cpu",
        )


def test_a_model_whose_weights_are_pickled_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoratoolError, match="is a pickle"):
        loratool.eval(folder, data, device="cpu")


def test_a_model_whose_numbers_are_not_finite_is_refused(tiny_models: TinyModels, data: Path, tmp_path: Path) -> None:
    model = dense(tiny_models.folder("llama", "fp32"))
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer(template=CHATML).save_pretrained(tmp_path / "nan")
    with pytest.raises(LoratoolError, match="not finite"):
        loratool.eval(tmp_path / "nan", data, device="cpu")


def test_an_adapter_that_does_not_fit_is_refused(
    base: Path, adapter: Path, tiny_adapters: TinyAdapters, data: Path, tmp_path: Path
) -> None:
    unfit = {
        "other shapes": tiny_adapters.folder("mistral"),
        "no module of its name": tiny_adapters.folder("gpt2"),
        "one tensor too many": copy_with(adapter, tmp_path / "x", lambda key: key.replace("layers.1", "layers.9")),
    }
    for case, folder in unfit.items():
        with pytest.raises(PlacementError, match="does not fit the model") as refused:
            loratool.eval(base, data, adapter=folder, device="cpu")
        assert "\n" not in str(refused.value), case


def test_an_adapter_of_another_catalogued_base_is_measured_with_a_note(
    base: Path, tiny_models: TinyModels, adapter: Path, data: Path
) -> None:
    loratool.base_add("bf16", base)
    loratool.base_add("fp32", tiny_models.folder("llama", "fp32"))
    loratool.add(adapter, name="pirate", base="fp32")
    assert any(
        "belongs to another base" in note for note in loratool.eval("bf16", data, adapter="pirate", device="cpu").notes
    )
    loratool.add(adapter, name="sailor", base="bf16", any_base=True)
    assert loratool.eval("bf16", data, adapter="sailor", device="cpu").notes == ()


def test_a_chat_that_its_template_cannot_hold_is_named(base: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "x.jsonl", {"messages": TURNS[1:]})
    templates = {
        "": "no chat template",
        FORGETFUL: "message 2 an assistant's turn that the model's chat template renders differently",
        "{{ raise_exception('roles must alternate') }}": "roles must alternate",
        "{% for": "does not fit the model's chat template",
    }
    for template, problem in templates.items():
        with pytest.raises(DataError, match=problem) as refused:
            tokenize_data(read_data(file), tiny_tokenizer(template=template), CONTEXT)
        assert f"line 1 of '{file}'" in str(refused.value)


def test_without_transformers_the_extra_to_install_is_named(
    base: Path, data: Path, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert_refused(run(base, "--data", data), "pip install 'loratool[train]'")


# By rank


def with_updates(model: Any, adapter: Path, rank: int) -> Any:
    """The dense model with the best approximation of that rank of each module's update, by numpy in float64, added."""
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter)
    for name, layer in wrapped.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            a, b = (
                getattr(layer, factor)["default"].weight.detach().double().numpy() for factor in ("lora_A", "lora_B")
            )
            u, s, v = np.linalg.svd(layer.scaling["default"] * b @ a)
            best = torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank]).float()
            model.get_submodule(name.removeprefix("base_model.model.")).weight.data += best
    return model


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "lora",
    [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2, "1.self_attn.v_proj": 6}, "alpha_pattern": {"v_proj": 5}}],
    ids=["plain", "patterns"],
)
def test_cut_to_a_rank_an_adapter_is_the_best_approximation_of_its_update(
    lora: dict[str, Any], rank: int, base: Path, tiny_adapters: TinyAdapters, data: Path
) -> None:
    adapter, samples = tiny_adapters.folder("llama", **lora), tokenized(base, data)
    result = loratool.eval(base, data, adapter=adapter, ranks=[rank], device="cpu")
    expected = mean_loss(with_updates(dense(base), adapter, rank), samples)
    assert abs(expected - result.score.loss) > 1e-4, "the cut does too little to be seen"
    assert result.ranks[0].rank == rank
    assert result.ranks[0].score.loss == pytest.approx(expected, abs=5e-6)


def test_an_nf4_model_is_measured_by_rank_too(nf4: Path, base: Path, adapter: Path, data: Path) -> None:
    result = loratool.eval(nf4, data, adapter=adapter, ranks=[2], device="cpu")
    expected = mean_loss(with_updates(dequantized(nf4, base), adapter, 2), tokenized(base, data))
    assert abs(expected - result.score.loss) > 1e-4, "the cut does too little to be seen"
    assert result.ranks[0].score.loss == pytest.approx(expected, abs=5e-6)


def test_cut_to_a_rank_a_dylora_is_its_first_components_times_alpha_by_the_rank(
    base: Path, adapter: Path, data: Path, tmp_path: Path
) -> None:
    dylora, first = copy_with(adapter, tmp_path / "dylora"), copy_with(adapter, tmp_path / "first", r=2)
    (dylora / "loratool.json").write_text('{"kind": "dylora"}')
    factors = load_file(first / "adapter_model.safetensors")
    cut = {key: factor[:2] if "lora_A" in key else factor[:, :2].clone() for key, factor in factors.items()}
    save_file(cut, first / "adapter_model.safetensors")
    expected = mean_loss(peft.PeftModel.from_pretrained(dense(base), first).eval(), tokenized(base, data))
    result = loratool.eval(base, data, adapter=dylora, ranks=[2], device="cpu")
    assert result.ranks[0].score.loss == pytest.approx(expected, abs=2e-6)
    as_lora = loratool.eval(base, data, adapter=adapter, ranks=[2], device="cpu")
    assert abs(as_lora.ranks[0].score.loss - expected) > 1e-4, "both kinds are cut alike"


def test_ranks_rise_and_end_with_the_adapters_own_and_none_depends_on_another(
    base: Path, adapter: Path, data: Path
) -> None:
    result = loratool.eval(base, data, adapter=adapter, ranks=[3, 1, 3], device="cpu")
    assert [each.rank for each in result.ranks] == [1, 3, 4]
    assert result.ranks[-1].score == result.score
    alone = loratool.eval(base, data, adapter=adapter, ranks=[3], device="cpu")
    assert alone.ranks[0].score.loss == result.ranks[1].score.loss
    assert [each.rank for each in loratool.eval(base, data, adapter=adapter, ranks=[4], device="cpu").ranks] == [4]
    assert loratool.eval(base, data, adapter=adapter, device="cpu").ranks == ()


def test_a_model_is_by_itself_again_after_an_adapter_was_beside_it(base: Path, adapter: Path) -> None:
    model = dense(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with beside(model, read_adapter(adapter), "cpu") as wrapped:
        assert any("lora_A" in name for name, _ in wrapped.named_modules())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_rank_above_a_matrixs_smaller_side_loses_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    module = "model.layers.1.self_attn.k_proj"  # (32, 64)
    folder = save_plain_adapter(tmp_path / "adapter", {module: (32, 64)}, r=40)
    result = loratool.eval(base, data, adapter=folder, ranks=[31, 36], device="cpu")
    below, above, whole = (each.score.loss for each in result.ranks)
    assert result.gap is not None
    assert abs(result.gap) > 1e-4
    assert above == pytest.approx(whole, abs=1e-6)
    assert below != above


class OtherUpdate(NamedTuple):
    """An update of a kind whose components are not known."""

    kind: str
    rank: int


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture_has_the_same_bytes_whatever_the_users_settings_and_names(
    suffix: str, base: Path, adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = data.rename(tmp_path / "$\\frac$ 数据 %s.jsonl")
    pictures = [tmp_path / "new folder" / f"{name}{suffix}" for name in ("one", "two")]
    loratool.eval(base, odd, adapter=adapter, ranks=[1, 2], plot=pictures[0], device="cpu")
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9)
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    result = loratool.eval(base, odd, adapter=adapter, ranks=[1, 2], plot=pictures[1], device="cpu")
    assert matplotlib.rcParams["lines.linewidth"] == 9
    assert result.plot == pictures[1]
    first, second = (picture.read_bytes() for picture in pictures)
    assert first == second
    assert first.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    assert sorted(file.name for file in (tmp_path / "new folder").iterdir()) == [f"one{suffix}", f"two{suffix}"]


def test_a_picture_shows_the_ranks_and_what_its_lines_are(
    base: Path, adapter: Path, data: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "loss.svg"
    loratool.eval(base, data, adapter=adapter, ranks=[1, 3], plot=picture, device="cpu")
    words = re.findall("<!-- (.*?) -->", picture.read_text())  # matplotlib draws letters as curves, and says which
    assert {"1", "3", "4", "rank", "loss (nats per token)", "the model alone", "with the adapter"} <= set(words)
    assert "llama on data.jsonl" in words


def test_a_picture_is_replaced_only_with_force(
    base: Path, adapter: Path, data: Path, tmp_path: Path, run: Callable[..., Outcome]
) -> None:
    picture = tmp_path / "loss.png"
    words = [base, "--data", data, "--adapter", adapter, "--ranks", "1", "--plot", picture, "--device", "cpu"]
    assert run(*words).status == 0
    before = picture.stat().st_ino
    assert_refused(run(*words), "exists already; choose another --plot, or give --force")
    assert picture.stat().st_ino == before
    done = run(*words, "--force")
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith(f"The picture is {picture}\n")
    assert picture.stat().st_ino != before


def test_the_table_by_rank_has_a_row_for_each_and_a_bar_as_long_as_its_loss(
    base: Path, adapter: Path, data: Path, run: Callable[..., Outcome]
) -> None:
    words = [base, "--data", data, "--adapter", adapter, "--ranks", "2,1", "--device", "cpu"]
    figures = json.loads(run(*words, "--json").out)
    losses = [figures["without_adapter"]["loss"], *(each["loss"] for each in figures["ranks"])]
    title, _, head, *rows = run(*words).out.splitlines()
    assert title.endswith(f" scored by llama + {adapter}")
    assert head.split() == ["RANK", "LOSS", "PERPLEXITY"]
    assert [row.split()[:2] for row in rows] == [
        [rank, f"{loss:.4f}"] for rank, loss in zip(["none", "1", "2", "4"], losses, strict=True)
    ]
    for row, loss in zip(rows, losses, strict=True):
        assert len(row.split()[3]) == pytest.approx(40 * loss / max(losses), abs=1)


def test_a_bar_is_drawn_to_an_eighth_and_in_ascii_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    bars = [bar(share, 4) for share in (0, 1 / 32, 0.25, 0.5 - 1 / 32, 1)]
    assert bars == ["", "▏", "█", "█▉", "████"]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert [bar(share, 4) for share in (0, 0.5, 1)] == ["", "##", "####"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--adapter", "ADAPTER", "--ranks", "0"], "ranks 1 to 4, and rank 0 is not one of these"),
        (["--adapter", "ADAPTER", "--ranks", "1,5"], "rank 5 is not one of these"),
        (["--adapter", "ADAPTER", "--ranks", "999999999"], "rank 999999999 is not one of these"),
        (["--ranks", "1"], "give the --adapter"),
        (["--adapter", "ADAPTER", "--plot", "x.png"], "give the --ranks"),
        (["--adapter", "ADAPTER", "--ranks", "1", "--plot", "x.jpg"], "end it in .pdf, .png, .svg"),
        (["--adapter", "ADAPTER", "--ranks", "1", "--plot", "."], "not a name for a picture"),
        (["--adapter", "ADAPTER", "--ranks", "1", "--plot", "folder.png", "--force"], "is a folder"),
        (["--adapter", "ADAPTER", "--ranks", "1", "--plot", "DATA/x.png"], "not a folder that you may write in"),
        (["--adapter", "ADAPTER", "--ranks", "1", "--plot", "a\ud800.png"], "write the name in UTF-8"),
    ],
)
def test_ranks_and_pictures_that_cannot_be_are_refused_before_the_data_are_read(
    words: list[str],
    problem: str,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    run: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("empty.jsonl").touch()
    places = {"ADAPTER": str(adapter), "DATA": "empty.jsonl"}
    filled = [re.sub("ADAPTER|DATA", lambda match: places[match[0]], word) for word in words]
    assert_refused(run(base, "--data", "empty.jsonl", *filled), problem)


@pytest.mark.parametrize("ranks", ["", "x", "-1", "1.5", "1,,2", "1 2", "٣", "9999999999"])
def test_ranks_that_are_no_numbers_are_wrong_usage(
    ranks: str, base: Path, adapter: Path, data: Path, run: Callable[..., Outcome]
) -> None:
    done = run(base, "--data", data, "--adapter", adapter, f"--ranks={ranks}")
    assert (done.status, done.out) == (2, "")
    assert "whole numbers separated by commas: 1,2,4,8" in done.err


def test_no_rank_at_all_is_refused(base: Path, adapter: Path, data: Path) -> None:
    with pytest.raises(LoratoolError, match="no rank is given"):
        loratool.eval(base, data, adapter=adapter, ranks=[])


def test_without_matplotlib_the_extra_to_install_is_named(
    base: Path, adapter: Path, data: Path, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = [base, "--data", data, "--adapter", adapter, "--ranks", "1"]
    assert_refused(run(*words, "--plot", "x.png"), "pip install 'loratool[plot]'")
    assert run(*words, "--device", "cpu").status == 0


# What is printed

KEYS = {
    "model",
    "adapter",
    "data",
    "samples",
    "truncated",
    "tokens",
    "loss",
    "perplexity",
    "tokens_per_second",
    "without_adapter",
    "gap",
    "ranks",
    "max_length",
    "device",
    "plot",
    "notes",
}


def test_json_has_the_same_keys_with_an_adapter_and_without(
    base: Path, adapter: Path, data: Path, run: Callable[..., Outcome]
) -> None:
    alone = json.loads(run(base, "--data", data, "--json", "--device", "cpu").out)
    both = json.loads(run(base, "--data", data, "--adapter", adapter, "--json", "--device", "cpu").out)
    assert set(alone) == set(both) == KEYS
    assert (alone["model"], alone["adapter"], alone["samples"]) == ("llama", None, 5)
    assert (alone["without_adapter"], alone["gap"], alone["max_length"]) == (None, None, CONTEXT)
    assert (alone["ranks"], alone["plot"], both["ranks"]) == ([], None, [])
    assert set(both["without_adapter"]) == {"loss", "perplexity", "tokens_per_second"}
    assert both["without_adapter"]["loss"] == alone["loss"]
    assert both["gap"] == both["loss"] - alone["loss"]
    assert both["tokens_per_second"] > 0


def test_a_process_prints_json_alone_and_nothing_on_stderr(nf4: Path, adapter: Path, data: Path) -> None:
    words = ["eval", str(nf4), "--data", str(data), "--adapter", str(adapter), "--device", "cpu", "--json"]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    done = subprocess.run(
        [sys.executable, "-m", "loratool", *words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=240,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(json.loads(done.stdout)) == KEYS


def test_the_table_has_a_row_for_the_model_one_with_the_adapter_and_the_difference(
    base: Path, adapter: Path, data: Path, run: Callable[..., Outcome]
) -> None:
    figures = json.loads(run(base, "--data", data, "--adapter", adapter, "--json", "--device", "cpu").out)
    done = run(base, "--data", data, "--adapter", adapter, "--device", "cpu")
    assert (done.status, done.err) == (0, "")
    title, _, head, alone, beside, gap = done.out.splitlines()
    assert title.endswith(f": 5 samples, {figures['tokens']} tokens scored")
    assert head.split() == ["MODEL", "LOSS", "PERPLEXITY", "TOKENS/S"]
    assert alone.split()[:2] == ["llama", f"{figures['without_adapter']['loss']:.4f}"]
    assert beside.split()[:4] == ["llama", "+", str(adapter), f"{figures['loss']:.4f}"]
    assert gap.split()[:2] == ["difference", f"{figures['gap']:+.4f}"]
    assert len(run(base, "--data", data, "--device", "cpu").out.splitlines()) == 4


def test_the_libraries_are_as_loud_afterwards_as_before(base: Path, data: Path) -> None:
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    loratool.eval(base, data, device="cpu")
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before


def test_it_is_also_called_evaluate() -> None:
    assert loratool.evaluate is loratool.eval
