"""TFDS builders for data that TFDS lacks. None needs TensorFlow."""
