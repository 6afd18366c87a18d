"""The models that benchmarks run on, made on the spot: SmolLM2-135M off any grid, and a large random one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qtool.numerics.grids.phases import cells, rounded
from scripts.demo_model import checkpoint

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
"""Sizes of the large model."""

SPREAD = 0.25
"""Standard deviation of the logarithm of every factor that moves weights off the demo model's 4-bit grid."""

TERNARY = (-1.0, 0.0, 1.0)
"""Levels of BitNet b1.58."""
TWO_BITS = (-1.5, -0.5, 0.5, 1.5)
"""Those of ParetoQ."""

EXPERTS, VISITED = 4, 2
"""Copies of each MLP in a mixture, and how many of them a token visits."""

CHANNELS = 6
"""Channels of an input that are made outliers, where there are to be some."""


def off_grid(source: Path, out: Path, seed: int = 7, outliers: float = 1.0) -> Path:
    """An equivalent of a Llama checkpoint of one shard whose weights lie on no quantization grid.

    Three exact rewrites per block with log-normal factors: a norm's gain into the columns of the linear layers that
    read it, v's rows into o's columns, up's rows into down's columns. Without them a model that comes out of a 4-bit
    file would look lossless to any quantizer with the same grid.

    With `outliers` some channels behind each norm, and in front of each down projection, are that much larger, and the
    columns that read them that much smaller: what activations of models of many billion parameters look like.
    """
    if (out / "model.safetensors").exists():
        return out
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    w = {name: tensor.double() for name, tensor in load_file(source / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)

    def factors(n: int, larger: float = outliers) -> torch.Tensor:
        drawn = torch.exp(SPREAD * torch.randn(n, generator=generator, dtype=torch.float64))
        if larger != 1:
            drawn[torch.randperm(n, generator=generator)[:CHANNELS]] /= larger
        return drawn

    queries = config["num_attention_heads"] // config["num_key_value_heads"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for i in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for norm, readers in (
            ("input_layernorm", [attention + p for p in ("q_proj", "k_proj", "v_proj")]),
            ("post_attention_layernorm", [mlp + p for p in ("gate_proj", "up_proj")]),
        ):
            s = factors(config["hidden_size"])
            w[f"model.layers.{i}.{norm}.weight"] /= s
            for reader in readers:
                w[f"{reader}.weight"] *= s
        s = factors(config["num_key_value_heads"] * head, larger=1)
        w[f"{attention}v_proj.weight"] *= s[:, None]
        w[f"{attention}o_proj.weight"] /= s.view(-1, head).repeat_interleave(queries, dim=0).flatten()
        s = 1.0 / factors(config["intermediate_size"])
        w[f"{mlp}up_proj.weight"] *= s[:, None]
        w[f"{mlp}down_proj.weight"] /= s
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_file({name: t.bfloat16() for name, t in w.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def variant(work: Path, name: str) -> Path:
    """The demo model off any grid, or one made of it.

    "off-grid"; "outliers": six channels of an input are 30 times as large; "ternary" and "two-bit": widened so that
    rows are whole blocks of 256, and linear layers put on a grid with a scale per row, as if trained on it;
    "ternary-groups": with one for 128 columns; "phases": sums of two of 1, i, -1, -i. "experts": a mixture of experts
    made of "outliers".
    """
    demo = checkpoint(work / "demo")
    if name == "experts":
        return mixture(off_grid(demo, work / "outliers", outliers=30.0), work / name)
    if name in ("off-grid", "outliers"):
        return off_grid(demo, work / name, outliers=30.0 if name == "outliers" else 1.0)
    wide = widened(off_grid(demo, work / "off-grid"), work / "wide")
    if name == "phases":
        return of_units(wide, work / name)
    if name == "ternary-groups":
        return trained(wide, work / name, TERNARY, group=128)
    return trained(wide, work / name, TERNARY if name == "ternary" else TWO_BITS)


def mixture(source: Path, out: Path, seed: int = 7) -> Path:
    """A Mixtral that computes the same as a Llama checkpoint of one shard.

    Experts are copies of the MLP, and a token's weights of those that it visits sum to 1. Routers are random, and every
    copy has factors of its own between up and down, so that experts differ in tokens and in weights.
    """
    if (out / "model.safetensors").exists():
        return out
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    w, generator = load_file(source / "model.safetensors"), torch.Generator().manual_seed(seed)
    for i in range(config["num_hidden_layers"]):
        mlp, block = f"model.layers.{i}.mlp.", f"model.layers.{i}.block_sparse_moe."
        gate, up, down = (w.pop(f"{mlp}{name}_proj.weight") for name in ("gate", "up", "down"))
        router = torch.randn(EXPERTS, config["hidden_size"], generator=generator) / config["hidden_size"] ** 0.5
        w[f"{block}gate.weight"] = (router / w[f"model.layers.{i}.post_attention_layernorm.weight"]).bfloat16()
        for expert in range(EXPERTS):
            s = torch.exp(SPREAD * torch.randn(len(up), generator=generator))
            copies = {"w1": gate, "w3": up * s[:, None], "w2": down / s}
            w |= {f"{block}experts.{expert}.{name}.weight": t.bfloat16() for name, t in copies.items()}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": VISITED, "sliding_window": None}
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file({name: t.clone() for name, t in w.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def trained(source: Path, out: Path, levels: tuple[float, ...], group: int | None = None) -> Path:
    """A checkpoint of one shard whose linear layers are levels times root mean squares of rows or groups."""
    if (out / "model.safetensors").exists():
        return out
    w = load_file(source / "model.safetensors")
    table = torch.tensor(levels)
    for name, tensor in w.items():
        if "_proj" in name:
            parts = tensor.float().unflatten(1, (-1, group or tensor.shape[1]))
            scale = parts.square().mean(2, keepdim=True).sqrt().bfloat16().float()
            nearest = ((parts / scale)[..., None] - table).abs().argmin(-1)
            w[name] = (table[nearest] * scale).flatten(1).to(tensor.dtype)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_file(w, out / "model.safetensors", metadata={"format": "pt"})
    return out


def of_units(source: Path, out: Path) -> Path:
    """A checkpoint of one shard whose linear layers are sums of two units 1, i, -1, -i, as Fairy2i rounds them."""
    if (out / "model.safetensors").exists():
        return out
    w = load_file(source / "model.safetensors")
    for name, tensor in w.items():
        if "_proj" in name:
            codes, table = rounded(tensor.float(), 2)
            w[name] = table.flatten()[cells(codes, 2)].to(tensor.dtype)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_file(w, out / "model.safetensors", metadata={"format": "pt"})
    return out


def widened(source: Path, out: Path, heads: int = 12) -> Path:
    """An equivalent of a Llama checkpoint of one shard with more query heads and wider hidden states.

    The new channels are zero, spread evenly; 12 heads of 64 make rows of whole blocks of 256. Gains and epsilon make up
    for the longer mean of RMSNorm.
    """
    if (out / "model.safetensors").exists():
        return out
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    head = config["head_dim"]
    old, new = config["hidden_size"], heads * head
    channels = spread(old, new, max(1, new // 256))
    rows = spread(config["num_attention_heads"] * head, new, config["num_key_value_heads"])
    w = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        wide = tensor.double()
        if name.endswith(("o_proj.weight", "q_proj.weight")):
            wide = put(wide, rows, new, dim=1 if "o_proj" in name else 0)
        if wide.dim() == 1:
            wide = put(wide * (old / new) ** 0.5, channels, new, dim=0, fill=1.0)
        else:
            wide = put(wide, channels, new, dim=0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
        w[name] = wide.bfloat16()
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    epsilon = config["rms_norm_eps"] * old / new
    config |= {"hidden_size": new, "num_attention_heads": heads, "rms_norm_eps": epsilon}
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(w, out / "model.safetensors", metadata={"format": "pt"})
    return out


def spread(old: int, new: int, parts: int) -> torch.Tensor:
    """Places of `old` things among `new`, at the beginning of each of some equal parts; int64 [old]."""
    return (torch.arange(parts)[:, None] * (new // parts) + torch.arange(old // parts)).flatten()


def put(tensor: torch.Tensor, places: torch.Tensor, size: int, dim: int, fill: float = 0.0) -> torch.Tensor:
    """A tensor with `size` entries along a dimension, the old ones in given places."""
    shape = list(tensor.shape)
    shape[dim] = size
    return torch.full(shape, fill, dtype=tensor.dtype).index_copy(dim, places, tensor)


def large(tokenizer: Path, out: Path, blocks: int = 16) -> Path:
    """A random Llama of 1.07 billion parameters, one shard a block.

    Args:
        tokenizer: a checkpoint folder whose side files are taken.
        out: where to write.
        blocks: decoder blocks; 16 make 2.1 GB.
    """
    manifest = out / "model.safetensors.index.json"
    if manifest.exists():
        return out
    shutil.copytree(tokenizer, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = json.loads((out / "config.json").read_text(encoding="utf-8")) | LARGE | {"num_hidden_layers": blocks}
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    generator, index = torch.Generator().manual_seed(0), {}
    outer = {"model.embed_tokens": (config["vocab_size"], LARGE["hidden_size"]), "model.norm": (LARGE["hidden_size"],)}
    for shard, shapes in enumerate([*(block_shapes(f"model.layers.{i}.") for i in range(blocks)), outer], start=1):
        file = f"model-{shard:05d}-of-{blocks + 1:05d}.safetensors"
        drawn = {f"{n}.weight": torch.randn(s, generator=generator).mul_(0.02).bfloat16() for n, s in shapes.items()}
        save_file(drawn, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(drawn, file)
    nbytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    manifest.write_text(json.dumps({"metadata": {"total_size": nbytes}, "weight_map": index}), encoding="utf-8")
    return out


def block_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of one decoder block of the large model, by module."""
    hidden, inner, head = LARGE["hidden_size"], LARGE["intermediate_size"], LARGE["head_dim"]
    rows = {"q": LARGE["num_attention_heads"] * head, "k": LARGE["num_key_value_heads"] * head}
    shapes = {f"self_attn.{role}_proj": (rows[like], hidden) for role, like in (("q", "q"), ("k", "k"), ("v", "k"))}
    shapes |= {f"mlp.{role}_proj": (inner, hidden) for role in ("gate", "up")}
    shapes |= {"self_attn.o_proj": (hidden, rows["q"]), "mlp.down_proj": (hidden, inner)}
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    return {f"{prefix}{name}": shape for name, shape in (shapes | norms).items()}


def write_tokens(model: Path, data: str, out: Path, samples: int, length: int) -> Path:
    """The very tokens that qtool calibrates with, for the other program."""
    from qtool.calibrate.tokens import load_tokens
    from qtool.checkpoint.open import open_checkpoint
    from qtool.recipe.schema import Calibration

    wanted = Calibration(data=data, samples=samples, length=length)
    tokens = load_tokens(wanted, open_checkpoint(str(model)))
    save_file({"tokens": tokens.to(torch.int64).contiguous()}, out)
    return out
