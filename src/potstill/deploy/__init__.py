"""Students in engines other than ASE; none yet (ASE: `potstill.calculators`)."""
