"""Loss terms, strategies and schedules: what a student learns, from which source, how strongly."""

from potstill.distill.auxiliary import AuxiliaryTerm as AuxiliaryTerm
from potstill.distill.feature_terms import FeatureTerm as FeatureTerm
from potstill.distill.losses import LossTerm as LossTerm
from potstill.distill.schedules import Schedule as Schedule
from potstill.distill.strategies import expand as expand
from potstill.distill.terms import required_signals as required_signals
