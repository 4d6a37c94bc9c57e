"""Base models and tokenizers: from safetensors only, in the precision that the recipe and the hardware allow."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import console, hardware
from stepladder.data import templates
from stepladder.data.special_tokens import NewToken
from stepladder.errors import ModelError, RecipeError, first_line
from stepladder.model import module_patterns, new_tokens, start
from stepladder.model.start import check_files, check_source
from stepladder.model.weights import more
from stepladder.settings import Settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Of no use unless it samples. Transformers refuses to save them then, and vLLM samples by them all the same.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")  # of a repository: all but its weights


def precision(recipe: Settings) -> str:
    """`bf16`, `fp16` or `fp32`: what the recipe fixes, or for `bf16: auto` what the hardware is made for.

    bf16 is fast on CUDA from Ampere on and on CPUs with AMX or AVX-512 BF16. Elsewhere it is emulated, and slower
    than fp32.
    """
    import torch

    bf16, fp16 = recipe.get("bf16"), recipe.get("fp16")
    if fp16 and not torch.cuda.is_available():
        raise RecipeError(
            "fp16 training needs a GPU",
            where=recipe.where("fp16"),
            help="bf16: auto, which is fp32 on this CPU",
        )
    if fp16:
        return "fp16"
    if bf16 is True or bf16 is False:
        return "bf16" if bf16 else "fp32"
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"


def find_folder(name: str, revision: str | None = None, small_files_only: bool = False) -> Path:
    """The folder that holds a model or adapter: `name` itself, or what the hub's cache holds or fetches of it.

    Raises:
        ModelError: there is none, or its weights are pickled.
    """
    check_source(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with _loading(name):
        patterns = [*SMALL_FILES, *([] if small_files_only else ["*.safetensors"])]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    check_files(folder)
    return folder


def load_config(name: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model in a folder, or of a hub id with its `revision`."""
    from transformers import AutoConfig

    with _loading(str(name)):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def load_tokenizer_for(recipe: Settings) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe's model or adapter, with a padding token.

    Raises:
        ModelError: it cannot be loaded, or has tokens that an adapter's base has no embeddings for.
    """
    code, source = bool(recipe.get("trust_remote_code")), start.resolve_recipe_model(recipe)
    tok = load_tokenizer(recipe.get("model_name_or_path"), recipe.get("model_revision"), code)
    if source.has_tokenizer:
        config = load_config(source.base, source.revision, code)
        held = start.trained_rows(source.config)
        rows = config.get_text_config().vocab_size
        if not {*range(rows, new_tokens.needed_rows(tok))} <= held:
            raise ModelError(
                f"the adapter's tokenizer has {len(tok):,} tokens, and its base {source.base} embeds {rows:,}",
                where=str(source.adapter),
                why="the adapter holds no embeddings for the others: they would stay as random as they begin",
                help="the tokenizer that the adapter was trained with",
            )
    return tok


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool | None = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter folder, or of a hub id, with a padding token.

    An adapter without one has its base's.

    Args:
        revision: of a hub id.
        trust_remote_code: run the Python code that lies beside it.
    """
    from transformers import AutoTokenizer

    source = start.resolve_model(name, revision)
    if source.adapter and not source.has_tokenizer:
        name, revision = source.base, source.revision
    with _loading(name):
        tok = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=bool(trust_remote_code))
    if not tok.is_fast:  # labels need the characters that each token stands for
        raise ModelError(
            f"the tokenizer of '{name}' is not a fast one",
            why="it does not tell which characters its tokens stand for",
            help="a model with a tokenizer.json",
        )
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token  # labels mark what is trained, so padding by the end token trains nothing
    return tok


def clear_sampling(generation: GenerationConfig) -> None:
    """Leave the keys of sampling out of a generation config that does not sample."""
    for key in SAMPLING:
        if not generation.do_sample and getattr(generation, key, None) is not None:
            setattr(generation, key, None)


def end_tokens(tokenizer: PreTrainedTokenizerBase, *known: int | list[int] | None) -> int | list[int] | None:
    """The tokens that end a generation: the model's own, the tokenizer's, and the end of turn of its template."""
    candidates: list[int | None] = []
    for ends in known:
        candidates += ends if isinstance(ends, list) else [ends]
    candidates += [tokenizer.eos_token_id, *templates.turn_ends(tokenizer)]
    ends = [end for end in dict.fromkeys(candidates) if end is not None]
    return ends if len(ends) > 1 else ends[0] if ends else None


