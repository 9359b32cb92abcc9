"""The model of `bench_rows.py` in torch, with many adapters of peft.

    python _rows_torch.py CASE

reads the sizes as JSON, and prints the times of each contestant: one adapter of peft, and,
for each number of slots, `adapter_names`. peft has it for models in evaluation mode only.
"""

import functools
import json
import random
import sys
import time
from typing import Any

import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from _field_case import KERNELS, Case
from _field_torch import DEVICE, Transformer

WARM_UP = 2  # rounds


def make_model(case: dict[str, Any], slots: int) -> Any:
    """The model with an adapter in each slot, none of them zero."""
    sizes = {name: case[name] for name in ("layers", "width", "heads", "batch", "length")}
    sizes |= {"rank": case["rank"], "dtype": case["dtype"], "threads": 0, "file": ""}
    torch.manual_seed(0)
    model: Any = Transformer(Case(**sizes)).to(DEVICE, getattr(torch, case["dtype"]))
    config = peft.LoraConfig(
        r=case["rank"],
        lora_alpha=16,
        target_modules=list(KERNELS),
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config, "0")
    for slot in range(1, slots):
        adapted.add_adapter(str(slot), config)
    for name, value in adapted.named_parameters():
        value.requires_grad_("lora_" in name)
    return adapted.eval()


def step(model: Any, case: dict[str, Any], x: Any, target: Any, names: Any) -> None:
    """Runs a step of one phase; with `names` each row has the adapter of its name."""
    options = {} if names is None else {"adapter_names": names}
    if case["phase"] == "decoding":
        with torch.no_grad():
            model(x, **options)
    else:
        model.zero_grad()
        error = (model(x, **options) - target).float()
        (error * error).sum().backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Runs the benchmark of one case."""
    case = json.loads(sys.argv[1])
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    length = case["length"] if case["phase"] == "training" else 1
    shape = case["batch"], length, case["width"]
    dtype = getattr(torch, case["dtype"])
    x, target = (torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(2))

    def call(slots: int, names: list[str] | None) -> Any:
        return functools.partial(step, make_model(case, slots), case, x, target, names)

    calls = {"peft, one adapter": call(1, None)}
    for slots in case["slots"]:
        names = [str(row % slots) for row in range(case["batch"])]
        calls[f"peft, adapter_names, {slots}"] = call(slots, names)
    times = {name: {"wall": [], "cpu": []} for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for i in range(WARM_UP + case["rounds"]):
        shuffle(order)
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if i >= WARM_UP:
                times[name]["wall"].append(wall)
                times[name]["cpu"].append(cpu)
    versions = {"torch": torch.__version__, "peft": peft.__version__}
    print(json.dumps({"times": times, **versions}))


if __name__ == "__main__":
    main()
