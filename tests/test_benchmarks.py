"""The benchmarks run and count rightly; nothing here depends on how fast anything is."""

import contextlib
import importlib
import io
import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax
from tests import support, test_smollm

pytestmark = pytest.mark.slow  # for developers of the library

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
SIZES = [
    *("--tokens=48", "--batch=3", "--in=64", "--out=96", "--rank=8"),
    "--rounds=2",
]
TRANSFORMER_SIZES = [
    *("--layers=2", "--batch=3", "--length=5", "--width=16", "--heads=2", "--rank=4"),
    *("--rounds=2", "--traces=1"),
]

QUANT_SIZES = [
    *("--size=128", "--layers=2", "--batch=3", "--length=5", "--width=128", "--heads=2"),
    *("--rank=4", "--rounds=2"),
]


def script_fixture(name):
    @pytest.fixture(scope="module", name=name)
    def imported():
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(BENCHMARKS)
            yield importlib.import_module(name)

    return imported


linear, transform, quant, gpu_fixture, scaling = map(
    script_fixture,
    ("bench_linear", "bench_transform", "bench_quant", "gpu", "bench_scaling"),
)


def run_script(script, arguments, folder, *, optimized=False):
    """One run of a script: what it printed and wrote, and what the contestants gave.

    Its programs need the optimizations of the compiler where a test reads them.
    """
    printed, outputs = io.StringIO(), []
    interleave = script._timing.interleave

    def recorded(calls, rounds, **options):
        outputs.append({name: call() for name, call in calls.items()})
        return interleave(calls, rounds, **options)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(script._timing, "interleave", recorded)
        with support.optimizations(optimized):
            script.main([*arguments, f"--json={folder / 'result.json'}"])
    result = json.loads((folder / "result.json").read_text())
    return types.SimpleNamespace(text=printed.getvalue(), result=result, outputs=outputs)


@pytest.fixture(scope="module")
def run(bench_linear, tmp_path_factory):
    run = run_script(
        *(bench_linear, SIZES, tmp_path_factory.mktemp("bench_linear")), optimized=True
    )
    (run.outputs,) = run.outputs
    return run


@pytest.fixture(
    scope="module", params=["lora", pytest.param("dora", marks=pytest.mark.slow)]
)
def transform_run(request, bench_transform, tmp_path_factory):
    """The loop only: that of the scan takes as long again."""
    arguments = [*TRANSFORMER_SIZES, "--layers=1", "--layout=loop"]
    arguments.append(f"--method={request.param}")
    folder = tmp_path_factory.mktemp(f"bench_transform_{request.param}")
    return run_script(bench_transform, arguments, folder)


def test_bench_linear_prints_every_contestant(bench_linear, run):
    rows = run.result["rows"]
    assert run.result["x"] == [3, 16, 64]
    assert list(rows) == list(bench_linear.CONTESTANTS)
    assert all(f"\n{name} " in run.text for name in rows)
    assert all(f" {column}" in run.text for column in bench_linear.COLUMNS)
    for row in rows.values():
        assert set(row) == set(bench_linear.COLUMNS)
        assert all(math.isfinite(value) and value >= 0 for value in row.values())
        assert all(row[column] > 0 for column in ("wall", "cpu", "best"))
    assert rows["frozen"]["wall"] == rows["frozen"]["cpu"] == rows["frozen"]["best"] == 1
    markdown = bench_linear.format_result(run.result, markdown=True)
    assert markdown.count("\n|") == len(rows) + 2


def test_bench_linear_simplifies_nothing_away(run):
    # Every adapted layer needs the six products of the bound or more.
    for name, row in run.result["rows"].items():
        assert row["flops"] >= (1 if name == "frozen" else run.result["flop_bound"]), name


def test_bench_linear_contestants_agree(bench_linear, run):
    first = {}
    for name, (y, (dx, gradient)) in run.outputs.items():
        trains = bench_linear.CONTESTANTS[name].trains
        assert set(gradient) == set(trains)
        if "dropout" in name:
            continue
        # Of A, B and m, DoRA's gradients differ with the one through the norm.
        want_y, want_dx = first.setdefault(trains, (y, dx))
        for got, want in ((y, want_y), (dx, want_dx)):
            tolerance = 64 * jnp.finfo(got.dtype).eps * jnp.abs(want).max()
            assert jnp.abs(got - want).max() <= tolerance, name


