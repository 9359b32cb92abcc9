"""Changes single operations of one module, and lists the changes that no test notices.

    python -m tests.mutants lora_jax/layers/dora.py tests/layers/test_dora.py --sample 20

Each change, a mutant, is made in a copy of the repository, where the given tests then
run until one fails. A mutant that passes them all either needs a test, or means the same
as the original; those are listed in `EQUIVALENT`, with the reason.
"""

import argparse
import ast
import copy
import difflib
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]

# (module, original line, changed line): why no test can tell them apart. The lines are
# stripped, so that an entry holds when code moves, and ends when the line changes.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "lora_jax/layers/biases.py",
        "delta = delta + jnp.squeeze(through_b, -2)",
        "delta = jnp.squeeze(through_b, -2)",
    ): "the sum is zero so far",
    (
        "lora_jax/lowrank/weight_norms.py",
        "return jnp.all((squares.value >= squares.least) & (squares.value <= most))",
        "return jnp.all(((squares.value > squares.least)) & (squares.value <= most))",
    ): "both branches are accurate at the bound",
    (
        "lora_jax/lowrank/weight_norms.py",
        "return jnp.all((squares.value >= squares.least) & (squares.value <= most))",
        "return jnp.all((squares.value >= squares.least) & ((squares.value < most)))",
    ): "both branches are accurate at the bound",
    (
        "lora_jax/lowrank/weight_norms.py",
        "most = float(jnp.finfo(squares.value.dtype).max) / 16",
        "most = float(jnp.finfo(squares.value.dtype).max) / 17",
    ): "both branches are accurate at the bound",
    (
        "lora_jax/plan/axis_roles.py",
        "for split in splits[1:]:",
        "for split in splits[0:]:",
    ): "the first one agrees with itself",
    (
        "lora_jax/plan/axis_roles.py",
        "order = (*range(axis, ndim), *range(axis, -1, -1))",
        "order = (*range(axis, ndim), *range(axis, -2, -1))",
    ): "no axis has the number -1",
    (
        "lora_jax/plan/axis_roles.py",
        "order = (*range(axis, ndim), *range(axis, -1, -1))",
        "order = (*range(axis, ndim), *range(axis, -0, -1))",
    ): "two axes or more have letters, so that the first is never the only one",
    (
        "lora_jax/plan/parts.py",
        "groups.setdefault(tuple(index in own for own in inside), []).append(index)",
        "groups.setdefault(tuple((index not in own) for own in inside), []).append(index)",
    ): "both keys group the same indices",
    (
        "lora_jax/plan/parts.py",
        "return [as_text((*whole[0][:axis], entry, *whole[0][axis + 1 :]), shape)]",
        "return [as_text((*whole[1][:axis], entry, *whole[0][axis + 1 :]), shape)]",
    ): "the parts have the same entries along the other axes",
    (
        "lora_jax/plan/parts.py",
        "return [as_text((*whole[0][:axis], entry, *whole[0][axis + 1 :]), shape)]",
        "return [as_text((*whole[0][:axis], entry, *whole[1][axis + 1 :]), shape)]",
    ): "the parts have the same entries along the other axes",
    (
        "lora_jax/plan/parts.py",
        "if axis >= 0 and array.shape[place] != shape[axis]:",
        "if (axis >= 0):",
    ): "an axis that has its size already is padded with nothing",
    (
        "lora_jax/quant/_arithmetic.py",
        "return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)",
        "return lax.reduce_precision(x, exponent_bits=9, mantissa_bits=7)",
    ): "a float32 has no more than 8 bits of exponent",
    (
        "lora_jax/quant/_arithmetic.py",
        "down = jnp.where(divisor > _HUGE, _DOWN, 1.0).astype(x.dtype)",
        "down = jnp.where((divisor >= _HUGE), _DOWN, 1.0).astype(x.dtype)",
    ): "a power of two changes no rounding of the quotient",
    (
        "lora_jax/quant/_arithmetic.py",
        "chosen = np.where(rounded.astype(np.float64) > midpoints, below, rounded)",
        "chosen = np.where(rounded.astype(np.float32) > midpoints, below, rounded)",
    ): "a float32 has the values of all dtypes of at most 32 bits",
    (
        "lora_jax/quant/_packing.py",
        "return (pairs[..., 0] << jnp.uint8(4)) | pairs[..., 1]",
        "return (pairs[..., 0] << jnp.uint8(4)) | pairs[..., 2]",
    ): "the axis has two entries, and JAX takes the last one for what is beyond it",
    (
        "lora_jax/quant/fp8.py",
        "rounded = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=_MANTISSA_BITS)",
        "rounded = lax.reduce_precision(x, exponent_bits=9, mantissa_bits=_MANTISSA_BITS)",
    ): "a float32 has no more than 8 bits of exponent",
    (
        "lora_jax/quant/fp8.py",
        "return jnp.where(jnp.abs(x) < _TINY, steps, rounded)",
        "return jnp.where((jnp.abs(x) <= _TINY), steps, rounded)",
    ): "both round the smallest normal number to itself",
    (
        "lora_jax/quant/_torchao.py",
        "codes = jnp.clip(jnp.round(steps), -128, 127).astype(SCALES)",
        "codes = jnp.clip(jnp.round(steps), -128, 128).astype(SCALES)",
    ): "XLA casts 128 to the largest int8",
    (
        "lora_jax/quant/_torchao.py",
        "codes = jnp.clip(jnp.round(steps), -128, 127).astype(SCALES)",
        "codes = jnp.clip(jnp.round(steps), -129, 127).astype(SCALES)",
    ): "XLA casts -129 to the smallest int8",
    (
        "lora_jax/plan/parts.py",
        "line.reshape(-1)[list(indices_of(own[axis]))] = True",
        "line.reshape(-2)[list(indices_of(own[axis]))] = True",
    ): "NumPy takes any negative size as the one that is not given",
    (
        "lora_jax/_core/numerics.py",
        "unit = lax.reduce_precision(2 * over, exponent_bits=8, mantissa_bits=0)",
        "unit = lax.reduce_precision(2 * over, exponent_bits=9, mantissa_bits=0)",
    ): "a float32 has no more than 8 bits of exponent",
    (
        "lora_jax/quant/nf4.py",
        "if max(self.block_size, nested or 0) > max(n, _LARGEST_PADDING):",
        "if max(self.block_size, nested or 1) > max(n, _LARGEST_PADDING):",
    ): "a block has two entries or more",
    (
        "lora_jax/quant/_ggml.py",
        "_MOST = 64  # blocks in one loop",
        "_MOST = 65  # blocks in one loop",
    ): "however many blocks a loop takes, the sums have one order",
    (
        "lora_jax/quant/_ggml.py",
        "runs = field.reshape(*field.shape[:-1], -1, 1, run)",
        "runs = field.reshape(*field.shape[:1], -1, 1, run)",
    ): "the runs of all blocks are in the same order",
    (
        "lora_jax/quant/_ggml.py",
        "return (lanes @ jnp.ones((_RUN, 2), jnp.float32))[:, 0]",
        "return (lanes @ jnp.ones((_RUN, 3), jnp.float32))[:, 0]",
    ): "all columns are the same",
    (
        "lora_jax/quant/_ggml.py",
        "return (lanes @ jnp.ones((_RUN, 2), jnp.float32))[:, 0]",
        "return (lanes @ jnp.ones((_RUN, 2), jnp.float32))[:, 1]",
    ): "all columns are the same",
    (
        "lora_jax/lowrank/contraction.py",
        "return options(x, y) if x.dtype == dtype else _wide_product(x, y, options, dtype)",
        "return _wide_product(x, y, options, dtype)",
    ): "with wide operands the rule has the products of plain differentiation",
    (
        "lora_jax/lowrank/low_rank.py",
        "_NORM_ULPS = 8",
        "_NORM_ULPS = 9",
    ): "changes of so few units are rounding or not, and no one can tell",
    (
        "lora_jax/lowrank/low_rank.py",
        "change = jnp.where(real, change / jnp.where(norm == 0, 1, norm), 0)  # m / n - 1",
        "change = jnp.where(real, change / jnp.where(norm == 0, 2, norm), 0)  # m / n - 1",
    ): "the quotient by it is not used",
    (
        "lora_jax/lowrank/low_rank.py",
        'matrix, axis = LowRank(weight, {"A": a, "B": b}, scale, *static)'
        ".matrix(fold=True)",
        'matrix, axis = LowRank(weight, {"A": a, "B": b}, scale, *static)'
        ".matrix(fold=False)",
    ): "the norms are the same with the axes apart",
    (
        "lora_jax/optim/optimizers.py",
        "return jnp.where(own == 0, 1, own)  # the slot has no such adapter, only zeros",
        "return jnp.where(own == 0, 2, own)  # the slot has no such adapter, only zeros",
    ): "zeros are divided by it",
    (
        "lora_jax/plan/layout.py",
        "is_matrix = axes == (tuple(range(n)), (n,), (n + 1,))",
        "is_matrix = axes == (tuple(range(n)), (n,), (1,))",
    ): "with its axes, a stack of matrices has the same results",
    (
        "lora_jax/plan/layout.py",
        "adapter: Mapping[str, jax.Array], target: Target, magnitude: float = 1.0",
        "adapter: Mapping[str, jax.Array], target: Target, magnitude: float = 0.0",
    ): "callers that do not give it mask what is outside of the part",
    (
        "lora_jax/plan/layout.py",
        "adapter: Mapping[str, jax.Array], target: Target, magnitude: float = 1.0",
        "adapter: Mapping[str, jax.Array], target: Target, magnitude: float = 2.0",
    ): "callers that do not give it mask what is outside of the part",
    (
        "lora_jax/plan/layout.py",
        'target: Target = dataclasses.field(metadata={"static": True})',
        'target: Target = dataclasses.field(metadata={"static": False})',
    ): "a target is a static node, which has no leaves",
    (
        "lora_jax/transform/_rules_gather.py",
        "return out if found is None or owns else out * found.astype(out.dtype)",
        "return out if (found is None) else out * found.astype(out.dtype)",
    ): "a factor that owns the axes has zeros there already",
    (
        "lora_jax/transform/_rules_convolution.py",
        "if out_axis in f.owned(pair[0]) or f.owned(pair[1]) - {out_axis}:",
        "if (f.owned(pair[1]) - {out_axis}):",
    ): "a weight with one output feature for each entry of a batch has no adapter",
}

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
WORDS = {"float32": "bfloat16", "float64": "float32", "in": "out", "out": "in"}
SYMMETRIC = {
    *("swapaxes", "maximum", "minimum", "max", "min", "promote", "zip"),
    *("clip", "accumulation_dtype", "overlap", "_same"),
}
DTYPE_ARGUMENTS = {"dtype", "preferred_element_type", "precision"}


