"""The keys of an Axolotl configuration that need arithmetic, or a look at other keys."""

from __future__ import annotations

import re
from typing import Any

from stepladder.errors import suggest
from stepladder.recipe.axolotl.config import Config
from stepladder.recipe.axolotl.outcome import TRANSLATED, Outcome, Rule, dropped, left_out, sets, unsupported
from stepladder.recipe.schema import known_keys

OFF = dropped("off")

# ---- model ----


def other_source(value: Any, config: Config) -> Outcome:
    """A tokenizer or a configuration from another place than the model's."""
    if value == config.get("base_model"):
        return dropped("the model's own, as here")
    return unsupported("it comes from the model's folder: put both into one")


def bos_token(value: Any, config: Config) -> Outcome:
    if value in ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"):
        return left_out("the model's own BOS is used: one of these names is nearly always it")
    return unsupported("tokenizer and embeddings stay as the model has them")


def model_class(value: Any, config: Config) -> Outcome:
    if re.search(r"CausalLM|LMHeadModel", str(value)):
        return dropped("follows from the model's config")
    return unsupported("causal language models only")


def attention(value: Any, config: Config) -> Outcome:
    if value in ("sage", "fp8", "s2"):
        return unsupported("attention in another precision or of another kind")
    if value == "xformers":
        return left_out("another kernel of the same attention: PyTorch's own (sdpa) runs")
    return sets(attn_implementation=value)


def attention_flag(name: str) -> Rule:
    """One of the older switches, such as `flash_attention: true`."""
    return lambda value, config: attention(name, config) if value else dropped("off")


# ---- method ----


def adapter(value: Any, config: Config) -> Outcome:
    if value == "lora":
        return sets(use_peft=True)
    if value != "qlora":
        return unsupported("lora and qlora are")
    keys: dict[str, Any] = {"use_peft": True, "load_in_4bit": True}
    custom = config.block("bnb_config_kwargs")
    keys |= {} if "bnb_4bit_quant_type" in custom else {"bnb_4bit_quant_type": "nf4"}
    keys |= {} if "bnb_4bit_use_double_quant" in custom else {"use_bnb_nested_quant": True}
    return sets("NF4 with double quantization, as Axolotl has it", **keys)


def quantized(name: str) -> Rule:
    """`load_in_4bit` or `load_in_8bit`."""

    def rule(value: Any, config: Config) -> Outcome:
        wanted = config.get("adapter") == "qlora" and name == "load_in_4bit"
        if bool(value) != wanted and config.get("adapter") == "qlora":
            return unsupported("contradicts adapter: qlora") if value or wanted else OFF
        if value and not config.has("adapter"):
            return unsupported("quantized weights cannot be trained; Axolotl refuses it too")
        return sets(**{name: value}) if value else OFF

    return rule


# The linear layers of a Llama-like block: `lora_target_linear` adds all of them to `lora_target_modules`.
ATTENTION_AND_MLP = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}


def target_modules(value: Any, config: Config) -> Outcome:
    if not config.get("lora_target_linear"):
        pattern = isinstance(value, str) and not value.replace(".", "_").isidentifier()
        why = "a regular expression over whole module names: a run whose model has none that matches does not begin"
        return sets(why if pattern else "", lora_target_modules=value)
    names = {*map(str, value)} if isinstance(value, list) else {str(value)}
    if ATTENTION_AND_MLP <= names <= ATTENTION_AND_MLP | {"gate_proj"}:
        return dropped("lora_target_linear covers them")
    why = "contradicts lora_target_linear, with which Axolotl trains every linear layer besides these: keep one"
    return unsupported(why)


HARMLESS_PLUGINS = {
    "CutCrossEntropyPlugin": "memory only: the loss here needs no whole logits either",
    "KernelsPlugin": "speed and memory only",
    "ExpertParallelPlugin": "data parallel only",
    "LMEvalPlugin": "for measuring the model, not for training it",
    "SwanLabPlugin": "for watching a run, not for training it",
}


def plugins(value: Any, config: Config) -> Outcome:
    name = str(value).rsplit(".", 1)[-1]
    if name == "LigerPlugin":
        return sets("needs liger-kernel, and a GPU", use_liger_kernel=True)
    if name in HARMLESS_PLUGINS:
        return left_out(HARMLESS_PLUGINS[name])
    return unsupported("code of Axolotl's own")


# ---- precision and memory ----

