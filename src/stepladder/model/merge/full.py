"""PEFT's whole-model merge, for adapters that cannot be streamed: the model is in memory, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stepladder.errors import ModelError
from stepladder.model.adapter import load_trained
from stepladder.model.merge.injection import read_configs
from stepladder.model.merge.quantized import RoundTrip
from stepladder.model.merge.streamed import Merge, NotStreamed
from stepladder.model.merge.weights import CODES, FLOATS, Tensor, Weights, name_of, share
from stepladder.model.start import CHANGES_BASE

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


class Whole:
    """The same interface as `streamed.Merge`."""

    def __init__(self, base: Path, adapters: list[Path], scales: list[float], tokens: int = 0, device: str = "cpu"):
        if any(scale != 1 for scale in scales):
            raise ModelError("only LoRA adapters that are streamed have a weight", help="remove --weights")
        self.base, self.adapters, self.tokens, self.device = base, adapters, tokens, device
        self.disk = Weights(base)

    def configuration(self) -> PretrainedConfig:
        """The merged model's, but for weights that the adapter may have untied."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.base)
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, self.tokens)
        return config

    def reference(self) -> PeftModel:
        """Base and adapter side by side, in fp32."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        model = model.to(self.device).eval()
        if self.tokens > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(self.tokens, mean_resizing=False)
        try:
            peft = load_trained(model, self.adapters[0], "adapter_0")
            for number, folder in enumerate(self.adapters[1:], 1):
                peft.load_adapter(folder, f"adapter_{number}")
            peft.base_model.set_adapter([*peft.peft_config], inference_mode=True)
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                "the adapter does not fit this base", where=str(self.adapters[0]), why=str(error).splitlines()[0]
            ) from None
        return peft.eval()

    def exact(self) -> PreTrainedModel:
        """The merged model before it is rounded and written."""
        try:
            return self.reference().merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            raise ModelError("PEFT cannot merge this adapter", why=str(error).splitlines()[0]) from None

    def reopen(self, folder: Path) -> PreTrainedModel:
        """The merged model as it was written."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        return model.to(self.device).eval()

    def plan(self, dtype: torch.dtype) -> dict[str, Tensor]:
        code = CODES[name_of(dtype)]
        return {
            name: Tensor("", code if tensor.dtype in FLOATS else tensor.dtype, tensor.shape)
            for name, tensor in self.disk.tensors.items()
        }

    def write(self, folder: Path, dtype: torch.dtype, limit: int, progress: Callable[[int, int], None]) -> int:
        model = self.exact()
        model.to(dtype).save_pretrained(folder, max_shard_size=limit)
        share(folder)
        return len(list(folder.glob("*.safetensors")))


def _whole_because(configs: list[PeftConfig]) -> str | None:
    """Why these adapters need the whole model in memory; None where they can be streamed."""
    for config in configs:
        if config.peft_type.value != "LORA":
            return f"{config.peft_type.value} is not merged module by module"
        if str(config.init_lora_weights).startswith(CHANGES_BASE):
            return f"init_lora_weights: {config.init_lora_weights} changes the base's own weights"
        if config.target_parameters or config.layer_replication:
            return "target_parameters and layer_replication change more than single modules"
    return None


def open_merge(
    base: Path, adapters: list[Path], scales: list[float], quantize: RoundTrip | None, tokens: int, device: str
) -> tuple[Merge | Whole, str | None]:
    """The merge of these adapters into this base, and why it is not streamed where it is not."""
    because = _whole_because(read_configs(adapters))
    if not because:
        try:
            return Merge(base, adapters, scales, quantize, tokens, device), None
        except NotStreamed as reason:
            because = str(reason)
    if quantize:
        raise ModelError("only a streamed merge can use the dequantized base", why=because, help="original")
    return Whole(base, adapters, scales, tokens, device), because
