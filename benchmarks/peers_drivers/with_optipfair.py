"""Prunes with OptiPFair: FFN channels by weights alone or with calibration text, or the least important layers."""

from __future__ import annotations

from common import BATCH_SIZE, arguments, load, save, token_blocks
from optipfair import analyze_layer_importance, prune_model
from torch import ones_like
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    """Prune as asked and save."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--width", type=float, help="percentage of FFN channels to remove")
    parser.add_argument("--hybrid", action="store_true", help="choose the channels with the calibration text")
    parser.add_argument("--layers", type=int, help="how many layers to remove")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    text = None
    if options.hybrid or options.layers:
        blocks = token_blocks(tokenizer, options.texts, options.tokens)
        text = DataLoader(TensorDataset(blocks, ones_like(blocks)), batch_size=BATCH_SIZE)
    if options.layers:
        importance = analyze_layer_importance(model, text, show_progress=False)
        least = sorted(sorted(importance, key=importance.__getitem__)[: options.layers])
        model = prune_model(model, pruning_type="DEPTH", layer_indices=least, show_progress=False)
    else:
        model = prune_model(model, pruning_percentage=options.width, dataloader=text, show_progress=False)
    save(model, tokenizer, options.output)


if __name__ == "__main__":
    main()
