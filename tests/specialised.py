"""Warp-specialised kernels, which no interpreter runs: compiled in another process, executed by `simulator`."""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Mapping

from compiling import run

from resnet_triton.codegen.compiler import specialise
from resnet_triton.kernels.launch import Launch

_COMPILE = """
import base64, json, pickle, sys
from resnet_triton.codegen.compiler import triton_compile

sources = pickle.loads(base64.b64decode(sys.argv[1]))
print(json.dumps([triton_compile(source, 90).asm["ptx"] for source in sources]))
"""


def ptx(launches: Mapping[str, Launch]) -> dict[str, str]:
    """What each launch compiles to for sm_90; equal kernels are compiled once."""
    named = {name: specialise(launch) for name, launch in launches.items()}
    sources = list(dict.fromkeys(named.values()))
    texts = json.loads(run(_COMPILE, base64.b64encode(pickle.dumps(sources)).decode()))
    compiled = dict(zip(sources, texts, strict=True))
    return {name: compiled[source] for name, source in named.items()}
