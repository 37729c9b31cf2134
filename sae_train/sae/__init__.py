"""The sparse autoencoder itself: parameters, codes, losses, counters and calibration. Torch only.

- `trainable.py` holds the parameters in training, `autoencoder.py` the exported autoencoder.
- `code.py` is the result of a selection. `losses.py`, `nesting.py` and `aux_loss.py` make a loss of it.
- `firing.py` counts firings, `calibration.py` sets the thresholds of an export.
- `zipf_budget.py` splits a budget over features by Zipf's law, `zipf_fit.py` fits that law to densities.
- `step_info.py`, `sizes.py` and `state.py` are the records that a learner hands to these parts, and `random.py` draws.
"""
