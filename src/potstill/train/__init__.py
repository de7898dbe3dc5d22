"""Training: settings, batches, and the one loop."""

from potstill.train.data import TrainingSet as TrainingSet
from potstill.train.loop import TrainResult as TrainResult
from potstill.train.loop import train as train
from potstill.train.settings import TrainSettings as TrainSettings
