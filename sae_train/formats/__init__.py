"""File formats of an exported SAE: ours (native.py); foreign ones get a file each."""
