"""The newest releases of other libraries that the tests pass with; constraints-newest.txt holds the same.

Older ones, down to the lower bounds of the package's requirements, are tested as well. What is newer than these may
have renamed or moved what qtool uses.
"""

NEWEST = {
    "gguf": "0.19.0",
    "huggingface_hub": "2.4.0",
    "numba": "0.68.1",
    "numpy": "2.4.6",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "transformers": "5.24.0",
}
