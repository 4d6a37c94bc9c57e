"""What an adapter begins as, where a resumed run and its result need it: PiSSA, OLoRA and VeRA.

PiSSA (Meng et al. 2024, arXiv:2404.02948) begins as the largest singular values of each weight, OLoRA (Büyükakyüz 2024,
arXiv:2406.01775) as a part of its QR decomposition. The trained adapter alone is right on the changed base only. It is
saved converted, as PEFT documents it (`path_initial_model_for_weight_conversion`): with W = W' + s B₀A₀, the trained
W' + s BA is W + s [B, -B₀] [A; A₀], which is LoRA of twice the rank on the original base.

VeRA's projections are drawn from `projection_prng_key`; PEFT promises the same values on one system only.

All lie in the run's folder, so that a resumed run has them too: another number of threads or another machine may
decompose a weight into other factors.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import files
from stepladder.errors import CheckpointError, ModelError, first_line
from stepladder.model import fixed_values
from stepladder.model.start import ADAPTER, ADAPTER_CONFIG
from stepladder.model.weights import differences
from stepladder.settings import DECOMPOSED, Settings

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

CHECKSUM = "sha256"  # in the metadata of that file
INITIAL = Path("initial_adapter") / ADAPTER  # within the run's folder


def wrap(model: Any, config: PeftConfig) -> PeftModel:
    """The model in PEFT's adapter; one on the meta device has no weights to decompose: they come from rank 0."""
    from peft import get_peft_model

    kind = getattr(config, "init_lora_weights", None)
    if str(kind).startswith(DECOMPOSED) and model.device.type == "meta":
        config.init_lora_weights = True
    with warnings.catch_warnings():  # `peft_methods.check_names` reports these
        warnings.filterwarnings(
            "ignore", message=r"The following (rank|alpha)_pattern keys|You have passed exclude_mod|Invalid `oft_block"
        )
        wrapped = get_peft_model(model, config)
    if kind is not None:
        wrapped.peft_config["default"].init_lora_weights = kind
    return wrapped


def is_decomposed(model: Any) -> bool:
    """Whether a model's adapter began as a part of its base."""
    config = getattr(model, "peft_config", {}).get("default")
    return str(getattr(config, "init_lora_weights", "")).startswith(DECOMPOSED)


def check_layers(wrapped: Any, recipe: Settings) -> None:
    """Raise ModelError for a layer that PEFT decomposes wrongly, or into a smaller adapter than the recipe says."""
    kind = getattr(wrapped.peft_config["default"], "init_lora_weights", None)
    for name, layer in _layers(wrapped) if is_decomposed(wrapped) else ():
        if (rank := layer.r["default"]) > (most := min(layer.in_features, layer.out_features)):
            raise ModelError(
                f"lora_r: {rank}, and {name}, of which the adapter is a part, has rank {most} at most",
                where=recipe.where("lora_r"),
                help=f"lora_r: {most}, or other lora_target_modules",
            )
        if layer.fan_in_fan_out and kind == "olora":
            raise ModelError(
                f"init_lora_weights: olora cannot be used on {name}",
                where=recipe.where("peft_kwargs.init_lora_weights"),
                why="it stores its weight transposed (Conv1D), which PEFT's OLoRA does not look at",
                help="init_lora_weights: pissa",
            )


def keep(model: Any, run_folder: Path, checkpoint: Path | None, writes: bool) -> None:
    """Write the first factors into the folder of a run that begins; give those of a resumed run their place.

    Every rank calls it, before a strategy wraps the model. Ranks whose model is on the meta device receive rank 0's.

    Args:
        checkpoint: of this folder, that the run resumes from; None for one that begins.

    Raises:
        CheckpointError: the file of a resumed run is not there, or of another adapter; or the recipe begins the
            adapter another way than the run did.
    """
    file = run_folder / INITIAL
    drawn = fixed_values.projections(model)
    if not is_decomposed(model) and not drawn:
        if checkpoint and file.is_file():
            raise CheckpointError(
                f"{file} says that this run's adapter began as a part of its base",
                why="its matrices are right on the changed base only, which another initialization does not make",
                help="peft_kwargs: {init_lora_weights: …} as the run began",
            )
        return
    here = _copies(drawn) or _factors(model)
    if checkpoint:
        first = _read(file, here)
        if drawn:
            for name, projection in drawn.items():
                projection.copy_(first[name])  # no operation on the meta device
        elif not any(tensor.is_meta for tensor in here.values()):
            _correct(model, here, first)
    elif writes:
        from safetensors.torch import save

        files.make_folder(file.parent)
        files.write_atomic(file, save(here, {"format": "pt", CHECKSUM: checksum(here)}))


