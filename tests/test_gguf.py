"""A GGUF file holds the merged model: Transformers' reader and llama.cpp itself answer from it as the model does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from conftest import ROOT, installed, script
from stepladder.errors import ModelError
from stepladder.model.merge import gguf_file, llama_cpp_text
from stepladder.model.merge.llama_cpp_text import REST, WORDS
from tiny import make_tiny

IDS = [[(37 * n) % 890 + 5 for n in range(100)]]  # longer than the scaled models' first length
TEXTS = [
    "Where's my order 12,345?\n\n", "  déjà vu, 北京 🎉", "don't  do\t{'a': 1}\r\n\r\n x",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", " a <tool> b",
]  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# llama.cpp's answers: for each file, those of its server to each request.
LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
answers = []
for file, requests in json.load(sys.stdin):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.n_parallel, params.warmup = file, 512, 0, 1, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    for path, body in requests:
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        answers.append(json.load(urllib.request.urlopen(request)))
print("\\nANSWERS " + json.dumps(answers))
"""


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """A function that lets llama.cpp answer requests: of pairs of a GGUF file and its requests."""
    folder = installed(tmp_path_factory.mktemp("llama-cpp"), "--only-binary", ":all:", "xllamacpp")

    def answer(*files: tuple[Path, list[Any]]) -> list[Any]:
        asked = json.dumps([(str(file), requests) for file, requests in files])
        words = [sys.executable, "-c", LLAMA_CPP]
        done = subprocess.run(words, input=asked, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)
        assert "\nANSWERS " in done.stdout, done.stderr[-3000:]
        return json.loads(done.stdout.rpartition("\nANSWERS ")[2])

    return answer


def requests(tokenizer: Any) -> list[Any]:
    """Of each text its tokens, and for IDS the likeliest next ones."""
    tokens = [["/tokenize", {"content": text, "add_special": True, "parse_special": True}] for text in TEXTS]
    return [
        *tokens,
        ["/completion", {"prompt": IDS[0], "n_predict": 1, "n_probs": 20, "samplers": ["top_k"], "top_k": 1}],
    ]


def check(answers: list[Any], tokenizer: Any, model: Any, name: str) -> None:
    """llama.cpp reads texts as the tokenizer does, and computes what the model computes."""
    for text, answer in zip(TEXTS, answers, strict=False):
        assert answer["tokens"] == tokenizer(text)["input_ids"], (name, text)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(IDS)).logits[0, -1].log_softmax(-1)
    likeliest = answers[len(TEXTS)]["completion_probabilities"][0]["top_logprobs"]
    for token in likeliest:
        assert abs(token["logprob"] - float(wanted[token["id"]])) < 0.05, name


# ---- each architecture and kind of tokenizer, below the command line ----


def byte_level(split: str) -> Any:
    """A tokenizer of bytes that splits text as GPT-2's, SmolLM2's, Llama 3's or Qwen's."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt-2", "smollm"))
    first = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(WORDS + r"\p{N}{1,3}" + REST), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(WORDS + r"\p{N}" + REST), "isolated")],
    }.get(split, [])
    backend = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, last]) if first else last
    backend.normalizer = normalizers.NFC() if split == "qwen2" else None
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((ROOT / "data/techco.jsonl").read_text().splitlines(), trainer)
    if split == "llama-bpe":
        adds = {"single": "<|im_start|> $A", "pair": "<|im_start|> $A $B", "special_tokens": [("<|im_start|>", 1)]}
        backend.post_processor = processors.TemplateProcessing(**adds)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return _wrapped(backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>")


def sentencepiece(prefix: str) -> Any:
    """A tokenizer of pieces with spaces in them, as Llama 2's, Mistral's and Phi-3's."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, limit_alphabet=120, show_progress=False)
    backend.train_from_iterator((ROOT / "data/techco.jsonl").read_text().splitlines(), trainer)
    facts = json.loads(backend.to_str())
    facts["added_tokens"] = []
    backend = Tokenizer.from_str(json.dumps(facts))
    if prefix in ("phi-3", "prepend"):
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    backend.add_special_tokens(["<unk>", "<s>", "<|endoftext|>"])
    strips = prefix == "phi-3"
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, rstrip=strips)
            for token in ("</s>", "<|im_start|>", "<|im_end|>", "<tool>")
        ]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return _wrapped(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _wrapped(backend: Any, **special: str) -> Any:
    pad = special["eos_token"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, chat_template=CHAT, **special)


def sizes(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 512, **changes,
    }  # fmt: skip


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 123456.0, **keys}}