def test_bench_linear_forward_of_quantized_weights(bench_linear, tmp_path):
    programs = tmp_path / "hlo.txt"
    only = ["frozen", "lora_linear", "frozen, int8", "adapt LoRA, int8", "adapt DoRA, int8"]
    arguments = [*SIZES, "--forward", "--format=int8", f"--hlo={programs}", "--only", *only]
    run = run_script(bench_linear, arguments, tmp_path, optimized=True)
    (outputs,), text = run.outputs, programs.read_text()
    assert list(outputs) == list(run.result["sums"]) == list(run.result["rows"]) == only
    assert all(f"// {name}\n" in text and f"- {name}: " in run.text for name in only)
    assert run.result["flop_bound"] == bench_linear.flop_bound(64, 96, 8, forward=True)
    for name in ("adapt LoRA, int8", "frozen, int8"):
        want = outputs["frozen" if "frozen" in name else "lora_linear"]
        assert 0 < jnp.abs(outputs[name] - want).max() < 0.05 * jnp.abs(want).max()
    # 48 x 64 entries: `(x @ A) @ B` is not added to them in a kernel that multiplies
    assert run.result["sums"]["frozen"]["products"] == 1
    assert run.result["sums"]["lora_linear"]["products"] == 2
    assert run.result["sums"]["lora_linear"]["passes"] == 1


def test_bench_linear_says_what_it_left_out(bench_linear, tmp_path):
    run = run_script(bench_linear, [*SIZES, "--seconds=0"], tmp_path)
    first, *others = bench_linear.CONTESTANTS
    assert list(run.result["rows"]) == [first]
    assert f"No time was left for: {'; '.join(others)}." in run.text


HEAD = "\nENTRY %main (x: bf16[8,16]) -> bf16[8,16] {\n"
DOT = "  %d = f32[8,16]{1,0} dot(%p, %q), lhs_contracting_dims={1}\n"
ADD = "  ROOT %s = f32[8,16]{1,0} add(%d, %c)\n"
FUSION = "  ROOT %y = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%fused\n}\n"


def gemm(target, beta):
    return (
        f"{HEAD}  %y = (bf16[8,16]{{1,0}}, s8[64]{{0}}) custom-call(%x, %b, %base), "
        f'custom_call_target="__cublas${target}", '
        f'backend_config={{"gemm_backend_config":{{"alpha_real":1,"beta":{beta}}}}}\n'
    )


def fusion(body, before=""):
    return f"%fused (p: bf16[8,4]) -> bf16[8,16] {{\n{body}}}\n{HEAD}{before}{FUSION}"


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (gemm("gemm", 1), (1, 1, 0)),
        (gemm("gemm", 0), (1, 0, 0)),
        (gemm("lt$matmul", "1.0"), (1, 1, 0)),
        (gemm("lt$matmul", "0") + ADD, (1, 0, 1)),
        (fusion(DOT + ADD), (1, 1, 0)),
        (fusion(DOT), (1, 0, 0)),
        (fusion(ADD, before=DOT), (1, 0, 1)),
        (fusion(DOT + ADD).replace("[8,16]", "[8,2]"), (0, 0, 0)),
    ],
)
def test_sums_of_programs(bench_linear, text, counts):
    got = bench_linear._programs.count_sums(text, 8 * 16)
    assert tuple(got.values()) == counts


