"""Random calls and plans against the slow truth: `python -m tools.fuzz`, in short `make fuzz`."""
