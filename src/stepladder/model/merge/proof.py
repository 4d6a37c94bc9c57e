"""Whether a merged model is its base with the adapter: by what both answer, and by which tensors changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.errors import ModelError
from stepladder.model.merge.methods import StreamedMerge, WholeMerge
from stepladder.model.weights import FLOATS, Weights, dtype_name

if TYPE_CHECKING:
    import torch

STEPS = 8  # tokens that each prompt is continued by
Logits = list["torch.Tensor"]


class Proof:
    """What base and adapter answer, and whether the merged model, before and after it is written, does too.

    Everything is computed in fp32. Before the merged weights are rounded, only the order of summation differs: the
    logits must agree within 1e-4 (or 1e-5 of the largest, where logits are large). What is written must be those
    weights, each rounded to its dtype; the error of that must be less than half of what the adapter does.

    Args:
        prompts: token ids of each prompt.

    Raises:
        ModelError: the merge is wrong.
    """

    def __init__(self, merge: StreamedMerge | WholeMerge, prompts: list[list[int]]):
        self.merge, self.prompts = merge, prompts
        model = merge.reference()
        self.sequences = greedy(model, prompts, merge.device)
        self.logits = self._answers(model)
        if not all(answer.isfinite().all() for answer in self.logits):
            raise ModelError(
                "base and adapter together have logits that are not finite",
                why="weights beyond what fp32 holds come of it; nothing was written",
                help="smaller --weights, or an adapter whose training did not diverge",
            )
        with model.disable_adapter():
            self.effect = difference(self.logits, self._answers(model))
        del model
        self.bound = max(1e-4, 1e-5 * max(float(answer.abs().max()) for answer in self.logits))
        self.exact = difference(self.logits, self._answers(merge.unrounded_model()))
        if not self.exact["max"] <= self.bound:  # NaN fails too
            raise ModelError(
                f"the merged model is not base and adapter: logits differ by {self.exact['max']:.1e} in fp32",
                why=f"another order of summation moves them by less than {self.bound:.1e}; nothing was written",
                help="serve base and adapter together, and report this with the versions installed",
            )

    def _answers(self, model: Any) -> Logits:
        return logits(model, self.sequences, self.merge.device)

    def compare(self, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """The proof's figures, for merge.json.

        Raises:
            ModelError: what was written is not what was merged, or rounding took the adapter's change.
        """
        changed = self._weights(folder, dtype)
        merged = self._answers(self.merge.reopen(folder))
        off = self._error(
            merged,
            f"{dtype_name(dtype)} is too coarse for this adapter: rounding moves the logits by",
            "--dtype fp32, or serve base and adapter together",
        )
        agree, of = 0, STEPS * len(self.prompts)
        for ids, prompt, answer in zip(self.sequences, self.prompts, merged, strict=True):
            agree += sum(
                a == b for a, b in zip(ids[len(prompt) :], answer[len(prompt) - 1 :].argmax(-1).tolist(), strict=False)
            )
        return {
            **changed,
            "prompts": len(self.prompts),
            "adapter_moves": self.effect,
            "exact": self.exact | {"bound": self.bound},
            "written": off,
            "greedy": {"agree": agree, "of": of},
        }

    def read_back(self, model: Any, name: str) -> dict[str, float]:
        """How far the answers of a file of the merged model, read by another program, are off.

        Raises:
            ModelError: by half of what the adapter does, or more: the file is wrong, or its numbers are too coarse.
        """
        return self._error(
            self._answers(model.to(self.merge.device)),
            f"{name} is not the merged model, or too coarse: its logits are off by",
            "--gguf f16, or without --gguf",
        )

    def _error(self, merged: Logits, what: str, help: str) -> dict[str, float]:
        """How far a merged model's logits are off; ModelError from half of what the adapter does."""
        off = difference(self.logits, merged)
        if not off["mean"] <= self.effect["mean"] / 2:
            raise ModelError(
                f"{what} {off['mean']:.1e}",
                why=f"the adapter itself moves them by {self.effect['mean']:.1e}; nothing was written",
                help=help,
            )
        return off

    def _weights(self, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """Count the tensors that changed; they must be those that the adapter targets, each rounded once."""
        import torch

        base, merged = self.merge.disk, Weights(folder)
        common = base.tensors.keys() & merged.tensors.keys()
        changed = set()
        for key in common:
            tensor = base.read(key)
            tensor = tensor.to(dtype) if base.tensors[key].dtype in FLOATS else tensor
            if not torch.equal(tensor, merged.read(key)):
                changed.add(key)
        changed |= merged.tensors.keys() - common
        if not changed:
            raise ModelError("the merged weights are the base's: the adapter changes nothing in this dtype")
        if isinstance(self.merge, WholeMerge):
            return {"tensors": len(merged.tensors), "changed": len(changed)}
        targeted = self.merge.target_names()
        if extra := sorted(changed - targeted.keys()):
            raise ModelError(f"{extra[0]} changed, and the adapter does not target it")
        for key, name in targeted.items():
            exact = self.merge.merged_weight(name)
            if not torch.equal(merged.read(key), exact.to(dtype).cpu()):  # with --device cuda, exact is there
                raise ModelError(f"{key} was not written as it was merged", why="a fault of the disk, or a bug")
            if key not in changed and not torch.equal(exact, self.merge.read(name)):
                raise ModelError(
                    f"{dtype_name(dtype)} cannot hold the change of {key}: it would stay the base's",
                    help="--dtype fp32, or serve base and adapter together",
                )
        return {"tensors": len(merged.tensors), "targeted": len(targeted), "changed": len(changed)}


def greedy(model: Any, prompts: list[list[int]], device: str) -> list[list[int]]:
    """Each prompt with the STEPS tokens that the model continues it by."""
    sequences = [list(prompt) for prompt in prompts]
    for _ in range(STEPS):
        for ids, answer in zip(sequences, logits(model, sequences, device), strict=True):
            ids.append(int(answer[-1].argmax()))
    return sequences


def logits(model: Any, sequences: list[list[int]], device: str) -> Logits:
    """The logits of each sequence (tokens, vocabulary), in one batch.

    Shorter sequences are filled up on the right, where a causal model's answers do not see it.
    """
    import torch

    longest = max(map(len, sequences))
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], device=device)
    with torch.no_grad():
        answers = model(input_ids=ids, use_cache=False).logits.float().cpu()
    return [answer[: len(ids)] for answer, ids in zip(answers, sequences, strict=True)]


