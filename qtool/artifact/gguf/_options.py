"""What a recipe or a flag can say about a GGUF file."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from qtool.errors import suggestion
from qtool.problems import mistake, show
from qtool.recipe.size import Size
from qtool.recipe.strict import Strict

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11}
FILE_TYPES |= {"q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18}
FILE_TYPES |= {"iq2_xxs": 19, "iq2_xs": 20, "q2_k_s": 21, "iq3_xs": 22, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25}
FILE_TYPES |= {"iq3_s": 26, "iq3_m": 27, "iq2_s": 28, "iq2_m": 29, "iq4_xs": 30, "iq1_m": 31, "bf16": 32}
FILE_TYPES |= {"tq1_0": 36, "tq2_0": 37, "mxfp4_moe": 38, "nvfp4": 39}
"""What GGUF files call a mix of types -> its number, `llama_ftype` in llama.h of llama.cpp, October 2026."""


def _check_file_type(name: str) -> str:
    if name not in FILE_TYPES:
        raise mistake(f"no file type is called {show(name)}", hint=suggestion(name, list(FILE_TYPES)))
    return name


FileType = Annotated[str, AfterValidator(_check_file_type), WithJsonSchema({"enum": list(FILE_TYPES)})]


class GGUFOptions(Strict):
    """Options of a GGUF export.

    Attributes:
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text, where gguf does not recognize it.
        split_max_size: cuts a GGUF model into files with at most so much of tensors each, such as 2G, 500M or bytes.
        mmproj: folder or hub id of a model whose vision tower and projector are written beside it, for mtmd.
        file_type: the mix that a GGUF file says it is; by default a usual one with its most frequent type.
    """

    pre_tokenizer: Annotated[str, Field(min_length=1)] | None = None
    split_max_size: Size | None = None
    mmproj: Annotated[str, Field(min_length=1)] | None = None
    file_type: FileType | None = None
