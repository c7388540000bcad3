"""Loads saved models where secateur cannot be imported, and writes down what they say; run by tests, in a process.

Uses nothing but what a person without secateur has: torch, transformers (4.57 or later) and, if it is there, peft.
Arguments: a JSON file with one list of cases, and the file for the answers. A case names a ``folder``, a
file with ``input_ids`` and ``logits`` as ``expected``, under ``checks`` what to look at beyond the logits, and under
``options`` how to load it for those.
"""

import json
import sys
import traceback
import warnings
from pathlib import Path

sys.modules["secateur"] = None
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)


def load(folder, auto=AutoModelForCausalLM, dtype=torch.float32, **options):
    """Return the model of a folder in evaluation mode, with no weight missing or left over."""
    model, report = auto.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, output_loading_info=True, **options
    )
    wrong = {key: sorted(map(str, value)) for key, value in report.items() if value}
    if auto is AutoModelForCausalLM and wrong:
        raise ValueError(f"{wrong}")
    return model.eval()


def logits(model, ids):
    """Return the logits, without a cache."""
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.float()


def difference(first, second):
    """Return the largest absolute difference; infinite where one is not finite."""
    found = float((first - second).abs().max())
    return found if found == found else float("inf")


def generation(folder, model, ids, expected):
    """Return whether greedy text is the same with no cache, the usual one and a static one."""
    model = load(folder, dtype=torch.float64)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    with torch.inference_mode():
        plain = model.generate(ids, use_cache=False, **options)
        cached = model.generate(ids, **options)
        static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    return bool(torch.equal(plain, cached) and torch.equal(plain, static))


def attention(folder, model, ids, expected):
    """Return the largest difference between attention implementations, chosen when loading and later."""
    eager = load(folder, attn_implementation="eager")
    found = difference(logits(eager, ids), expected)
    if not eager._supports_sdpa:
        return found
    eager.set_attn_implementation("sdpa")
    names = {m.config._attn_implementation for m in eager.modules() if hasattr(m, "config")}
    if names != {"sdpa"}:
        raise ValueError(f"{names}")
    return max(found, difference(logits(eager, ids), expected))


def gradients(folder, model, ids, expected):
    """Return the largest relative difference of gradients with and without gradient checkpointing."""
    found = []
    for checkpointing in (False, True):
        model = load(folder, dtype=torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)  # for dropout
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    if found[0].numel() < sum(p.numel() for p in model.parameters()) / 2:
        raise ValueError("most parameters have no gradient")
    return difference(*found) / float(found[0].abs().max())


def saved(folder, model, ids, expected):
    """Return the difference of the logits after saving once more, into ``again`` beside the folder."""
    again = Path(folder).with_name(Path(folder).name + "-again")
    model.save_pretrained(again)
    return difference(logits(load(again), ids), expected)


def adapters(folder, model, ids, expected):
    """Return the difference of the logits before and after trained LoRA adapters are merged."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(load(folder, dtype=torch.float64), options).eval()
    before = logits(adapted, ids)
    if difference(before, expected) < 1e-3:
        raise ValueError("the adapters did nothing")
    return difference(logits(adapted.merge_and_unload(), ids), before) / float(before.abs().max())


def bfloat16(folder, model, ids, expected):
    """Return the mean difference of the logits in bfloat16, over their spread."""
    half = load(folder, dtype=torch.bfloat16)
    if {p.dtype for p in half.parameters()} != {torch.bfloat16}:
        raise ValueError("not all weights are in bfloat16")
    return float((logits(half, ids) - expected).abs().mean() / expected.std())


def base(folder, model, ids, expected):
    """Return whether the bare model fits: same hidden states, a whole number in every attention, same back ends."""
    bare = load(folder, AutoModel)
    with torch.inference_mode():
        hidden = bare(input_ids=ids, use_cache=False).last_hidden_state
        inner = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    numbers = [m.layer_idx for m in bare.modules() if hasattr(m, "layer_idx")]
    stock = next(c for c in type(bare).__mro__ if c.__module__.startswith("transformers.models."))
    alike = getattr(bare, "is_backend_compatible", bool)() == getattr(stock, "is_backend_compatible", bool)()
    return bool(torch.equal(hidden, inner) and all(isinstance(n, int) for n in numbers) and alike)


def tokenizer(folder, model, ids, expected):
    """Return the ids that the tokenizer gives."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("The patient received 12 mg.")["input_ids"]


def answer(case):
    """Return what is to be known about one case, or the error."""
    folder = case["folder"]
    try:
        kept = load_file(case["expected"])
        ids, expected = kept["input_ids"], kept["logits"]
        model = load(folder, **case.get("options", {}))
        found = {
            "class": type(model).__name__,
            "module": type(model).__module__,
            "logits": difference(logits(model, ids), expected),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        for name in case["checks"]:
            found[name] = globals()[name](folder, model, ids, expected)
        return found
    except Exception:
        return {"error": traceback.format_exc()[-2000:]}


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({"version": transformers.__version__, "cases": list(map(answer, cases))}))
