"""Loads one model in a process of its own, does one run, and says how much memory that took at most.

Usage: python -m secateur.evaluate.peak_memory_child, with a JSON object on stdin; one comes back on stdout.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from secateur.evaluate.speed import lay_prompts, random_ids, run_once
from secateur.records.speed import Setting
from secateur.store.checkpoints import load_model, resolve_model

NO_RESOURCE = "this system does not tell how much memory a process held"


def main() -> None:
    """Answer one request."""
    request: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    trusted: bool = request["trust_remote_code"]
    checkpoint = resolve_model(request["folder"], trust_remote_code=trusted)
    _import_model_code(checkpoint.folder, trusted)
    before = _most_held()
    if before is None:
        print(json.dumps({"peak_bytes": None, "problem": NO_RESOURCE}))
        return
    model = load_model(checkpoint, device="cpu", dtype=request["dtype"], trust_remote_code=trusted)
    setting = Setting(request["prompt_length"], request["batch_size"], request["new_tokens"])
    ids = random_ids(checkpoint.geometry.dimensions["vocab_size"], setting.batch_size * setting.prompt_length)
    run_once(model, lay_prompts(ids, setting), setting.new_tokens)
    print(json.dumps({"peak_bytes": (_most_held() or before) - before, "problem": ""}))


def _import_model_code(folder: Path, trust_remote_code: bool) -> None:
    """Import all that loading the model imports, by building it without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _most_held() -> int | None:
    """Return the most resident memory that this process ever held, in bytes; None where the system does not tell.

    Linux tells it in /proc: what ``getrusage`` says there may be the most that the process which started this one held.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