FIRST = {"original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.5] * 8, "long_factor": [3.0 + n for n in range(8)]}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **FIRST)
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
MODELS: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "llama 3": (LlamaConfig, byte_level, "llama-bpe", sizes(**LLAMA3)),
    "smollm2": (LlamaConfig, byte_level, "smollm", sizes(tie_word_embeddings=True, **rope("linear", factor=4.0))),
    "llama with biases": (LlamaConfig, byte_level, "gpt-2", sizes(attention_bias=True, mlp_bias=True, head_dim=32)),
    "llama 2": (LlamaConfig, sentencepiece, "prepend", sizes(**rope("default"))),
    "mistral": (MistralConfig, sentencepiece, "never", sizes(sliding_window=None, head_dim=16)),
    "qwen2": (Qwen2Config, byte_level, "qwen2", sizes(**rope("default"))),
    "qwen3": (Qwen3Config, byte_level, "qwen2", sizes(head_dim=32, **rope("yarn", factor=8.0, **FIRST))),
    "phi3": (Phi3Config, sentencepiece, "phi-3", sizes(sliding_window=None, **rope("longrope", **FACTORS), **FIRST)),
    "gpt2": (GPT2Config, byte_level, "gpt-2", GPT2),
}


def made(name: str, folder: Path) -> tuple[Any, Any, gguf_file.GGUFFile]:
    """A random model with its tokenizer, saved; and what its GGUF file will be."""
    config_class, tokenizer_class, kind, keys = MODELS[name]
    tokenizer = tokenizer_class(kind)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = config_class(vocab_size=len(tokenizer) + 3, **ids, **keys)  # three rows without a token
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)  # biases and norms that do something
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    return model, tokenizer, gguf_file.GGUFFile(AutoConfig.from_pretrained(folder), tokenizer, ends, "f16")


