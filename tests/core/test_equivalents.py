"""Names of PEFT and torchtune are errors that say what to write here."""

import dataclasses
import inspect
import pickle
import re

import pytest

import lora_jax
from lora_jax._core import equivalents
from lora_jax.peft.formats import fields as peft_fields

FIELDS = [field.name for field in dataclasses.fields(lora_jax.LoraConfig)]
ROWS = [
    pytest.param(table, row, id=f"{package}-{row.names.split()[0]}")
    for table in (equivalents.FIELDS, equivalents.NAMES)
    for package, rows in table.items()
    for row in rows
]


def named(table):
    return [own for rows in table.values() for row in rows for own in row.names.split()]


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_what_a_row_says_to_write_exists(table, row):
    text, arguments = f"{row.here} {row.note}", {*FIELDS}
    for name in re.findall(r"lora_jax((?:\.\w+)+)", text):
        value = lora_jax
        for part in name.split(".")[1:]:
            value = getattr(value, part)
        if inspect.isfunction(value):
            arguments |= inspect.signature(value).parameters.keys()
    if table is equivalents.FIELDS and row.here:
        owner = lora_jax if "(" in row.here else lora_jax.LoraConfig()
        assert hasattr(owner, row.here.split("(")[0])
    for name in re.findall(r"`(\w+)=", text):
        assert name in arguments
    assert row.here or row.note
    assert not row.note.endswith(".")


@pytest.mark.parametrize("table", [equivalents.FIELDS, equivalents.NAMES])
def test_a_name_is_in_one_row(table):
    assert len(named(table)) == len({*named(table)})


def test_every_field_of_peft_is_there():
    theirs = {*peft_fields.CHECKS, *peft_fields.UNSUPPORTED, *peft_fields.IGNORED}
    assert {*theirs, "runtime_config"} <= {*named(equivalents.FIELDS)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": 8}, r"LoraConfig has no field `r`; PEFT's `r` is `rank` here\.$"),
        ({"bias": "all"}, r"`bias` is `train` here: `train=\"\*/bias\"` trains the biases"),
        ({"fan_in_fan_out": True}, "has no equal here: `plan_adapters` infers the layout"),
        ({"lora_rank": 8}, "torchtune's `lora_rank` is `rank` here"),
        ({"r": 8, "rnk": 8}, r"`r`, `rnk`; .*`rank` here; the nearest to `rnk` is `rank`"),
        ({"zzz": 1}, "no field `zzz`; its fields are rank, alpha, targets,"),
    ],
)
def test_fields(given, message):
    with pytest.raises(TypeError, match=message):
        lora_jax.LoraConfig(**given)
    with pytest.raises(TypeError, match=message):
        dataclasses.replace(lora_jax.LoraConfig(), **given)


@pytest.mark.parametrize("package", [lora_jax, lora_jax.peft])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "get_peft_model",
            r"; PEFT's `get_peft_model` is `lora_jax.adapt\(fn, plan\)` here",
        ),
        ("PeftModelForCausalLM", "PEFT's `PeftModelForCausalLM` is `lora_jax.peft.load"),
        ("TaskType", "PEFT's `TaskType` has no equal here: adapters do not depend on"),
        ("IA3Config", "no equal here: adapters are LoRA or DoRA"),
        ("LoRALinear", "torchtune's `LoRALinear` is `lora_jax.lora_linear"),
        ("nothing", "has no attribute 'nothing'$"),
    ],
)
def test_attributes(package, name, message):
    with pytest.raises(AttributeError, match=message) as error:
        getattr(package, name)
    assert (error.value.name, error.value.obj) == (name, package)
    assert not hasattr(package, name)
    assert name not in dir(package)
    with pytest.raises(ImportError, match=f"cannot import name '{name}'"):
        exec(f"from {package.__name__} import {name}")


def test_packages_and_configs_work_as_before():
    exec("from lora_jax import adapt, cli, optim; from lora_jax.peft import load, rules")
    assert pickle.loads(pickle.dumps(lora_jax.adapt)) is lora_jax.adapt
    config = lora_jax.LoraConfig(4, 8.0, "a", use_dora=True)
    assert pickle.loads(pickle.dumps(config)) == config
