"""The main job from recipe to report: ``job`` runs the stages, each of which is known to the files above its own.

    inputs -> calibration -> cutting -> planning -> training -> measuring -> job

The other files are the parts that not every run has, and what is made of many runs.
"""

from secateur.pipeline.job import run
from secateur.pipeline.result import STAGES, RunResult, Stage, require_buckets, versions

__all__ = ["STAGES", "RunResult", "Stage", "require_buckets", "run", "versions"]