def test_gpu_report_at_toy_size(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    with pytest.raises(SystemExit) as end:
        gpu.main(["--toy", f"--out={tmp_path}"])
    report = json.loads((tmp_path / "report.json").read_text())
    text = (tmp_path / "report.md").read_text()
    assert {one["status"] for one in report["sections"].values()} == {"done"}, text
    assert not end.value.code
    assert text in capsys.readouterr().out
    for name, one in report["sections"].items():
        tables = one["result"].get("tables", [one["result"]])
        assert f"## {name}\n" in text
        assert all("frozen" in t["rows"] for t in tables if t.get("of") != "forming")
        assert one["text"].strip() in text
    assert (tmp_path / "hlo.txt").read_text().count("HloModule") == 3


def test_gpu_report_of_sections_that_do_not_end_well(gpu, tmp_path, monkeypatch):
    section = gpu.Section
    sections = {
        "slow": section("bench_linear", 0.5, ()),
        "wrong": section("bench_linear", 60, ("--batch=3", "--tokens=4")),
    }
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    for seconds, status, failed in (
        (60, "ran out of its 0 s", "failed (2)"),
        (0, *["did not start"] * 2),
    ):
        with pytest.raises(SystemExit, match="True"):
            gpu.main([f"--seconds={seconds}", f"--out={tmp_path}"])
        report = json.loads((tmp_path / "report.json").read_text())["sections"]
        text = (tmp_path / "report.md").read_text()
        assert [one["status"] for one in report.values()] == [status, failed]
        assert f"Section: {status}" in text
        assert ("--batch 3 does not divide" in text) == (seconds > 0)


def test_gpu_sections_fit_their_scripts_and_the_limit(gpu, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    for section in gpu.SECTIONS.values():
        script = importlib.import_module(section.script)
        options = script.parse([*section.arguments, "--markdown"])
        assert "bfloat16" in (options.dtype, section.arguments)
    assert gpu.LIMIT_S < 8 * 60


def test_bench_linear_keeps_16_bits(bench_linear):
    options = bench_linear.parse([*SIZES, "--dtype=bfloat16"])
    x, weight, dora, extras, cotangent = bench_linear.make_arguments(options)
    for name, contestant in bench_linear.CONTESTANTS.items():
        step = bench_linear.make_step(contestant.layer)
        adapter = {factor: dora[factor] for factor in contestant.trains}
        y, (dx, gradient) = jax.eval_shape(step, x, weight, adapter, extras, cotangent)
        assert y.dtype == dx.dtype == jnp.bfloat16, name
        assert all(array.dtype == jnp.float32 for array in gradient.values()), name


def test_flop_bound_counts_six_products_over_two(bench_linear):
    tokens, n_in, n_out, rank = 7, 5, 3, 2
    base = 2 * (2 * tokens * n_in * n_out)
    low_rank = 3 * (2 * tokens * n_in * rank) + 3 * (2 * tokens * rank * n_out)
    bound = bench_linear.flop_bound(n_in, n_out, rank)
    assert bound == pytest.approx((base + low_rank) / base)
    assert bench_linear.flop_bound(1024, 1024, 16) == 1 + 3 * 16 / 1024


def test_kept_bytes_counts_each_array_once(bench_linear):
    x, weight = jnp.ones((4, 5)), jnp.ones((5, 3), "bfloat16")

    def product(x, weight):  # keeps nothing but its arguments
        return x @ weight.astype(x.dtype)

    def kept(function, trained=x, constant=weight):
        return bench_linear.kept_bytes(function, trained, constant)

    assert kept(lambda x, _: 2 * x) == 0
    assert kept(lambda x, _: x * x) == 0
    assert kept(lambda x, w: x * w, x, x) == 0
    assert kept(product) == 5 * 3 * 4  # the weight in float32
    assert kept(product, x, weight.astype(x.dtype)) == 0
    assert kept(lambda x, _: jnp.exp(x)) == 4 * 5 * 4  # its result
    assert kept(lambda x, _: (jnp.exp(x),) * 2) == 4 * 5 * 4
    assert kept(lambda x, _: jnp.exp(x.astype("bfloat16"))) == 4 * 5 * 2
    assert kept(lambda x, _: jax.checkpoint(jnp.exp)(x)) == 0


def test_bench_transform_prints_every_contestant(bench_transform, transform_run):
    step, tracing = transform_run.result["tables"]
    columns = bench_transform.COLUMNS, bench_transform.TRACING_COLUMNS
    baselines = bench_transform.BY_HAND, bench_transform.FROZEN
    assert (step["of"], tracing["of"]) == ("step", "tracing")
    for table, names, baseline in zip((step, tracing), columns, baselines, strict=True):
        assert list(table["rows"]) == list(bench_transform.CONTESTANTS)
        assert set(table["rows"][baseline].values()) == {1}
        for name, row in table["rows"].items():
            assert f"\n{name} " in transform_run.text
            assert set(row) == set(names)
            assert all(math.isfinite(value) and value > 0 for value in row.values())
        assert all(f" {column}" in transform_run.text for column in names)
    for words in ("1 layers of width 16", "[3, 5, 16]", "rank 4", "float32", "jax"):
        assert words in transform_run.text
    markdown = bench_transform.format_result(transform_run.result, markdown=True)
    assert markdown.count("\n|") == 2 * (len(bench_transform.CONTESTANTS) + 2)


def test_bench_transform_contestants_agree(bench_transform, transform_run):
    outputs = transform_run.outputs[0]
    loss, gradients = outputs[bench_transform.BY_HAND]
    for name in (bench_transform.ADAPT, bench_transform.MERGED):
        own_loss, own_gradients = outputs[name]
        assert own_loss == pytest.approx(float(loss), rel=1e-5)
        for path, gradient in gradients.items():
            for factor, want in gradient.items():
                if name == bench_transform.MERGED and "m" in gradient and factor != "m":
                    continue  # it has the gradient through the norm as well
                error = jnp.abs(own_gradients[path][factor] - want).max()
                assert error <= 512 * jnp.finfo(want.dtype).eps * jnp.abs(want).max()
    frozen_loss, gradient = outputs[bench_transform.FROZEN]
    assert gradient.shape == (3, 5, 16)
    assert abs(frozen_loss - loss) > 1e-6  # the adapters act


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_bench_transform_scan_is_the_loop(bench_transform, method):
    options = bench_transform.parse(TRANSFORMER_SIZES)
    loop, scan = (
        bench_transform.set_up(options, method, layout, options.layers)
        for layout in bench_transform.LAYOUTS
    )
    params, adapters, x, _ = loop.arguments
    stacked = {
        path: jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *(adapters[path.replace("/", f"/{i}/")] for i in range(options.layers)),
        )
        for path in scan.plan.targets
    }
    want = loop.by_hand(params, adapters, x)
    got = scan.by_hand(scan.arguments[0], stacked, x)
    assert jnp.abs(got - want).max() <= 64 * jnp.finfo(want.dtype).eps * jnp.abs(want).max()


def test_looped_flops_counts_every_iteration(bench_transform):
    outside, body = 7, 100  # a layer, an iteration

    def counted(layers):
        return layers * outside + body

    total = bench_transform.looped_flops(counted(5), counted(10), 5)
    assert total == 5 * (outside + body)


def test_bench_transform_keeps_16_bits(bench_transform):
    options = bench_transform.parse([*TRANSFORMER_SIZES, "--dtype=bfloat16"])
    for method in bench_transform.LINEARS:
        for layout in bench_transform.LAYOUTS:
            setup = bench_transform.set_up(options, method, layout, options.layers)
            for name in bench_transform.CONTESTANTS:
                model = bench_transform.make_model(setup, name)
                out = jax.eval_shape(model, *setup.arguments[:3])
                assert out.dtype == jnp.bfloat16, (method, layout, name)


@pytest.fixture(scope="module")
def quant_run(bench_quant, tmp_path_factory):
    return run_script(bench_quant, QUANT_SIZES, tmp_path_factory.mktemp("bench_quant"))


def test_bench_quant_prints_every_contestant(bench_quant, quant_run):
    columns = {"forming": bench_quant.FORMING_COLUMNS, "step": bench_quant.STEP_COLUMNS}
    tables = quant_run.result["tables"]
    frozen = [bench_quant.FROZEN in table["rows"] for table in tables]
    assert frozen == [table["of"] == "step" for table in tables]
    assert [table["of"] for table in tables] == ["forming"] * 2 + ["step"] * 6
    for table in tables:
        of, rows = table["of"], table["rows"]
        first = bench_quant.COPY if of == "forming" else bench_quant.DENSE
        assert rows[first]["wall"] == rows[first]["cpu"] == rows[first]["best"] == 1
        assert table["title"] in quant_run.text
        for name, row in rows.items():
            assert f"\n{name} " in quant_run.text
            assert set(row) == set(columns[of])
            assert all(math.isfinite(value) and value > 0 for value in row.values())
    markdown = bench_quant.format_result(quant_run.result, markdown=True)
    assert markdown.count("\n|") == sum(len(table["rows"]) + 2 for table in tables)


def test_bench_quant_counts_bytes(quant_run):
    single, half = (table["rows"] for table in quant_run.result["tables"][:2])
    assert single["copy"]["bound"] == half["copy"]["bound"] == 1
    assert (single["copy"]["bytes"], half["copy"]["bytes"]) == (4, 2)
    # A byte an entry and a float32 an output; 4 bits and a byte for 64 entries.
    assert single["int8"]["bytes"] == half["fp8"]["bytes"] == 1 + 4 / 128
    assert single["nf4"]["bytes"] == 1 / 2 + 1 / 64 + 8 / 128**2
    assert single["int8"]["bound"] == (4 + 1 + 4 / 128) / (2 * 4)


def test_bench_quant_contestants_agree(bench_quant, quant_run):
    forming, steps = quant_run.outputs[:2], quant_run.outputs[2:]
    for made in forming:
        for name, weight in made.items():
            assert weight.dtype == made[bench_quant.COPY].dtype
            error = jnp.abs(weight - made[bench_quant.COPY]).max()
            assert (error == 0) == (name == bench_quant.COPY)
            assert error < 0.5
    for made in steps:
        frozen_loss, gradient = made.pop(bench_quant.FROZEN)
        assert gradient.shape == (3, 5, 128)
        (loss, gradients), (want, want_gradients) = (
            made[name] for name in sorted(made, key=lambda n: n == bench_quant.DENSE)
        )
        assert abs(frozen_loss - want) > 1e-6  # the adapters act
        assert loss == pytest.approx(float(want), rel=1e-5)
        for got, wanted in zip(
            jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True
        ):
            error = jnp.abs(got - wanted).max()
            assert error <= 512 * jnp.finfo(got.dtype).eps * jnp.abs(wanted).max()


def test_bench_quant_keeps_16_bits(bench_quant):
    options = bench_quant.parse([*QUANT_SIZES, "--dtype=bfloat16"])
    for name, setup in bench_quant.set_up(options, "lora", "nf4").items():
        _, params, x, target = setup.arguments
        assert x.dtype == target.dtype == params["layers"]["up"].dtype == jnp.bfloat16
        _, gradients = jax.eval_shape(setup.step, *setup.arguments)
        want = jnp.bfloat16 if name == bench_quant.FROZEN else jnp.float32
        assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype(want)}


