"""Coarse graining: all-atom trajectories mapped to beads, with forces that fit the mapping."""

from potstill.coarse.forcemap import optimal_force_map as optimal_force_map
from potstill.coarse.ibi import Inversion as Inversion
from potstill.coarse.ibi import Iteration as Iteration
from potstill.coarse.ibi import Measured as Measured
from potstill.coarse.ibi import invert as invert
from potstill.coarse.mapping import MappingReport as MappingReport
from potstill.coarse.mapping import map_trajectory as map_trajectory
from potstill.coarse.settings import MappingSettings as MappingSettings
from potstill.coarse.settings import Residue as Residue
from potstill.coarse.settings import Selection as Selection
from potstill.coarse.trajectory import TrajectoryFile as TrajectoryFile
from potstill.coarse.trajectory import open_trajectory as open_trajectory
