"""Writing the pruned model out in a form that engines load, proven by loading it."""

from secateur.export.huggingface import export_huggingface

__all__ = ["export_huggingface"]
