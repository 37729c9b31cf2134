"""The command line: one file for each command, and what the commands share.

`train.py` is `sae-train`. `export.py` is `sae-export`, with its arguments in export_help.py and the search for SAEs in
export_sources.py. A further command is a file with a function from arguments to an exit status, a `main` that passes it
to `process.run_and_exit`, and a line under `[project.scripts]` in pyproject.toml.

process.py has exit statuses and error messages. compose.py turns arguments into configurations by way of library.py
(Hydra), overrides.py and never_read.py (checks of what was typed), point.py (one run while it is checked), and
entries.py and suite.py (the SAEs of a run). parsing.py is Hydra's grammar.

from_python.py is `sae_train.train`: one run in a process of the user's, such as a notebook. typed_settings.py turns its
dictionaries into arguments of the command line.
"""
