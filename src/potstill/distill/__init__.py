"""Loss terms and their schedules: what a student learns, from which source, how strongly."""

from potstill.distill.losses import LossTerm as LossTerm
from potstill.distill.losses import required_signals as required_signals
from potstill.distill.schedules import Schedule as Schedule
