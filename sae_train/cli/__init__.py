"""The command line: reading what is typed, help, and one file for each command."""