def variants(node):
    """What may stand in the place of an expression."""
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.Compare):
        yield from _other_operators(node)
    if isinstance(node, ast.BinOp):
        yield from (node.left, node.right)
        if isinstance(node.op, ast.MatMult | ast.Div | ast.Sub):
            yield ast.BinOp(node.right, node.op, node.left)
    elif isinstance(node, ast.BoolOp):
        yield from node.values
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.Constant):
        yield from map(ast.Constant, _other_constants(node.value))
    elif isinstance(node, ast.Attribute) and node.attr in WORDS:
        yield ast.Attribute(node.value, WORDS[node.attr], node.ctx)
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)


def _other_operators(node):
    field, many = ("ops", True) if isinstance(node, ast.Compare) else ("op", False)
    (op,) = getattr(node, field)[:1] if many else (node.op,)
    if type(op) in OPERATORS:
        other = copy.copy(node)
        new = OPERATORS[type(op)]()
        setattr(other, field, [new, *node.ops[1:]] if many else new)
        yield other


def _other_constants(value):
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 1
        if value == 1:
            yield type(value)(0)
    elif isinstance(value, str) and value in WORDS:
        yield WORDS[value]


def _other_calls(node):
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if (
        name not in SYMMETRIC
        and len(node.args) > 1
        and not any(isinstance(x, ast.Starred) for x in node.args[:2])
    ):
        one, two, *rest = node.args
        yield ast.Call(node.func, [two, one, *rest], node.keywords)
    for keyword in node.keywords:
        if keyword.arg in DTYPE_ARGUMENTS:
            rest = [k for k in node.keywords if k is not keyword]
            yield ast.Call(node.func, node.args, rest)