def difference(ours: Logits, theirs: Logits) -> dict[str, float]:
    """Largest and mean absolute difference of the logits, and KL(ours || theirs) in nats per token."""
    import torch

    gaps = [(a - b).abs() for a, b in zip(ours, theirs, strict=True)]
    kl = [torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
          for a, b in zip(ours, theirs, strict=True)]  # fmt: skip
    return {
        "max": max(float(gap.max()) for gap in gaps),
        "mean": float(torch.cat([gap.mean(-1) for gap in gaps]).mean()),
        "kl": float(torch.cat(kl).mean()),
    }


def report(facts: dict[str, Any], folder: Path) -> str:
    """merge.json in four lines, and one of a GGUF file."""
    size = f"{facts['bytes'] / 1e9:.2f} GB of {facts['dtype']} in {facts['shards']} file{'s' * (facts['shards'] > 1)}"
    head = (
        f"✔ {folder}: {size}, merged in {facts['merge_seconds']} s, "
        f"{facts['seconds']} s in all, peak memory {facts['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    proof, file, lines = facts["proof"], facts["gguf"], []
    if file:
        off = file["read_back"]
        read = f"read back by Transformers: logits off by {_errors(off)}" if off else f"not read back: {file['why']}"
        lines = [f"  gguf     {file['file']}, {file['bytes'] / 1e9:.2f} GB, {read}"]
    if not proof:
        return "\n".join([head, "  not verified, as you asked; the card says so", *lines])
    exact, greedy = proof["exact"], proof["greedy"]
    changed = f"{proof['changed']} of {proof['tensors']} tensors changed"
    if "targeted" in proof:
        changed += f", none but the {proof['targeted']} that the adapter targets"
    return "\n".join(
        (
            head,
            f"  weights  {changed}",
            f"  logits   in fp32 off by {exact['max']:.1e} at most (bound {exact['bound']:.1e}); as written by "
            f"{_errors(proof['written'])}, where the adapter moves them by "
            f"{proof['adapter_moves']['mean']:.1e} in the mean",
            f"  greedy   {greedy['agree']} of {greedy['of']} agree, {proof['prompts']} prompts",
            *lines,
        )
    )


def _errors(off: dict[str, float]) -> str:
    return f"{off['max']:.1e}, {off['mean']:.1e} in the mean, KL {off['kl']:.1e}"
