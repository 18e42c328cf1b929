"""Models built from shared blocks, one file each."""
