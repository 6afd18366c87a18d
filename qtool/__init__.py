"""qtool turns model checkpoints into quantized artifacts, and proves what that cost."""

__version__ = "0.1.0"
