"""How a model's positions rotate, in the keys and tensors of a GGUF file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from stepladder.errors import ModelError

if TYPE_CHECKING:
    import numpy
    from gguf import GGUFWriter
    from transformers import PretrainedConfig


def cannot(why: str) -> ModelError:
    return ModelError("llama.cpp would compute another model than this", why=why, way_out="without --gguf")


class Rope:
    """How positions rotate, in llama.cpp's keys and tensors.

    Args:
        arch: llama.cpp's name of the architecture.

    Raises:
        ModelError: llama.cpp cannot rotate so.
    """

    def __init__(self, config: PretrainedConfig, arch: str):
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        self.config, self.remarks = config, []
        self.tensors: dict[str, numpy.ndarray] = {}
        self.parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        if arch == "gpt2":
            return  # it learns its positions
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        part = self.parameters.get("partial_rotary_factor") or 1.0
        self.dimensions = int(head * part)
        self.kind = kind = self.parameters.get("rope_type", "default")
        known = {"default", "linear", "yarn", "llama3", "longrope"}
        if kind not in known or any(isinstance(value, dict) for value in self.parameters.values()):
            raise cannot(f"its rope_type is {kind}, and one of {', '.join(sorted(known))} can be written")
        if part != 1 and arch != "phi3":
            raise cannot(f"it rotates {part:g} of each head")
        odd = {key: self.parameters.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim", "truncate")}
        odd |= {"beta_fast": self.parameters.get("beta_fast") or 32, "beta_slow": self.parameters.get("beta_slow") or 1}
        usual = {"truncate": (None, True), "beta_fast": (32,), "beta_slow": (1,)}
        if kind == "yarn" and (wrong := {k: v for k, v in odd.items() if v not in usual.get(k, (None,))}):
            raise cannot(f"its rope_parameters say {json.dumps(wrong)}")
        self.attention = 1.0
        if kind in ("llama3", "longrope"):
            scaled, self.attention = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        if kind == "llama3":
            import torch

            steps = torch.arange(0, self.dimensions, 2, dtype=torch.float32) / self.dimensions
            self.tensors["rope_freqs.weight"] = (1 / self.parameters["rope_theta"] ** steps / scaled).numpy()
        if kind == "longrope":
            import numpy

            for name in ("long", "short"):
                self.tensors[f"rope_factors_{name}.weight"] = numpy.array(
                    self.parameters[f"{name}_factor"], numpy.float32
                )
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
