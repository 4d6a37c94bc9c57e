"""How an adapter is folded into its base: streamed, one module at a time, or by PEFT with the whole model in memory.

Streamed, the model is built on the meta device, PEFT puts the adapter's layers into it, and each module that the
adapter changes gets its weights while PEFT's `merge` needs them. The arithmetic is in fp32, rounded once to the
output's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.errors import ModelError, first_line
from stepladder.model import pretrained, weights
from stepladder.model.merge import skeleton
from stepladder.model.merge.combination import SUM, Combination, check_configs, combine
from stepladder.model.merge.skeleton import RoundTrip
from stepladder.model.start import CHANGES_BASE
from stepladder.model.weights import CODES, FLOATS, Tensor, Weights

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


STREAMED = ("LORA", "VERA", "OFT")


class StreamedMerge:
    """Adapters on a base of which no more than one module is in memory.

    Args:
        base: the folder of the base model.
        adapters: the adapters' folders.
        scales: each adapter's weight; the change is the sum of their changes, each by its weight.
        quantize: takes a weight to 4 bits and back, where the adapter goes onto the weights that it saw in
            training (`skeleton.RoundTrip`); None leaves those of `base` as they are.
        tokens: the tokenizer's length; tokens beyond the base's vocabulary must come with the adapter.
        combination: how PEFT combines the adapters by their weights; None for the sum.

    Raises:
        ModelError: adapter and base do not match, or the adapter is broken.
    """

    def __init__(
        self,
        base: Path,
        adapters: list[Path],
        scales: list[float],
        quantize: RoundTrip | None = None,
        tokens: int = 0,
        device: str = "cpu",
        combination: Combination | None = None,
    ):
        self.disk, self.quantize, self.device = Weights(base), quantize, device
        self.config = pretrained.load_config(base)
        self._last: dict[str, torch.Tensor] = {}
        model = self._bare()
        text, rows = self.config.get_text_config(), skeleton.count_rows(model, adapters, tokens)
        if text.vocab_size != rows:
            text.vocab_size = rows
            model = self._bare()
        self.names = {module: name for name, module in model.named_modules()}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self.keys = skeleton.map_keys(model, self.disk)
        self.quantized = skeleton.quantized_weights(model) if quantize else {}
        inner = [1.0] * len(scales) if combination else scales
        self.peft, self.replaced = skeleton.inject(model, base, adapters, inner, device)
        if combination:
            combine(self.peft, [*self.peft.peft_config], scales, combination)
        skeleton.stream(self.peft, self.names, self.read)
        self.units = dict(self._units())
        self._check_shapes()
        self.untied = self._untied()
        if self.untied:
            self.config.tie_word_embeddings = False

    def _units(self) -> Iterator[tuple[str, Any]]:
        """Each weight of the base that changes, by its name, with the PEFT layer that changes it."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        for module in self.peft.modules():
            if isinstance(module, ModulesToSaveWrapper):
                for part, _ in module.original_module.named_parameters():
                    yield f"{self.names[module.original_module]}.{part}", module
            elif isinstance(module, BaseTunerLayer):
                layer = module.get_base_layer()
                for part, _ in layer.named_parameters():
                    # It changes a bias only where it has learned one.
                    if part != "bias" or any(getattr(module, "lora_bias", {}).values()):
                        yield f"{self.names[layer]}.{part}", module

    def _check_shapes(self) -> None:
        """Every weight must have the size of its place, or be given by the adapter."""
        from peft.utils.other import ModulesToSaveWrapper

        for name, shape in self.shapes.items():
            key = self._key(name)
            disk = self.disk.tensors[key].shape
            replaced = name in self.replaced or isinstance(self.units.get(name), ModulesToSaveWrapper)
            if disk != shape and not replaced and not self._new_rows_trained(name, disk[0], shape[0]):
                raise ModelError(
                    f"the vocabularies differ: the base's {key} has {disk[0]:,} rows, the adapter's {shape[0]:,}",
                    where=str(self.disk.folder),
                    why="the adapter's tokenizer has tokens that neither the base nor the adapter has embeddings for",
                    help="name the base that the adapter was trained on: --base",
                )

    def _new_rows_trained(self, name: str, old: int, new: int) -> bool:
        indices = getattr(self.units.get(self.tied.get(name, name)), "token_indices", {})
        return old < new and set(range(old, new)) <= {row for rows in indices.values() for row in rows}

    def _untied(self) -> bool:
        """Whether input and output embeddings, one tensor in the base, are two after the merge."""
        import torch

        changed = self.units.keys() | self.replaced.keys()
        pairs = [(name, other) for name, other in self.tied.items() if changed & {name, other}]
        return any(not torch.equal(self.merged_weight(name), self.merged_weight(other)) for name, other in pairs)

    # ---- weights, in fp32 ----

    def _key(self, name: str) -> str:
        return self.keys[name] if name in self.keys else self.keys[self.tied[name]]

    def read(self, name: str) -> torch.Tensor:
        """A weight of the base as the adapter sees it."""
        import torch

        tied = self.tied.get(name, name)
        if name in self.replaced or tied in self.replaced:
            return self.replaced[name if name in self.replaced else tied].clone()
        tensor = self.disk.read(self._key(name)).to(self.device)
        if self.quantize and name in self.quantized:
            tensor = self.quantize(tensor, self.quantized[name])
        tensor = tensor.float()
        rows = self.shapes[name][0] - tensor.shape[0]
        if rows > 0:
            tensor = torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])
        return tensor

    def merged_weight(self, name: str) -> torch.Tensor:
        """The same weight with the adapter folded in."""
        from peft.utils.other import ModulesToSaveWrapper

        unit = self.units.get(name)
        if unit is None:
            return self.read(name)
        if name not in self._last:
            self._last = {}  # at most one unit's weights are held
            if isinstance(unit, ModulesToSaveWrapper):
                place = self.names[unit.original_module]
                (active,) = unit.active_adapters
                self._last = {f"{place}.{part}": p.data for part, p in unit.modules_to_save[active].named_parameters()}
            else:
                held = [(self.names[m], m) for m in unit.get_base_layer().modules()]
                skeleton.fill(held, self.read)
                try:
                    unit.merge(adapter_names=list(unit.active_adapters))
                except (ValueError, RuntimeError, NotImplementedError) as error:
                    raise ModelError(f"PEFT cannot merge {held[0][0]}", why=str(error)) from None
                self._last = {
                    f"{place}.{part}": p.data for place, m in held for part, p in m._parameters.items() if p is not None
                }
                unit.merged_adapters.clear()
                skeleton.fill(held, None)
        return self._last[name]

    def reference(self) -> PeftModel:
        """Base and adapter side by side, in fp32, each module's weights fetched as it is called."""
        return self.peft

    def unrounded_model(self) -> PreTrainedModel:
        """The merged model before it is rounded and written."""
        return self._streamed(self.merged_weight)

    def reopen(self, folder: Path) -> PreTrainedModel:
        """The merged model as it was written."""
        disk = Weights(folder)
        keys = skeleton.map_keys(self._bare(), disk)
        return self._streamed(lambda name: disk.read(keys.get(name) or keys[self.tied[name]]).to(self.device).float())

    def _streamed(self, read: skeleton.Read) -> PreTrainedModel:
        model = self._bare()
        skeleton.stream(model, {module: name for name, module in model.named_modules()}, read)
        return model

    def _bare(self) -> PreTrainedModel:
        return skeleton.make_skeleton(self.config, self.device)

    # ---- the result ----

    def plan(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What will be written, under the names that the base has on disk; what is not a weight stays as it is."""
        code, tensors = CODES[weights.dtype_name(dtype)], dict(self.disk.tensors)
        for key, name in self.output_names().items():
            tensors[key] = Tensor("", code, self.shapes[name])
        return tensors

    def output_names(self) -> dict[str, str]:
        """The model's name of each weight by its key in the output."""
        names = {key: name for name, key in self.keys.items()}
        return names | {name: name for name in self.tied if self.untied and name not in self.keys}

    def target_names(self) -> dict[str, str]:
        """The tensors that may differ from the base's, by key, and their names in the model."""
        changed = self.units.keys() | self.replaced.keys() | self.quantized.keys()
        for pair in self.tied.items():
            if changed & {*pair}:
                changed |= {*pair} if not self.untied else {*pair} - self.keys.keys()
        return {key: name for key, name in self.output_names().items() if name in changed}

    def write(self, folder: Path, dtype: torch.dtype, limit: int, progress: Callable[[int, int], None]) -> int:
        """Write the merged weights and the configuration; returns the number of shards.

        Raises:
            ModelError: a weight overflows `dtype`.
        """
        import torch

        names, plan, targeted = self.output_names(), self.plan(dtype), self.target_names()

        def produce(key: str) -> torch.Tensor:
            if key not in targeted and plan[key].dtype == self.disk.tensors[key].dtype:
                return self.disk.read(key)
            tensor = self.merged_weight(names[key])
            low, high = tensor.aminmax()
            if not max(-low, high) <= torch.finfo(dtype).max:  # NaN too
                raise ModelError(f"{key} is too large for {weights.dtype_name(dtype)}", help="--dtype bf16 or fp32")
            return tensor.to(dtype)

        count = weights.write(folder, plan, produce, limit, progress)
        self.config.dtype = dtype
        self.config.save_pretrained(folder)
        return count


class WholeMerge:
    """PEFT's own merge, for adapters that cannot be streamed; the same interface as `StreamedMerge`."""

    def __init__(self, base: Path, adapters: list[Path], scales: list[float], tokens: int = 0, device: str = "cpu"):
        if any(scale != 1 for scale in scales):
            raise ModelError("only LoRA adapters that are streamed have a weight", help="remove --weights")
        self.base, self.adapters, self.tokens, self.device = base, adapters, tokens, device
        self.disk = Weights(base)
        self.config = pretrained.load_config(base)  # of the merged model, but for weights that the adapter may untie
        text = self.config.get_text_config()
        text.vocab_size = max(text.vocab_size, tokens)

    def reference(self) -> PeftModel:
        """Base and adapter side by side, in fp32."""
        model = self.reopen(self.base)
        if self.tokens > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(self.tokens, mean_resizing=False)
        try:
            peft = pretrained.load_trained(model, self.adapters[0], "adapter_0")
            for number, folder in enumerate(self.adapters[1:], 1):
                peft.load_adapter(folder, f"adapter_{number}")
            peft.base_model.set_adapter([*peft.peft_config], inference_mode=True)
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                "the adapter does not fit this base", where=str(self.adapters[0]), why=first_line(error)
            ) from None
        return peft.eval()

    def unrounded_model(self) -> PreTrainedModel:
        """The merged model before it is rounded and written."""
        try:
            return self.reference().merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            raise ModelError("PEFT cannot merge this adapter", why=first_line(error)) from None

    def reopen(self, folder: Path) -> PreTrainedModel:
        """The merged model as it was written, or the base."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        return model.to(self.device).eval()

    def plan(self, dtype: torch.dtype) -> dict[str, Tensor]:
        code = CODES[weights.dtype_name(dtype)]
        return {
            name: Tensor("", code if tensor.dtype in FLOATS else tensor.dtype, tensor.shape)
            for name, tensor in self.disk.tensors.items()
        }

    def write(self, folder: Path, dtype: torch.dtype, limit: int, progress: Callable[[int, int], None]) -> int:
        model = self.unrounded_model()
        model.to(dtype).save_pretrained(folder, max_shard_size=limit)
        weights.apply_umask(folder)
        return len(list(folder.glob("*.safetensors")))


def _why_whole(configs: list[PeftConfig]) -> str | None:
    """Why these adapters need the whole model in memory; None where they can be streamed."""
    for config in configs:
        if (kind := config.peft_type.value) not in STREAMED:
            return f"{kind} is not merged module by module"
        if kind != "LORA":
            if len(configs) > 1:
                return f"{kind} is merged alone"
            if not getattr(config, "save_projection", True):
                return "its projections are not in its file"
            continue
        if str(config.init_lora_weights).startswith(CHANGES_BASE):
            return f"init_lora_weights: {config.init_lora_weights} changes the base's own weights"
        if config.target_parameters or config.layer_replication:
            return "target_parameters and layer_replication change more than single modules"
    return None


def open_merge(
    base: Path,
    adapters: list[Path],
    scales: list[float],
    quantize: RoundTrip | None,
    tokens: int,
    device: str,
    combination: Combination | None = None,
) -> tuple[StreamedMerge | WholeMerge, str | None]:
    """The merge of these adapters into this base, and why it is not streamed where it is not."""
    configs = skeleton.read_configs(adapters)
    because = _why_whole(configs)
    if not because:
        if combination:
            check_configs(configs, adapters, combination)
        try:
            return StreamedMerge(base, adapters, scales, quantize, tokens, device, combination), None
        except skeleton.NotStreamed as reason:
            because = str(reason)
    if combination:
        raise ModelError(
            f"only LoRA adapters that are streamed are combined by {combination.type}", why=because,
            help=f"--combination_type {SUM}, the weighted sum",
        )  # fmt: skip
    if quantize:
        raise ModelError("only a streamed merge can use the dequantized base", why=because, help="original")
    return WholeMerge(base, adapters, scales, tokens, device), because