def test_compile_times_are_of_every_contestant(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench_compile = importlib.import_module("bench_compile")
    file = tmp_path / "result.json"
    bench_compile.main(["--layers=1", "--width=8", "--rounds=1", f"--json={file}"])
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == [
        f"{method}, {name}"
        for method in bench_compile.METHODS
        for name in bench_compile.CONTESTANTS
    ]
    assert all(rows[f"{method}, by hand"]["lines"] == 1 for method in bench_compile.METHODS)
    assert all(f"\n{name} " in capsys.readouterr().out for name in list(rows)[:1])
    params, x = bench_compile.make_params(1, 8), jnp.ones((8, 8))
    config = lora_jax.LoraConfig(8, 16.0, use_dora=True)
    plan = lora_jax.plan_adapters(config, params, bench_compile.plain, x)
    adapters = lora_jax.init_adapters(jax.random.key(0), params, plan)
    adapters = jax.tree.map(lambda v: v + 0.1, adapters)
    got = lora_jax.adapt(bench_compile.plain, plan)(params, adapters, x)
    want = bench_compile.by_hand(params, adapters, x)
    support.assert_close(got, want, 64)


def test_collectives_of_a_program_in_16_bits(bench_scaling):
    mesh = bench_scaling.make_mesh(8, 4, 2)

    def place(shape, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    def layers(x, up, down):
        def body(x, weights):
            up, down = weights
            return jax.lax.with_sharding_constraint(x @ up @ down, x_like.sharding), None

        return jax.lax.scan(body, x, (up, down))[0]

    x_like = place((64, 32), "fsdp", None)
    arguments = x_like, place((3, 32, 48), None, "fsdp", "tensor")
    arguments += (place((3, 48, 32), None, "tensor", None),)
    found = bench_scaling._programs.collectives(
        jax.jit(layers).lower(*arguments).compile().as_text()
    )
    gather, reduce = sorted(found, key=lambda one: one.kind)
    assert gather == ("all-gather", 2 * 32 * 12, 2, 3, False)
    assert reduce == ("all-reduce", 2 * 32 * 32, 4, 3, False)
    assert gather.moved == 3 * gather.nbytes / 2
    assert reduce.moved == 3 * reduce.nbytes * 2 * 3 / 4


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,2,2]T(2,1,0)", 2),
        ("{{0,1,2},{3,4,5}}", 3),
        ("{}", 8),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a','b'}", 8),
        ("mesh['a'=4,'b'=2] {'a':(1)2}", 2),
    ],
)
@pytest.mark.parametrize("kind", ["reduce-scatter", "all-to-all", "collective-permute"])
def test_collectives_of_groups(bench_scaling, groups, size, kind):
    groups = f"replica_groups={groups}"
    if kind == "collective-permute":
        groups, size = "source_target_pairs={{0,1},{1,0}}", 2
    text = (
        "HloModule one, num_partitions=8\n\nENTRY %main (x: f32[6]) -> f32[6] {\n"
        "  %x = f32[6]{0} parameter(0)\n"
        f"  ROOT %y = f32[6]{{0}} {kind}(%x), channel_id=1, {groups}\n}}\n"
    )
    (one,) = bench_scaling._programs.collectives(text)
    assert one == (kind, 24, size, 1, False)
    shares = {"reduce-scatter": size - 1, "collective-permute": 1}
    assert one.moved == 24 * shares.get(kind, (size - 1) / size)


