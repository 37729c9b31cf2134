"""The sparse autoencoder itself: parameters, codes, losses, counters and calibration. Torch only."""
