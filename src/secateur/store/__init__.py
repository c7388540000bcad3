"""The only room that reads and writes artefacts: checkpoints, statistics, scores, plans, run folders."""
