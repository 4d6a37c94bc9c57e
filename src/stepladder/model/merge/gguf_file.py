"""A merged model as one GGUF file, for llama.cpp and Ollama: one tensor in memory at a time, read back and compared."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stepladder.errors import ModelError
from stepladder.model.merge.llama_cpp_text import build_vocabulary
from stepladder.model.weights import Tensor as Stored
from stepladder.model.weights import Weights

if TYPE_CHECKING:
    import numpy
    import torch
    from gguf import GGUFWriter
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from stepladder.model.merge.proof import Proof

KINDS = ("f16", "q8_0")
ROOM = 2**25  # bytes for names, vocabulary and alignment
# llama.cpp's name of each architecture by Transformers' own, and what its configuration must say: llama.cpp computes
# nothing else.
GPT2 = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
WINDOWLESS = {"hidden_act": "silu", "use_sliding_window": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"hidden_act": "silu"}),
    "mistral": ("llama", {"hidden_act": "silu", "sliding_window": None}),
    "qwen2": ("qwen2", WINDOWLESS),
    "qwen3": ("qwen3", WINDOWLESS | {"attention_bias": False}),
    "phi3": ("phi3", {"hidden_act": "silu"}),
    "gpt2": ("gpt2", GPT2),
}


def _another_model(why: str) -> ModelError:
    return ModelError("llama.cpp would compute another model than this", why=why, help="without --gguf")


class Rope:
    """How positions rotate, in llama.cpp's keys and tensors.

    Args:
        arch: llama.cpp's name of the architecture.

    Raises:
        ModelError: llama.cpp cannot rotate so.
    """

    def __init__(self, config: PretrainedConfig, arch: str):
        import torch
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        self.config, self.remarks = config, []
        self.tensors: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        if arch == "gpt2":
            return  # it learns its positions
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        part = self.parameters.get("partial_rotary_factor") or 1.0
        self.dimensions = int(head * part)
        self.kind = kind = self.parameters.get("rope_type", "default")
        known = {"default", "linear", "yarn", "llama3", "longrope"}
        if kind not in known or any(isinstance(value, dict) for value in self.parameters.values()):
            raise _another_model(f"its rope_type is {kind}, and one of {', '.join(sorted(known))} can be written")
        if part != 1 and arch != "phi3":
            raise _another_model(f"it rotates {part:g} of each head")
        odd = {key: self.parameters.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim", "truncate")}
        odd |= {"beta_fast": self.parameters.get("beta_fast") or 32, "beta_slow": self.parameters.get("beta_slow") or 1}
        usual = {"truncate": (None, True), "beta_fast": (32,), "beta_slow": (1,)}
        if kind == "yarn" and (wrong := {k: v for k, v in odd.items() if v not in usual.get(k, (None,))}):
            raise _another_model(f"its rope_parameters say {json.dumps(wrong)}")
        self.attention = 1.0
        if kind in ("llama3", "longrope"):
            scaled, self.attention = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        if kind == "llama3":
            steps = torch.arange(0, self.dimensions, 2, dtype=torch.float32) / self.dimensions
            self.tensors["rope_freqs.weight"] = 1 / self.parameters["rope_theta"] ** steps / scaled
        if kind == "longrope":
            for name in ("long", "short"):
                factors = torch.tensor(self.parameters[f"{name}_factor"], dtype=torch.float32)
                self.tensors[f"rope_factors_{name}.weight"] = factors
            first = self.parameters["original_max_position_embeddings"]
            self.remarks.append(f"the long factors are used where its context (-c) is above {first:,} tokens")
        window = getattr(config, "sliding_window", None)
        if arch == "phi3" and window and window < config.max_position_embeddings:
            self.remarks.append(f"a token sees all tokens before it, not {window:,} of them as here")

    def metadata(self, writer: GGUFWriter) -> None:
        import gguf

        writer.add_rope_dimension_count(self.dimensions)
        writer.add_rope_freq_base(self.parameters["rope_theta"])
        first = self.parameters.get("original_max_position_embeddings")
        if self.kind in ("linear", "yarn", "longrope"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(self.kind))
        if self.kind in ("linear", "yarn"):
            writer.add_rope_scaling_factor(self.parameters["factor"])
        if self.kind in ("yarn", "longrope") or self.config.model_type == "phi3":
            writer.add_rope_scaling_orig_ctx_len(first or self.config.max_position_embeddings)
        if self.kind == "longrope":
            writer.add_rope_scaling_attn_factors(self.attention)


class GGUFFile:
    """What will be written, checked before anything is.

    Args:
        config: the merged model's.
        ends: the tokens that end an answer.

    Raises:
        ModelError: llama.cpp would compute another model, or this module does not know the architecture.
    """

    def __init__(
        self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, ends: int | list[int] | None, kind: str
    ):
        self.config, self.kind, self.tokenizer = config, kind, tokenizer
        if config.model_type not in FAMILIES:
            raise ModelError(
                f"no GGUF file is written for {config.model_type}",
                why=f"it is for {', '.join(FAMILIES)}",
                help="without --gguf, then llama.cpp's own convert_hf_to_gguf.py, where it knows the architecture",
            )
        self.arch, required = FAMILIES[config.model_type]
        for key, value in required.items():
            if (has := getattr(config, key, value)) != value:
                raise _another_model(f"its configuration says {key}: {has}, and llama.cpp knows {value} only")
        self.rope = Rope(config, self.arch)
        listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.vocabulary = build_vocabulary(tokenizer, config.vocab_size, listed)
        self.remarks = [f"in llama.cpp, {remark}" for remark in self.vocabulary.remarks + self.rope.remarks]

    def max_bytes(self, tensors: dict[str, Stored]) -> int:
        """The most that the file of these tensors takes."""

        def each(shape: tuple[int, ...]) -> float:
            return 4 if len(shape) < 2 else 34 / 32 if self.kind == "q8_0" and not any(n % 32 for n in shape) else 2

        return ROOM + int(sum(math.prod(tensor.shape) * each(tensor.shape) for tensor in tensors.values()))

    def write_and_compare(self, folder: Path, name: str, proof: Proof | None) -> dict[str, Any]:
        """Write the file and compare what Transformers, whose reader of such files is not ours, makes of it.

        Returns:
            Its name, kind and bytes; how far its logits are off, or why that was not compared.

        Raises:
            ModelError: its answers are not those of the merged model.
        """
        import psutil

        self.write(folder, name)
        size = sum(math.prod(tensor.shape) for tensor in Weights(folder).tensors.values())
        facts = {"file": name, "kind": self.kind, "bytes": (folder / name).stat().st_size, "read_back": None, "why": ""}
        needed, free = 2 * 4 * size, psutil.virtual_memory().available  # as it is read, and as the model, in fp32
        if not proof:
            return {**facts, "why": "not verified, as you asked"}
        if needed > free:
            return {**facts, "why": f"{needed / 1e9:.1f} GB of memory are needed, and {free / 1e9:.1f} GB are free"}
        return {**facts, "read_back": proof.read_back(self.load_model(folder, name), name)}

    def write(self, folder: Path, name: str) -> None:
        """Write the file into a merged model's folder, from the weights that lie there."""
        import gguf
        import numpy
        from transformers import AutoConfig

        self.config = AutoConfig.from_pretrained(folder)  # which may have more rows, and two heads for one
        writer: Any = gguf.GGUFWriter(folder / name, self.arch)
        # llama.cpp takes special tokens for Phi-3's wherever it finds that in the name, and fails where they are not.
        title = re.sub("phi-?3", "phi 3", name.removesuffix(f"-{self.kind}.gguf"), flags=re.IGNORECASE)
        writer.add_name(f"phi-3 {title}" if self.vocabulary.like_phi3 else title)
        self._metadata(writer)
        tensors = list(self._tensors(folder))
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, numpy.float32, tensor.bytes, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.data())
        writer.close()

    def _metadata(self, writer: GGUFWriter) -> None:
        import gguf

        config = self.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
        writer.add_file_type(kinds[self.kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_head_count(config.num_attention_heads)
        if self.arch == "gpt2":
            writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
        else:
            writer.add_feed_forward_length(config.intermediate_size)
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
            writer.add_head_count_kv(config.num_key_value_heads)
            writer.add_key_length(head)
            writer.add_value_length(head)
            self.rope.metadata(writer)
        if self.arch == "phi3":
            writer.add_sliding_window(config.sliding_window or 0)
        kind = gguf.GGUFValueType
        for key, value in self.vocabulary.keys.items():
            of_value = kind.UINT32 if type(value) is int else kind.get_type(value)
            writer.add_key_value(f"tokenizer.ggml.{key}", value, of_value)
        if self.tokenizer.chat_template:
            writer.add_chat_template(self.tokenizer.get_chat_template())

    def _tensors(self, folder: Path) -> Iterator[Tensor]:
        """The tensors of the file in its order, none of them read yet."""
        import gguf

        disk = Weights(folder)
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch)
        names = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)
        for key, tensor in disk.tensors.items():
            if self.arch == "gpt2" and key.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # masks, which old files hold
            if key == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            bare = self.arch == "gpt2" and not key.startswith(("transformer.", "lm_head"))
            name = names.get_name(f"transformer.{key}" if bare else key, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise _another_model(f"its tensor {key} has no place there")
            shape = tensor.shape[::-1] if self._is_transposed(key) else tensor.shape
            yield Tensor(name, key, self._kind(name, shape), shape, functools.partial(self.values, disk, key))
        for name, factors in self.rope.tensors.items():
            yield Tensor(name, name, gguf.GGMLQuantizationType.F32, tuple(factors.shape), factors.clone)

    def _kind(self, name: str, shape: tuple[int, ...]) -> Any:
        import gguf

        if len(shape) < 2 or name.startswith("position_embd"):  # llama.cpp adds these in fp32
            return gguf.GGMLQuantizationType.F32
        if self.kind == "q8_0" and shape[-1] % 32 == 0:
            return gguf.GGMLQuantizationType.Q8_0
        return gguf.GGMLQuantizationType.F16

    def _is_transposed(self, key: str) -> bool:
        """GPT-2's Conv1D holds its matrices the other way round."""
        return self.arch == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))

    def values(self, disk: Weights, key: str) -> torch.Tensor:
        """A tensor in fp32 as llama.cpp expects it."""
        tensor = disk.read(key).float()
        if self._is_transposed(key):
            return tensor.T
        if self.arch == "llama" and (".q_proj." in key or ".k_proj." in key):
            # llama.cpp turns neighbouring pairs of a head, Transformers the first half against the second.
            heads = self.config.num_attention_heads if ".q_proj." in key else self.config.num_key_value_heads
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            return halves.transpose(1, 2).reshape(tensor.shape)
        return tensor

    def load_model(self, folder: Path, name: str) -> Any:
        """What Transformers makes of the file, in fp32 and in memory."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        # Its reader knows neither Mistral, which is a Llama in these files, nor how positions are scaled.
        config = self.config
        if config.model_type == "mistral":
            config = LlamaConfig(
                **{k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
            )
        kwargs = {"gguf_file": name, "config": config, "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


class Tensor(NamedTuple):
    """A tensor of the file: its name there and here, type and shape there, and how its values are read, in fp32."""

    name: str
    key: str
    kind: Any
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size

    def data(self) -> numpy.ndarray:
        import gguf

        tensor = self.read()
        if self.kind == gguf.GGMLQuantizationType.F16 and not tensor.abs().max() <= 65504:
            raise ModelError(f"{self.key} is too large for float16", help="without --gguf")
        return gguf.quants.quantize(tensor.contiguous().numpy(), self.kind)