HELD = "weights in 16 bits as Axolotl holds them; in full fine-tuning dtype: float32 keeps small updates"


def weights(config: Config) -> dict[str, Any]:
    """The precision that Axolotl holds the weights in: that of the computation, not fp32."""
    if config.get("adapter") == "qlora" or config.get("load_in_4bit") or config.get("load_in_8bit"):
        return {}  # quantization decides
    if config.get("fp16") and config.get("bf16", "auto") is False:
        return {"dtype": "float16"} if config.has("adapter") else {}  # fp16 weights cannot be trained themselves
    return {"dtype": "auto" if config.get("fp16") and config.get("bf16", "auto") == "auto" else "bfloat16"}


def bf16(value: Any, config: Config) -> Outcome:
    if value == "full":
        return sets("bf16 throughout, without mixed precision", bf16=False, dtype="bfloat16")
    if value == "auto" and config.get("fp16"):
        return dropped("fp16 decides")
    held = weights(config) if value else {}
    return sets(HELD if held else "", bf16=value, **held)


def fp16(value: Any, config: Config) -> Outcome:
    """Without a word on bf16 it asks for 16 bits, which the recipe gives on any hardware."""
    if not value:
        return OFF
    if config.get("bf16", "auto") == "auto":
        why = "bf16 where the hardware has it, fp16 on older GPUs, fp32 on CPUs; with bf16: false it stays fp16"
        return sets(why, bf16="auto", **weights(config))
    if config.get("bf16"):
        return dropped("bf16 decides")
    return sets(fp16=True, **weights(config))


def tf32(value: Any, config: Config) -> Outcome:
    return dropped("PyTorch decides") if value == "auto" else sets(tf32=value)


def compiled(value: Any, config: Config) -> Outcome:
    if value == "auto":
        return left_out("speed only: true or false")
    return sets(torch_compile=value)


def checkpointing(value: Any, config: Config) -> Outcome:
    block = config.block("fsdp_config")
    if value is False and (block.get("activation_checkpointing") or block.get("fsdp_activation_checkpointing")):
        return dropped("fsdp_config.activation_checkpointing decides")
    if value in ("offload", "offload_disk", "unsloth"):
        return sets("activations wait in host memory", gradient_checkpointing=True, activation_offloading=True)
    return sets(gradient_checkpointing=value)


def offloading(value: Any, config: Config) -> Outcome:
    if value in (True, "legacy"):
        return sets(activation_offloading=True)
    return left_out("memory only: in host memory or not") if value else OFF


# ---- training ----


def shared_rows(value: Any, config: Config) -> Outcome:
    """Tensor, context and sequence parallelism: so many ranks work on the same rows."""
    if value in (False, 0, 1):
        return dropped("each rank has rows of its own, as here")
    return unsupported(
        f"{value} ranks share their rows, so that the global batch is that much smaller than here: remove the key, "
        "and divide gradient_accumulation_steps or micro_batch_size by it"
    )


def sequential(value: Any, config: Config) -> Outcome:
    """The rows in their own order. Axolotl shuffles data sets that it merges even so, unless it is told not to."""
    shuffles = config.values.get("shuffle_merged_datasets") is not False and len(config.entries("datasets")) > 1
    if value and (shuffles or config.get("shuffle_before_merging_datasets")):
        return unsupported("Axolotl shuffles the merged rows first, here they keep their order: set shuffle_… to false")
    return sets(train_sampling_strategy="sequential") if value else OFF


def packing(value: Any, config: Config) -> Outcome:
    why = "rows are packed in another order, and none is left out: the number of steps can differ by a few"
    return sets(why, packing=True) if value else OFF


def optimizer(value: Any, config: Config) -> Outcome:
    known = known_keys()["optim"].choices
    renamed = {"adamw_hf": "adamw_torch", "ao_adamw_8bit": "adamw_torch_8bit", "ao_adamw_4bit": "adamw_torch_4bit"}
    name = str(value).lower()
    if name in renamed:
        return sets("the same algorithm under its present name", optim=renamed[name])
    return _one_of("optim", name, known, "Transformers has no such optimizer")


def scheduler(value: Any, config: Config) -> Outcome:
    if value == "cosine" and config.has("cosine_min_lr_ratio"):
        falls = config.number("cosine_min_lr_ratio", 0) < 1
        return sets(lr_scheduler_type="cosine_with_min_lr" if falls else CONSTANT)
    known = known_keys()["lr_scheduler_type"].choices
    return _one_of("lr_scheduler_type", str(value), known, "Transformers has no such schedule")