def test_collectives_that_cannot_be_counted(bench_scaling):
    head = "ENTRY %main (x: f32[6]) -> f32[6] {\n  %x = f32[6]{0} parameter(0)\n"
    exchange = "  %y = f32[6]{0} all-gather(%x), "
    loop = "%body (x: f32[6]) -> f32[6] {\n  %x = f32[6]{0} parameter(0)\n"
    loop += exchange + "replica_groups={{0,1}}\n}\n\n"
    with pytest.raises(ValueError, match="number of iterations of w is unknown"):
        bench_scaling._programs.collectives(
            f"{loop}{head}  %w = f32[6]{{0}} while(%x), body=%body\n}}\n"
        )
    with pytest.raises(ValueError, match="groups of all-gather y cannot be read"):
        bench_scaling._programs.collectives(f"{head}{exchange}replica_groups=new\n}}\n")


SCALING = ["--model=toy", "--devices=8", "--length=32", "--rank=4", "--tensor=2"]
SCALING += ["--fsdp=2", "--markdown"]  # and two `data` devices


def run_scaling(script, arguments):
    with jax.numpy_dtype_promotion("standard"):  # optax.adam promotes
        result = script.measure(script.parse([*SCALING, *arguments]))
    rows = {k.removeprefix("toy, 8, "): row for k, row in result["rows"].items()}
    return script.format_result(result, markdown=True), rows


