"""From text, or ready-made tensors, to batches of normalised activations; `stream.build_stream` is the way in."""