def checksum(factors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the factors: changed ones would give another base, and a result that is wrong without an error."""
    found = hashlib.sha256()
    for name in sorted(factors):
        found.update(name.encode() + factors[name].numpy().tobytes())
    return found.hexdigest()


def _read(file: Path, here: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        first = load_file(file)
        fault = differences(*({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (first, here)))
        with safe_open(file, "pt") as opened:
            if not fault and (opened.metadata() or {}).get(CHECKSUM) != checksum(first):
                fault = "its matrices do not have the checksum that was written with them"
    except (OSError, SafetensorError) as error:
        fault = first_line(error)
    if fault:
        raise CheckpointError(
            f"{file} cannot be used: {fault}",
            why="it holds what the adapter began as, without which its result cannot be saved for the original base",
            help="put the file back from a copy, or --overwrite to restart the run",
        )
    return first


def _correct(model: Any, now: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    """Take the factors that a run began with out of its base, in place of those that were just computed."""
    import torch
    from peft.utils.integrations import gather_params_ctx

    for name, layer in _layers(model):
        keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if all(torch.equal(now[key], saved[key]) for key in keys):
            continue
        with gather_params_ctx(layer.get_base_layer().weight), torch.no_grad():
            (a, b), (was_a, was_b) = ([tensors[key] for key in keys] for tensors in (now, saved))
            change = layer.scaling["default"] * (b @ a - was_b @ was_a)
            layer.get_base_layer().weight.data += change.T if layer.fan_in_fan_out else change


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """LoRA's layers by their names in an adapter's file."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _factors(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the adapter's matrices by their names in its file; on the meta device they have shapes only."""
    weights = {
        f"{name}.{part}.weight": getattr(layer, part)["default"].weight.detach()
        for name, layer in _layers(model)
        for part in ("lora_A", "lora_B")
    }
    return _copies(weights)


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t if t.is_meta else t.float().cpu().clone().contiguous() for name, t in tensors.items()}


def with_projections(tensors: dict[str, torch.Tensor], model: Any, run_folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors with VeRA's projections as the run began with them: ZeRO holds them in its own precision."""
    from safetensors.torch import load_file

    return tensors | (load_file(run_folder / INITIAL) if fixed_values.projections(model) else {})


def saved_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a factor in the converted adapter."""
    axis = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
    return tuple(size * (1 + (number == axis)) for number, size in enumerate(shape))


def convert(tensors: dict[str, torch.Tensor], names: dict[str, str], run_folder: Path) -> dict[str, torch.Tensor]:
    """A trained adapter's tensors as LoRA of twice the rank on the original base; the trained factors come first.

    Args:
        tensors: by their names in the model.
        names: these, by the names in an adapter's file.
    """
    import torch
    from safetensors.torch import load_file

    first = {names[key]: tensor for key, tensor in load_file(run_folder / INITIAL).items()}
    both = {}
    for name, tensor in tensors.items():
        if name not in first:  # a module that is trained in full
            both[name] = tensor
        elif ".lora_A." in name:
            both[name] = torch.cat([tensor, first[name].to(tensor.dtype)], 0)
        else:
            both[name] = torch.cat([tensor, -first[name].to(tensor.dtype)], 1)
    return both


def convert_config(folder: Path) -> None:
    """Let an adapter_config.json describe the converted adapter; lora_alpha / r, its scale, stays."""
    config = files.read_object(folder / ADAPTER_CONFIG)
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"], "init_lora_weights": True}
    files.write_atomic(folder / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True))
