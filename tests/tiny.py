"""Builders of tiny checkpoints under the names of their families, for scripts outside of the tests.

With this folder on `sys.path`, ``import tiny; tiny.qwen2_vl(folder)`` writes a random checkpoint.
The tests themselves use `helpers.tiny`, which has the same builders and more.
"""

from helpers.tiny_families import (
    build_gemma3 as gemma3,
)
from helpers.tiny_families import (
    build_idefics3 as idefics3,
)
from helpers.tiny_families import (
    build_internvl as internvl,
)
from helpers.tiny_families import (
    build_mistral3 as mistral3,
)
from helpers.tiny_families import (
    build_smolvlm as smolvlm,
)
from helpers.tiny_llava import (
    build_llava as llava,
)
from helpers.tiny_llava import (
    build_llava_next as llava_next,
)
from helpers.tiny_llava import (
    build_llava_onevision as llava_onevision,
)
from helpers.tiny_qwen import (
    QWEN_PATCH_CONFIG as PATCHES,
)
from helpers.tiny_qwen import (
    build_qwen2_5_vl as qwen2_5_vl,
)
from helpers.tiny_qwen import (
    build_qwen2_vl as qwen2_vl,
)
from helpers.tiny_qwen import (
    build_qwen3_vl as qwen3_vl,
)

__all__ = [
    "PATCHES",
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "smolvlm",
]
