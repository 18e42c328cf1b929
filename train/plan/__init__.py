"""What a training run needs of each device, as its program is compiled: python -m train.plan."""