def arithmetic(node):
    """All expressions below a node but those of checks, types and texts."""
    if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of a zip
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
        return
    if isinstance(node, ast.expr):
        yield node
    skipped = {"annotation", "returns", "decorator_list"}
    for field, value in ast.iter_fields(node):
        if field not in skipped:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from arithmetic(child)


def mutants(source):
    """The texts of a module in which one expression is another."""
    lines = source.encode().splitlines(keepends=True)  # columns count bytes
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    whole, found = b"".join(lines), {}
    for node in arithmetic(ast.parse(source)):
        first = starts[node.lineno - 1] + node.col_offset
        last = starts[node.end_lineno - 1] + node.end_col_offset
        for other in variants(node):
            text = f"({ast.unparse(other)})" if _is_compound(other) else ast.unparse(other)
            changed = (whole[:first] + text.encode() + whole[last:]).decode()
            found[changed] = None
    return [text for text in found if text != source]


def _is_compound(node):
    return isinstance(node, ast.BinOp | ast.BoolOp | ast.Compare | ast.IfExp | ast.UnaryOp)


def changed_lines(one, other):
    """The lines that differ, from the first to the last, stripped and joined."""
    a, b = one.splitlines(), other.splitlines()
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    blocks = [block for block in blocks if block[0] != "equal"]
    (_, i, _, k, _), (*_, j, _, m) = blocks[0], blocks[-1]
    return " ".join(map(str.strip, a[i:j])), " ".join(map(str.strip, b[k:m])), i + 1


