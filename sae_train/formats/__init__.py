"""File formats of an exported SAE: a typed manifest, our own files (native.py), and a file for each foreign format."""
