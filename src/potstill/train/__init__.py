"""Training: settings, batches, and the one loop."""

from potstill.train.data import TrainingSet as TrainingSet
from potstill.train.linear import LinearFit as LinearFit
from potstill.train.linear import fit_linear as fit_linear
from potstill.train.loop import TrainResult as TrainResult
from potstill.train.loop import train as train
from potstill.train.settings import TrainSettings as TrainSettings