def passes(root, tests, limit):
    """Whether tests pass in time, on the code in a folder."""
    environment = os.environ | {
        # Values are tested, so that programs may compile in half the time.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # What no mutant changes is compiled once.
        "JAX_COMPILATION_CACHE_DIR": str(root.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # What found the last mutant runs first: it often finds the next one.
    command = [sys.executable, "-m", "pytest", "-qx", "--ff", *tests]
    try:
        run = subprocess.run(
            command, cwd=root, env=environment, timeout=limit, capture_output=True
        )
    except subprocess.TimeoutExpired:
        return False
    if run.returncode not in (0, 1, 2, 3):  # 2: the module cannot be imported
        raise RuntimeError(f"pytest did not run the tests:\n{run.stdout.decode()}")
    return run.returncode == 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("module", help="path of the module, from the root")
    parser.add_argument("tests", nargs="+", help="arguments of pytest: files, tests, -k=…")
    parser.add_argument("--sample", type=int, help="number of mutants; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one mutant")
    options, more = parser.parse_known_args(argv)
    options.tests += more
    source = (ROOT / options.module).read_text()
    pairs = [(text, changed_lines(source, text)) for text in mutants(source)]
    known = {key[1:] for key in EQUIVALENT if key[0] == options.module}
    if stale := known - {lines[:2] for _, lines in pairs}:
        raise SystemExit(f"EQUIVALENT has mutants that do not exist: {sorted(stale)}")
    pairs = [pair for pair in pairs if pair[1][:2] not in known]
    if options.sample and options.sample < len(pairs):
        pairs = random.Random(options.seed).sample(pairs, options.sample)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder, "copy")
        unneeded = shutil.ignore_patterns(".git", "__pycache__", ".venv", ".pytest_cache")
        shutil.copytree(ROOT, root, symlinks=True, ignore=unneeded)
        if not passes(root, options.tests, None):
            raise SystemExit("the tests fail on the module as it is.")
        survivors = 0
        pairs.sort(key=lambda pair: pair[1][2])
        for time, (text, (before, after, line)) in enumerate(pairs):
            (root / options.module).write_text(text)
            os.utime(root / options.module, (time, time))  # bytecode of another time is old
            if passes(root, options.tests, options.limit):
                survivors += 1
                print(f"{options.module}:{line}\n- {before}\n+ {after}", flush=True)
    print(f"{options.module}: {survivors} of {len(pairs)} mutants survive.")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
