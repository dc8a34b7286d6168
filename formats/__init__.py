"""What is on disk: the .sct format (SPEC.md) and dense checkpoints, as numpy arrays."""