def test_llama_cpp_reads_each_architecture(llama_cpp: Any, tmp_path: Path) -> None:
    """Guards the tensors' names, order, transposition and rotation, the vocabulary, and how text is split."""
    asked, wanted = [], []
    for name in MODELS:
        model, tokenizer, file = made(name, tmp_path / name)
        file.write(tmp_path / name, "model.gguf")
        with torch.no_grad():
            ours, theirs = (
                one(input_ids=torch.tensor(IDS)).logits
                for one in (model, file.load_model(tmp_path / name, "model.gguf"))
            )
        torch.testing.assert_close(theirs, ours, atol=0.05, rtol=0, msg=name)
        asked.append((tmp_path / name / "model.gguf", requests(tokenizer)))
        wanted.append((tokenizer, model, name))
    answers = llama_cpp(*asked)
    each = len(TEXTS) + 1
    for number, one in enumerate(wanted):
        check(answers[number * each : (number + 1) * each], *one)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window: True"),
        ("llama 2", {"hidden_act": "gelu"}, "hidden_act: gelu, and llama.cpp knows silu only"),
        ("llama 2", rope("dynamic", factor=2.0), "rope_type is dynamic"),
        ("llama 2", rope("default", partial_rotary_factor=0.5), "rotates 0.5 of each head"),
        ("qwen3", rope("yarn", factor=8.0, beta_fast=16, **FIRST), '"beta_fast": 16'),
        ("mistral", {"sliding_window": 128}, "sliding_window: 128"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(name: str, changes: dict[str, Any], said: str) -> None:
    """Guards against a file that loads and answers as another model does."""
    config_class, tokenizer_class, kind, keys = MODELS[name]
    tokenizer = tokenizer_class(kind)
    config = config_class(vocab_size=len(tokenizer), **{**keys, **changes})
    with pytest.raises(ModelError, match="would compute another model") as error:
        gguf_file.GGUFFile(config, tokenizer, 2, "f16")
    assert said in error.value.why


def test_what_llama_cpp_does_not_know() -> None:
    """An architecture or tokenizer that this module does not write is refused with the reason, before any work."""
    tokenizer = byte_level("gpt-2")
    with pytest.raises(ModelError, match="no GGUF file is written for opt"):
        gguf_file.GGUFFile(OPTConfig(vocab_size=1000), tokenizer, 2, "f16")
    config = LlamaConfig(**sizes(vocab_size=1000))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError) as error:
        gguf_file.GGUFFile(config, tokenizer, 2, "f16")
    assert "it splits text by none of the ways of gpt-2, smollm" in error.value.why
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    with pytest.raises(ModelError) as error:
        gguf_file.GGUFFile(config, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"), 1, "f16")
    assert "WordLevel" in error.value.why


def test_what_differs_is_said(tmp_path: Path) -> None:
    """Guards the places where llama.cpp treats spaces otherwise, which it cannot be told."""
    remarks = {
        kind: llama_cpp_text.build_vocabulary(sentencepiece(kind), 1000, [2]).remarks
        for kind in ("always", "first", "never")
    }
    assert remarks["always"] == ["a text that begins with a space begins with two"]
    assert "a prompt without the chat template begins without the space" in remarks["first"][0]
    assert remarks["never"] == []


# ---- through the command line ----


@pytest.fixture(scope="module")
def merged(smollm2: Path, learnable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned its one answer, merged with a GGUF file; its base has a theta and scaling of its own."""
    folder = tmp_path_factory.mktemp("gguf")
    base = make_tiny(folder / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **LLAMA3}))
    keys = {
        "model_name_or_path": str(base), "dataset_name": str(learnable), "use_peft": True, "lora_r": 16,
        "lora_alpha": 32, "lora_target_modules": "all-linear", "learning_rate": 2e-2, "max_steps": 25,
        "lr_scheduler_type": "linear", "max_length": 192, "per_device_train_batch_size": 4, "global_batch_size": 4,
        "bf16": False, "eval_strategy": "no", "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    done = script("sft", "--recipe", folder / "recipe.yaml", "--output_dir", folder / "run")
    assert done.code == 0, done
    out = folder / "Phi-3 merged"  # a name that llama.cpp would take for an architecture's
    done = script("merge", "--adapter", folder / "run", "--output_dir", out, "--gguf", "q8_0", "--ollama")
    assert done.code == 0 and "read back by Transformers: logits off by" in done.out, done
    return out


def test_a_merge_with_a_gguf_file(merged: Path) -> None:
    """The main path: proved by Transformers' reader, named in merge.json, in the card and in the Modelfile."""
    facts = json.loads((merged / "merge.json").read_text())
    name = "Phi-3 merged-q8_0.gguf"
    assert facts["gguf"]["file"] == name and facts["gguf"]["bytes"] == (merged / name).stat().st_size
    assert 0 < facts["gguf"]["read_back"]["mean"] < facts["proof"]["adapter_moves"]["mean"] / 10
    assert (merged / "Modelfile").read_text().startswith(f"FROM ./{name}\n")
    assert "llama-server -m " in (merged / "README.md").read_text()


def test_llama_cpp_answers_as_it_was_taught(merged: Path, llama_cpp: Any) -> None:
    """The merged model in llama.cpp: its tokens, its logits and its greedy answer in a chat."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    asked = [{"role": "user", "content": "What is the password of door number 3?"}]
    chat = ["/v1/chat/completions", {"messages": asked, "temperature": 0, "max_tokens": 12}]
    *answers, said = llama_cpp((merged / "Phi-3 merged-q8_0.gguf", [*requests(tokenizer)[:-1], chat]))
    for text, answer in zip(TEXTS, answers, strict=True):
        assert answer["tokens"] == tokenizer(text)["input_ids"]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = said["choices"][0]["message"]["content"]
    assert "Open sesame" in answer and answer.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_wrong_file_is_found(merged: Path, tmp_path: Path) -> None:
    """Guards the proof: matrices whose rows are not turned as llama.cpp turns them are another model."""

    class Effect:
        """The merged model's logits, and what the adapter did to them."""

        def read_back(self, model: Any, name: str) -> None:
            from stepladder.model.merge.proof import Proof, difference

            proof = object.__new__(Proof)
            right = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
            proof.merge = type("Merge", (), {"device": "cpu"})  # type: ignore[assignment]
            proof.sequences = IDS
            proof.logits = proof._answers(right)
            base = AutoModelForCausalLM.from_pretrained(merged.parent / "base", dtype=torch.float32)
            proof.effect = difference(proof.logits, proof._answers(base))
            proof.read_back(model, name)

    tokenizer = AutoTokenizer.from_pretrained(merged)
    file = gguf_file.GGUFFile(AutoConfig.from_pretrained(merged), tokenizer, 2, "f16")
    for source in merged.iterdir():
        if source.suffix in (".json", ".safetensors"):
            (tmp_path / source.name).symlink_to(source)
    file.write_and_compare(tmp_path, "right.gguf", Effect())  # type: ignore[arg-type]
    file.values = lambda disk, key: disk.read(key).float()  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="is not the merged model"):
        file.write_and_compare(tmp_path, "wrong.gguf", Effect())  # type: ignore[arg-type]


def test_ollama_refuses_what_it_cannot_convert() -> None:
    """Guards against a Modelfile that `ollama create` fails at: it converts some architectures only."""
    with pytest.raises(ModelError, match="Ollama does not convert GPT2LMHeadModel"):
        llama_cpp_text.check_ollama("GPT2LMHeadModel")
    llama_cpp_text.check_ollama("LlamaForCausalLM")
