"""Sweeps on SLURM: their directory, the outcome of each point, and the submission of unfinished points."""
