"""Sweeps that SLURM runs: what to ask of it, how each point went, and submitting what is unfinished."""
