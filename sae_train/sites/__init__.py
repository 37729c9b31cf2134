"""Places in a language model where activations are taken, and the hooks that read or replace them there."""
