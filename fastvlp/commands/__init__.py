"""What the command line runs: in each module, ``command(options)`` prints what was asked for and returns the exit code."""