def load_base(recipe: Settings, mixed_precision: str) -> PreTrainedModel:
    """The model to train, quantized where the recipe says so.

    Call it after the training arguments exist: under ZeRO-3 they tell Transformers to shard
    the weights while loading.
    """
    from transformers import AutoModelForCausalLM

    source = start.resolve_recipe_model(recipe)
    name = source.base
    kwargs: dict[str, Any] = {**(recipe.get("model_init_kwargs") or {}), **_attention(recipe)}
    if quantization := quantization_config(recipe, mixed_precision):
        kwargs["quantization_config"] = quantization
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # for _check_loaded
    with _loading(name):
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=weights_dtype(recipe, mixed_precision),
            revision=source.revision,
            trust_remote_code=bool(recipe.get("trust_remote_code")),
            use_safetensors=True,
            **kwargs,
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # Transformers puts the base in an adapter's place
        raise ModelError(
            f"'{name}' is an adapter, and its files were not here as the run began",
            where=recipe.where("model_name_or_path"),
            help=f"hf download {name}, then the same command again",
        )
    _check_loaded(name, loading)
    model.config.use_cache = False  # of use in generation only, and at odds with checkpointing
    for module in model.modules():
        # On CPUs with AVX-512 BF16, bitsandbytes repacks the weights at the first evaluation and
        # computes in bf16 from then on (nn/modules.py, Linear4bit.forward): evaluation would leave
        # the training loss's arithmetic, and sharded weights cannot be repacked at all.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _check_loaded(name: str, loading: dict[str, Any]) -> None:
    """Warn of weights that the model has no place for; raise ModelError for those that no file holds as it needs them.

    Transformers initializes the latter at random, and its own report of all of them is not printed.

    Args:
        loading: what `from_pretrained` returns beside the model, with `output_loading_info`.
    """
    if extra := sorted(loading["unexpected_keys"]):
        console.warn(f"⚠ '{name}': its config.json has no place for {extra[0]}{more(extra)} of its files: left out")
    wrong = sorted(f"{key} as {[*needed]}, which is {[*held]}" for key, held, needed in loading["mismatched_keys"])
    if missing := wrong or sorted(loading["missing_keys"]):
        raise ModelError(
            f"the weights of '{name}' lack {missing[0]}{more(missing)}",
            why="its config.json describes a model that its files do not hold: the rest would be random",
            help="the config.json that belongs to these weights, or the files that are missing",
        )


def recipe_can_be_sent(recipe: Settings) -> bool:
    """Whether rank 0 can send the weights under FSDP: not those that are quantized, nor code's that others lack."""
    return not any(recipe.get(key) for key in ("load_in_4bit", "load_in_8bit", "trust_remote_code"))


def _attention(recipe: Settings) -> dict[str, str | None]:
    """`attn_implementation` as the model is made; `auto` is settled on the model (`attention.settle`)."""
    name = recipe.get("attn_implementation")
    return {} if name == "auto" else {"attn_implementation": name}


def fit_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new: Sequence[NewToken] = ()
) -> list[str]:
    """Let the model know the tokens that were added to its tokenizer, and where a turn ends.

    Returns:
        The tokens that end a generation from now on and did not before.
    """
    new_tokens.fit_rows(model, tokenizer, new)
    clear_sampling(model.generation_config)
    known = model.generation_config.eos_token_id
    ends = end_tokens(tokenizer, known, model.config.eos_token_id)
    model.config.eos_token_id = model.generation_config.eos_token_id = ends
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    before, after = (value if isinstance(value, list) else [value] for value in (known, ends))
    return [str(tokenizer.convert_ids_to_tokens(end)) for end in after if end is not None and end not in before]


def weights_dtype(recipe: Settings, mixed_precision: str) -> torch.dtype | str:
    """The dtype that the weights are held in: `dtype`, but a quantized model's other layers compute in one dtype."""
    import torch

    if recipe.get("load_in_4bit") or recipe.get("load_in_8bit"):
        return hardware.dtype_of(mixed_precision)
    name = recipe.get("dtype") or "float32"
    return name if name == "auto" else getattr(torch, name)


