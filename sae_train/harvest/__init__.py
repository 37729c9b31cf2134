"""From text or ready-made tensors to batches of normalised activations. `build.py` is the way in."""
