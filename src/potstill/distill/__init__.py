"""Loss terms, strategies and schedules: what a student learns, from which source, how strongly."""

from potstill.distill.losses import LossTerm as LossTerm
from potstill.distill.losses import required_signals as required_signals
from potstill.distill.schedules import Schedule as Schedule
from potstill.distill.strategies import expand as expand
from potstill.distill.terms import AuxiliaryTerm as AuxiliaryTerm
from potstill.distill.terms import FeatureTerm as FeatureTerm
