"""What XLA makes of a program, for a device that need not be there: read, and added up."""
