"""Figures of an exported SAE on held-out activations; every metric has its one definition here."""
