"""Loads a saved folder with plain transformers, where neither secateur nor the folder's own code can help.

Prints the number of parameters; fails where the folder does not load, weights are missing, or a forward pass fails.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Load the folder named on the command line and run one text through it."""
    folder = sys.argv[1]
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise SystemExit(f"it loads with {wrong}")
    text = AutoTokenizer.from_pretrained(folder)("Pruned models should load everywhere.", return_tensors="pt")
    with torch.inference_mode():
        logits = model.eval()(**text).logits
    if not bool(torch.isfinite(logits).all()):
        raise SystemExit("its logits are not finite")
    print(sum(parameter.numel() for parameter in model.parameters()))


if __name__ == "__main__":
    main()