@pytest.fixture(scope="module")
def scaling_run(bench_scaling):
    return run_scaling(bench_scaling, ["--dtype=float32"])


def test_bench_scaling_prints_every_method(bench_scaling, scaling_run):
    text, rows = scaling_run
    assert list(rows) == list(bench_scaling.METHODS)
    assert text.count("\n|") == 2 + len(rows)
    assert all(f"| toy, 8, {name} " in text for name in rows)
    assert all(f" {column} |" in text for column in bench_scaling.COLUMNS)


def test_bench_scaling_counts_bytes(bench_scaling, scaling_run):
    rows = {k: {c: 2**30 * v for c, v in row.items()} for k, row in scaling_run[1].items()}
    s = bench_scaling.MODELS["toy"]
    keys = s.kv_heads * s.head
    split_out = [(s.width, n) for n in (s.width, keys, keys, s.hidden, s.hidden)]
    split_in = [(s.width, s.width), (s.hidden, s.width)]
    matrices = sum(n_in * n_out for n_in, n_out in split_out + split_in)
    split = s.layers * matrices + 2 * s.width * s.vocabulary
    weights = split / 4 + (2 * s.layers + 1) * s.width  # norms are replicated
    kept = {"params": 4 * weights, "trained": 0, "gradients": 0, "state": 0}
    assert {c: rows["frozen"][c] for c in kept} == kept
    kept["gradients"], kept["state"] = 4 * weights, 8 * weights + 4
    assert {c: rows["full"][c] for c in kept} == kept
    # A factor has the split axis of its matrix, over two `tensor` devices.
    entries = sum(n_in + n_out / 2 for n_in, n_out in split_out)
    entries += sum(n_in / 2 + n_out for n_in, n_out in split_in)
    lora = 4 * s.layers * 4 * entries
    assert rows["LoRA"]["trained"] == rows["LoRA"]["gradients"] == lora
    assert rows["LoRA"]["state"] == 2 * lora + 4
    assert rows["LoRA, ZeRO-1"]["state"] == 2 * lora / 4 + 4
    assert rows["NF4"]["params"] < 0.5 * rows["LoRA"]["params"] == 2 * weights
    for row in rows.values():
        columns = ("params", "trained", "gradients", "state")
        assert row["memory"] == sum(row[c] for c in columns)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_scaling_counts_what_is_sent(bench_scaling, scaling_run, dtype):
    rows = scaling_run[1]
    if dtype == "bfloat16":
        arguments = ["--dtype=bfloat16", "--method", "frozen", "LoRA"]
        _, rows = run_scaling(bench_scaling, arguments)
    frozen, lora = rows["frozen"], rows["LoRA"]
    assert lora["gather"] == frozen["gather"] > 0
    # Gradients over rings of 4, in the dtype of the products. Over rings of 2, sums of
    # (tokens, rank): in float32 those that two matrices have in each of two forward passes,
    # and those of the other five in the backward pass.
    width = jnp.dtype(dtype).itemsize
    sums = bench_scaling.MODELS["toy"].layers * 32 * 4 * (4 * 4 + 5 * width) / 2**30
    more = 2 * 3 / 4 * lora["gradients"] * width / 4 + sums
    assert lora["sent"] - frozen["sent"] == pytest.approx(more, rel=1e-9)


