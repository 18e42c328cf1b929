"""Training programs: `python -m train --config=configs/NAME.py --workdir=DIR`."""
