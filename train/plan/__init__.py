"""Memory per device of a training run on a mesh, by arithmetic: python -m train.plan."""