def test_bench_scaling_counts_branches_apart(scaling_run):
    rows = scaling_run[1]
    assert rows["DoRA"]["branches"] > 0 == rows["LoRA"]["branches"]
    assert rows["full"]["sent"] > rows["DoRA"]["sent"] > rows["LoRA"]["sent"]


bench_sharding = script_fixture("bench_sharding")


def test_bench_sharding_counts_what_devices_exchange(bench_sharding, tmp_path):
    sizes = ["--layers=1", "--batch=4", "--length=4", "--width=32", "--heads=2", "--rank=4"]
    run = run_script(bench_sharding, sizes, tmp_path, optimized=True)
    names = [bench_sharding.FROZEN, *bench_sharding.CONTESTANTS]
    for table in run.result["tables"].values():
        assert list(table) == names
        assert all(set(row) == set(bench_sharding.COLUMNS) for row in table.values())
        frozen, rule, inherited, replicated = (
            table[name]
            for name in ("frozen", "adapt, rule", "adapt, inherited", "adapt, replicated")
        )
        assert rule["gathers"] == frozen["gathers"] > 0
        assert rule["others"] == frozen["others"] == 0
        assert rule["gathers"] < inherited["gathers"]
        assert inherited["adapters KiB"] < rule["adapters KiB"] < replicated["adapters KiB"]
        assert frozen["MFLOP"] < rule["MFLOP"] <= replicated["MFLOP"]
    assert all(f"\n{name} " in run.text for name in names)
    markdown = bench_sharding.format_result(run.result, markdown=True)
    assert markdown.count("\n|") == 2 * (len(names) + 2)


bench_language_model = script_fixture("bench_language_model")


def test_bench_language_model_trains_and_decodes(bench_language_model, tmp_path):
    script, printed, result = bench_language_model, io.StringIO(), tmp_path / "result.json"
    arguments = [f"--gguf={test_smollm.model_file(tmp_path / 'a.gguf')}", "--quick"]
    arguments += ["--batch=3", "--length=5", "--rank=2", "--tokens=8", f"--json={result}"]
    with contextlib.redirect_stdout(printed), support.optimizations(False):
        script.main(arguments)
    result, text = json.loads(result.read_text()), printed.getvalue()
    kinds = {n: k for n, k in script.CONTESTANTS.items() if k.framework == "jax"}
    rows, decoding = result["rows"], result["decoding"]
    assert list(rows) == list(kinds)
    for row, columns in [(r, script.COLUMNS) for r in rows.values()] + [
        (r, script.DECODE_COLUMNS) for r in decoding.values()
    ]:
        assert set(row) == set(columns)
        assert all(math.isfinite(value) and value >= 0 for value in row.values())
    assert all(f"\n{name} " in text for name in (*rows, *decoding))
    markdown = script.format_result(result, markdown=True)
    assert markdown.count("\n|") == len(rows) + len(decoding) + len(script.GOALS) + 3 * 2

    # Seven projections: (in + out) * rank in each of two layers; DoRA has out more.
    sizes = [(n_in, n_out) for n_out, n_in in test_smollm.ROWS.values()]
    lora = 2 * sum(2 * (n_in + n_out) for n_in, n_out in sizes) / 1e3
    dora = lora + 2 * sum(n_out for _, n_out in sizes) / 1e3
    matrices = sum(n_in * n_out for n_in, n_out in sizes)
    full = (2 * matrices + 6 * 32 + 5 * 32) / 1e3  # and the embedding, and five norms
    trained = {"nothing": 0, "lora": lora, "dora": dora, "full": full}
    found = {name: row["trained k"] for name, row in rows.items()}
    assert found == pytest.approx({n: trained[k.trains] for n, k in kinds.items()})
    assert rows["LoRA, q4"]["program MiB"] < rows["LoRA, dense"]["program MiB"]
    assert decoding["adapted, q4"]["weights MiB"] < decoding["merged"]["weights MiB"]
    assert [goal["met"] is None for goal in result["goals"]] == [False] * len(script.GOALS)


def test_bench_language_model_compares_nothing_unless_losses_agree(bench_language_model):
    check = bench_language_model.check_losses
    losses = {"LoRA, q4": [2.0, 1.9], "LoRA, dense": [2.0, 1.9], "frozen, q4": [2.0, 2.0]}
    check(losses)
    for name, changed, match in (
        ("LoRA, dense", [2.01, 1.9], "number 0"),
        ("LoRA, dense", [2.0, 1.89], "number -1"),
        ("frozen, q4", [math.nan, 2.0], "number 0"),
        ("DoRA, q4", [2.0, 2.0], "'DoRA, q4' does not fall"),
    ):
        with pytest.raises(ValueError, match=match):
            check(losses | {name: changed})