def quantization_config(recipe: Settings, mixed_precision: str) -> Any:
    """bitsandbytes' configuration for QLoRA (Dettmers et al. 2023, arXiv 2305.14314), or None."""
    from transformers import BitsAndBytesConfig

    if recipe.get("load_in_8bit"):
        return BitsAndBytesConfig(load_in_8bit=True)
    if not recipe.get("load_in_4bit"):
        return None
    compute = hardware.DTYPES[mixed_precision]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.get("bnb_4bit_quant_type"),
        bnb_4bit_use_double_quant=recipe.get("use_bnb_nested_quant"),
        bnb_4bit_compute_dtype=compute,
        # FSDP and ZeRO-3 flatten parameters of one dtype together: the packed 4-bit values must
        # pretend to be of the compute dtype (transformers docs, "FSDP and QLoRA").
        bnb_4bit_quant_storage=recipe.get("bnb_4bit_quant_storage") or compute,
    )


def load_for_inference(
    name: str, base: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model, a merged folder, or an adapter on its base, ready to generate, on the best device.

    Args:
        base: where an adapter's base lies, in place of where the adapter says.
        trust_remote_code: run the Python code that lies beside the model.

    Raises:
        ModelError: there is none, it cannot be loaded, or it needs code that is not trusted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    source = start.resolve_existing_model(name, base)
    device = hardware.accelerator()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # elsewhere as `bf16: auto` trains
    place = str(source.adapter) if source.has_tokenizer else source.base
    tok = load_tokenizer(place, source.revision, trust_remote_code)
    with _loading(source.base, of=str(source.adapter or "")):
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.base, revision=source.revision, dtype=dtype, use_safetensors=True,
            trust_remote_code=trust_remote_code, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    _check_loaded(source.base, loading)
    with _loading(name):
        fit_embeddings(model, tok)
        if source.adapter:
            model = load_trained(model, source.adapter)
    return model.to(device).eval(), tok


def load_trained(model: PreTrainedModel, folder: Path, name: str = "default") -> PeftModel:
    """An adapter on a whole model, as PEFT loads it.

    Raises:
        ModelError: a tensor is missing, which PEFT would leave as random as it begins, with a warning.
    """
    from peft import PeftConfig, PeftModel

    names = [name for name, _ in model.named_modules()]
    module_patterns.check_file(PeftConfig.from_pretrained(str(folder)), names, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, folder, name)
        except UserWarning as warning:
            missing = re.findall(r"'([^']+)'", str(warning)) or [str(warning)]
            what = f"the adapter lacks {missing[0].replace(f'.{name}.', '.')}{more(missing)}"
            raise wrong_base(folder, Path(model.name_or_path), what) from None


def wrong_base(adapter: Path, base: Path, what: str) -> ModelError:
    return ModelError(
        f"the adapter does not fit this base: {what}",
        where=str(adapter),
        why=f"it was trained on another model than {base}, or on another size of it",
        help="name the base that it was trained on: --base",
    )


def needs_code(name: str, where: str = "") -> ModelError:
    """That a model cannot be loaded without running code of its own. Transformers would ask, and wait for an answer."""
    return ModelError(
        f"'{name}' cannot be loaded without Python code that lies beside it",
        where=where,
        why="code that comes with a model could do all that you may do, so it is not run unless you say so",
        help="read that code; if you trust it: trust_remote_code: true in the recipe, or --trust_remote_code of "
        "generate, compare and evaluate. A merge takes models that Transformers knows by itself",
    )


@contextlib.contextmanager
def _loading(name: str, of: str = "") -> Iterator[None]:
    """Turn what the libraries raise for a missing or broken model, or the base of an adapter, into a message."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise needs_code(name) from None
        if isinstance(error, ImportError) and re.search("FlashAttention|`kernels`", str(error)):
            from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

            taken = f"kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}"
            raise ModelError(
                "the package of that attn_implementation is not installed, or not in a version that Transformers take",
                why=first_line(error),
                help=f"pip install '{taken}', and attn_implementation: kernels-community/flash-attn2; "
                "or pip install flash-attn; or attn_implementation: sdpa",
            ) from None
        # A configuration that fits nothing can raise whatever its reader's expressions raise. A RuntimeError may be
        # another rank's end, or the memory's.
        wrong = isinstance(error, (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError))
        wrong = wrong or (isinstance(error, RuntimeError) and "mismatch" in str(error))
        wrong = wrong or type(error) is Exception  # of tokenizers' reader of tokenizer.json
        if wrong or type(error).__name__.startswith(("SafetensorError", "StrictDataclass")):
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            reason += " " + lines[1].strip() if reason.endswith(":") and len(lines) > 1 else ""
            raise ModelError(
                f"'{name}'" + f", the base of {of}," * bool(of) + " could not be loaded",
                why=reason if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {reason}",
                help="a local folder with config.json and safetensors, or a hub id (network or cache needed)"
                + "; --base names it where it is now" * bool(of),
            ) from None
        raise
