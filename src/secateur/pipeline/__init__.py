"""The main job from recipe to report: ``job`` runs the stages; the other files are the parts that not every run has."""

from secateur.pipeline.job import STAGES, RunResult, Stage, require_buckets, run, versions

__all__ = ["STAGES", "RunResult", "Stage", "require_buckets", "run", "versions"]
