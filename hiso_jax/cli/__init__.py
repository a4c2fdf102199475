"""The command line: commands, progress, plots and reports."""
