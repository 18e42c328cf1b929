"""Examples between the disk and the device."""
