"""Write the golden numbers anew: ``python tests/golden/make.py``. Say in the commit why they changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Compute and write the golden file."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.golden.compute import FILE, compute

    FILE.write_text(json.dumps(compute(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
