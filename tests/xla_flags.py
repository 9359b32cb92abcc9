"""What XLA is told before the first test: it reads its flags once."""

import importlib.metadata
from typing import Any

_EMITTERS = "--xla_cpu_use_fusion_emitters"
_PARTS = "--xla_cpu_parallel_codegen_split_count"

_HAS_FORMER = importlib.metadata.version("jaxlib").startswith("0.10.")

WITH_NEW_EMITTERS: Any = {_EMITTERS.strip("-"): True} if _HAS_FORMER else None
"""`compiler_options` for the products of `adapt_rows` with a copy of each row's factors.

XLA with its former emitters aborts on products with batch axes in some layouts.
"""


def for_tests(given: str) -> str:
    """Eight CPU devices, and what halves the time to compile; given flags come first.

    XLA of JAX 0.10 takes twice as long to compile a program with its new emitters of
    loops, and with the former ones it makes the same loops. Other versions are tested as
    they are, and `.ci/run` tries this one, too, as it is where that may count. Programs as
    small as those of tests take a sixth longer to compile in several parts.
    """
    flags = [*given.split(), "--xla_force_host_platform_device_count=8"]
    if _PARTS not in given:
        flags.append(f"{_PARTS}=1")
    if _HAS_FORMER and _EMITTERS not in given:
        flags.append(f"{_EMITTERS}=false")
    return " ".join(flags)
