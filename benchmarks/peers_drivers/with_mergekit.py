"""Removes a fixed block of layers with mergekit, which reads no text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml
from common import arguments


def main() -> None:
    """Write mergekit's configuration and run it."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--first", type=int, required=True, help="first layer to remove")
    parser.add_argument("--last", type=int, required=True, help="last layer to remove")
    options = parser.parse_args()
    num_layers = json.loads((Path(options.model) / "config.json").read_text())["num_hidden_layers"]
    ranges = [[0, options.first], [options.last + 1, num_layers]]
    slices = [{"sources": [{"model": options.model, "layer_range": kept}]} for kept in ranges]
    output = Path(options.output)
    file = output.with_name(f"{output.name}.yml")
    file.write_text(yaml.safe_dump({"slices": slices, "merge_method": "passthrough", "dtype": "float32"}))
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(file), str(output), "--quiet"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
