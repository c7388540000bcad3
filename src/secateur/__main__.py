"""``python -m secateur`` is the same as ``secateur``."""

from secateur.cli.main import main

main()
