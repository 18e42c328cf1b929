"""The devices and processes of a run."""