CONSTANT = "constant_with_warmup"


def _one_of(key: str, name: str, known: tuple[str, ...], otherwise: str) -> Outcome:
    if name in known:
        return sets(**{key: name})
    return unsupported(suggest(name, known) or otherwise)


def optimizer_arguments(value: Any, config: Config) -> Outcome:
    text = ",".join(f"{name}={item}" for name, item in value.items()) if isinstance(value, dict) else value
    return sets(optim_args=text)


def min_lr_ratio(value: Any, config: Config) -> Outcome:
    ratio = config.number("cosine_min_lr_ratio", 0)
    if config.get("lr_scheduler", "cosine") != "cosine":
        return dropped("only the cosine schedule has it")
    if ratio >= 1:
        return dropped("the learning rate stays as it is: a constant schedule")
    return sets(lr_scheduler_kwargs={"min_lr_rate": ratio})


def warmup_ratio(value: Any, config: Config) -> Outcome:
    ratio = config.number("warmup_ratio", 0)
    if not 0 <= ratio < 1:
        return unsupported("a share of all steps is below 1")
    return sets("below 1 it is a share of all steps", warmup_steps=ratio)


def batch_size(value: Any, config: Config) -> Outcome:
    if config.has("gradient_accumulation_steps"):
        return unsupported("contradicts gradient_accumulation_steps: keep one")
    micro = config.number("micro_batch_size", 1)
    steps, rest = divmod(config.number("batch_size", 1), micro) if micro > 0 else (0, 1)
    if rest or steps < 1:
        return unsupported("not a multiple of micro_batch_size")
    return sets("batch_size ÷ micro_batch_size", gradient_accumulation_steps=int(steps))


# ---- evaluation, saving and monitoring ----


def validation(value: Any, config: Config) -> Outcome:
    share = config.number("val_set_size", 0)
    if share <= 0:
        return dropped("nothing is set aside")
    if config.has("test_datasets"):
        return unsupported("contradicts test_datasets: keep one")
    return sets(test_split_size=share)


def per_epoch(what: str) -> Rule:
    """`evals_per_epoch` and `saves_per_epoch`: so many times an epoch is a share of all steps."""

    def rule(value: Any, config: Config) -> Outcome:
        times, epochs = config.number(f"{what}s_per_epoch", 1), config.number("num_epochs", 1)
        if times <= 0:
            return sets(eval_strategy="no") if what == "eval" else OFF
        if times == 1 or times * epochs <= 1:
            return sets(**{f"{what}_strategy": "epoch"})
        share = round(1 / (times * epochs), 6)
        why = f"{times:g} times in each of {epochs:g} epochs, as a share of all steps"
        return sets(why, **{f"{what}_strategy": "steps", f"{what}_steps": share})

    return rule


def every_steps(what: str) -> Rule:
    """`eval_steps` and `save_steps`: steps, or below 1 a share of them, as in Transformers."""
    return lambda value, config: sets(**{f"{what}_strategy": "steps", f"{what}_steps": value}) if value else OFF


def keeps_best(config: Config) -> bool:
    """Whether Axolotl would end with the best checkpoint: it saves and evaluates by steps, in step with each other."""

    def interval(what: str) -> float:
        times = config.number(f"{what}s_per_epoch", 0) * config.number("num_epochs", 1)
        return 1 / times if times > 1 else config.number(f"{what}_steps", 0)

    save, evaluate = interval("save"), interval("eval")
    return bool(config.evaluates() and save > 0 and evaluate > 0 and save % evaluate == 0)


def best_model(value: Any, config: Config) -> Outcome:
    if value and not keeps_best(config):
        return dropped("Axolotl ignores it unless it saves and evaluates by steps, the one a multiple of the other")
    return sets(load_best_model_at_end=True) if value else OFF


def wandb_project(value: Any, config: Config) -> Outcome:
    why = "W&B reads its project from the environment"
    return Outcome(TRANSLATED, why, {"report_to": ["wandb"]}, environment={"WANDB_PROJECT": str(value)})


def hub(value: Any, config: Config) -> Outcome:
    return sets("private, as Axolotl makes it", push_to_hub=True, hub_model_id=value, hub_private_repo=True)
