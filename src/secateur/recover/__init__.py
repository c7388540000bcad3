"""Recovery: short training of a pruned model on its domain's text; no pruning and no evaluation of test text."""

from secateur.recover.checkpoints import forget
from secateur.recover.curve import Probe
from secateur.recover.examples import TrainingExamples
from secateur.recover.train import check_training, train

__all__ = ["Probe", "TrainingExamples", "check_training", "forget", "train"]