bench_rows = script_fixture("bench_rows")


@pytest.fixture(scope="module", params=["training", "decoding"])
def rows_run(request, bench_rows, tmp_path_factory):
    sizes = ["--layers=1", "--batch=4", "--length=3", "--width=16", "--heads=2"]
    sizes += ["--rank=2", "--rounds=1", "--slots", "1", "3", f"--phase={request.param}"]
    run = run_script(bench_rows, sizes, tmp_path_factory.mktemp(request.param))
    (run.outputs,), (run.table,) = run.outputs, run.result["tables"]
    return run


def test_bench_rows_prints_every_contestant(bench_rows, rows_run):
    rows = rows_run.table["rows"]
    names = [f"{way}, {slots}" for slots in (1, 3) for way in bench_rows.WAYS]
    dora = [f"{bench_rows.ROWS_DORA}, {slots}" for slots in (1, 3)]
    assert list(rows) == [bench_rows.ONE, *names, bench_rows.ONE_DORA, *dora]
    assert all(f"\n{name} " in rows_run.text for name in rows)
    for name, row in rows.items():
        assert set(row) == set(bench_rows.COLUMNS)
        # of four rows over three slots, a slot has one or two
        assert row["programs"] == (2 if name == f"{bench_rows.LOOP}, 3" else 1)
    markdown = bench_rows.format_result(rows_run.result, markdown=True)
    assert markdown.count("\n|") == len(rows) + 2


def test_bench_rows_contestants_agree(bench_rows, rows_run):
    slots, outputs = bench_rows.assign(4, 3), rows_run.outputs
    loop = outputs[f"{bench_rows.LOOP}, 3"]
    for way in bench_rows.WAYS[1:]:
        (got,) = outputs[f"{way}, 3"]
        if rows_run.table["phase"] == "decoding":
            for slot, want in enumerate(loop):
                support.assert_close(got[slots == slot], want, 512)
            continue
        (loss, grads), losses = got, [float(loss) for loss, _ in loop]
        assert loss == pytest.approx(sum(losses), rel=1e-5)
        for slot, (_, want) in enumerate(loop):
            for path, adapter in want.items():
                for name, value in adapter.items():
                    own = grads.adapters[path][name][slot]
                    support.assert_close(own, value, 2048)


def test_bench_rows_shows_times_of_peft(bench_rows, tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        times = {"wall": [2.0, 3.0], "cpu": [1.0, 1.0]}
        half = {"wall": [1.0, 1.5], "cpu": [0.5, 0.5]}
        answer = {"times": {"one": half, "many": times}, "torch": "2", "peft": "3"}
        return types.SimpleNamespace(returncode=0, stdout=json.dumps(answer), stderr="")

    monkeypatch.setattr(bench_rows.subprocess, "run", run)
    options = bench_rows.parse(["--peft=PYTHON", "--slots", "5", "--phase", "decoding"])
    table = bench_rows.measure_peft(options, "decoding")
    assert table["rows"]["many"] == {"wall": 2.0, "cpu": 2.0, "best": 2.0}
    assert table["baseline"] == {"wall_ms": 1250.0, "torch": "2", "peft": "3"}
    ((python, script, case),) = asked
    assert (python, pathlib.Path(script).exists()) == ("PYTHON", True)
    assert json.loads(case)["slots"] == [5]
    failed = types.SimpleNamespace(returncode=1, stdout="", stderr="no torch")
    monkeypatch.setattr(bench_rows.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="no torch"):
        bench_rows.measure_peft(options, "decoding")


combine = script_fixture("bench_combine")


def test_bench_combine_prints_every_contestant(bench_combine, tmp_path):
    sizes = ["--width=40", "--rank=3", "--adapters=2", "--rounds=2"]
    run = run_script(bench_combine, sizes, tmp_path)
    rows = run.result["rows"]
    assert list(rows) == [bench_combine.BASELINE, *bench_combine.CONTESTANTS]
    assert all(f"\n{name} " in run.text for name in rows)
    assert all(min(row[c] for c in ("wall", "cpu", "ms")) > 0 for row in rows.values())
    assert rows[bench_combine.BASELINE]["wall"] == 1
    # Whoever computes the sum, computes it to rounding.
    assert {name for name, row in rows.items() if row["error"] < 100} == {
        *(bench_combine.BASELINE, "svd", "exact")
    }
