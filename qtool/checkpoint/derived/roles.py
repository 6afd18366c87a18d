"""What usual names of linear layers say: what a layer does, and which layers runtimes merge into one."""

from __future__ import annotations

from collections.abc import Collection, Iterator

ROLES = {
    "q": ("q_proj", "query", "q_lin", "wq", "to_q", "q_b_proj"),
    "k": ("k_proj", "key", "k_lin", "wk", "to_k"),
    "v": ("v_proj", "value", "v_lin", "wv", "to_v"),
    "o": ("o_proj", "out_proj", "wo", "out_lin", "to_out"),
    "qkv": ("qkv_proj", "query_key_value", "Wqkv", "qkv", "c_attn", "in_proj_qkv"),
    "gate": ("gate_proj", "w1", "gate"),
    "up": ("up_proj", "w3", "fc1", "c_fc", "dense_h_to_4h", "lin1", "fc_in"),
    "down": ("down_proj", "w2", "fc2", "dense_4h_to_h", "lin2", "fc_out"),
    "gate_up": ("gate_up_proj", "input_linear"),
}
"""Role -> last parts of names of modules that have it."""

ROUTERS = ("gate", "router", "shared_expert_gate", "classifier", "wg", "routing", "router_gate")
"""Last parts of names of layers that decide where tokens go."""

MERGED = {
    "qkv": (("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv"), ("query", "key", "value")),
    "gate_up": (("gate_proj", "up_proj"), ("w1", "w3")),
    "qkv_a": (("q_a_proj", "kv_a_proj_with_mqa"),),
    "in_qkvz": (("in_proj_qkv", "in_proj_z"),),
    "in_ba": (("in_proj_b", "in_proj_a"),),
}
"""Set -> last parts of names of layers that runtimes merge into one, if they read the same input."""


def role_of(path: str) -> str:
    """What the layer of that name does: a word that other families have for it, or else the last part of its name."""
    last = path.rpartition(".")[2]
    return next((role for role, names in ROLES.items() if last in names), last)


def is_router(path: str, rows: int, experts: int) -> bool:
    """Whether a layer of so many rows chooses experts, or how much of one is used."""
    return path.rpartition(".")[2] in ROUTERS and rows in {1, experts}


def merged(paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """(path, name of its set) of layers that runtimes merge.

    Args:
        paths: of layers that read the same input.
    """
    for path in paths:
        owner, _, last = path.rpartition(".")
        before = f"{owner}." if owner else ""
        for name, sets in MERGED.items():
            for members in sets:
                if last in members and sum(before + member in paths for member in members) > 1:
                    yield path, before + name
