"""The command line: one file per command; heavy imports happen inside commands, so that ``--help`` answers at once."""
