"""Graphs, flows, differential equations, physics."""

import jax
import jax.numpy as jnp

from tests.public.building import of_equinox, of_haiku, of_linen, of_nnx, public
from tests.public.checks import normal, tokens


@public("flowjax")
def flowjax_masked_autoregressive_flow():
    from flowjax import distributions, flows
    base = lambda: distributions.Normal(jnp.zeros(3))
    return of_equinox(lambda key: flows.masked_autoregressive_flow(key, base_dist=base(), flow_layers=2, nn_width=7), normal(4, 3), call=lambda flow, x: flow.log_prob(x), config={"targets": "*/weight/args/0", "axes": {"*": "oi"}}, merged=("*",))


@public("flowjax")
def flowjax_coupling_flow():
    from flowjax import distributions, flows, bijections
    base = lambda: distributions.Normal(jnp.zeros(4))
    return of_equinox(lambda key: flows.coupling_flow(key, base_dist=base(), flow_layers=2, nn_width=7, transformer=bijections.RationalQuadraticSpline(knots=4, interval=4)), normal(4, 4), call=lambda flow, x: flow.log_prob(x), left_out=("*/bias",))


@public("flowjax")
def flowjax_block_neural_autoregressive_flow():
    from flowjax import distributions, flows
    base = lambda: distributions.Normal(jnp.zeros(3))
    return of_equinox(lambda key: flows.block_neural_autoregressive_flow(key, base_dist=base(), nn_block_dim=4), normal(4, 3), call=lambda flow, x: flow.log_prob(x), config={"targets": "*/weight/*", "axes": {"*": "oi"}}, merged=("*",))


@public("flowjax")
def flowjax_triangular_spline_flow():
    from flowjax import distributions, flows
    base = lambda: distributions.Normal(jnp.zeros(3))
    return of_equinox(lambda key: flows.triangular_spline_flow(key, base_dist=base(), flow_layers=2, knots=3), normal(4, 3), call=lambda flow, x: flow.log_prob(x))


@public("bijx")
def bijx_realnvp():
    import bijx
    return of_nnx(lambda rngs: bijx.realnvp_flow(4, n_coupling_layers=2, width=7, rngs=rngs), normal(5, 4), call=lambda m, x: m.forward(x, jnp.zeros(5)))


@public("diffrax", "equinox")
def neural_ode():
    import diffrax, equinox as eqx

    def call(mlp, y):
        def solve(y):
            return diffrax.diffeqsolve(diffrax.ODETerm(lambda t, y, args: mlp(y)), diffrax.Tsit5(), 0.0, 1.0, 0.1, y,
                stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6), saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, 4)), adjoint=diffrax.DirectAdjoint()).ys
        return jax.vmap(solve)(y)
    return of_equinox(lambda key: eqx.nn.MLP(3, 3, 8, 2, activation=jax.nn.softplus, key=key), normal(2, 3), call=call)


def graph():
    import jraph
    return jraph.GraphsTuple(nodes=normal(5, 6), edges=normal(8, 4), senders=jnp.arange(8) % 5, receivers=jnp.arange(8) * 3 % 5,
        n_node=jnp.array([3, 2]), n_edge=jnp.array([5, 3]), globals=normal(2, 3))


@public("jraph", "haiku")
def jraph_graph_network():
    import haiku as hk, jraph

    def f(is_training, graph):
        def mlp(name):
            return jraph.concatenated_args(lambda x: hk.nets.MLP([7, 5], name=name)(x))
        net = jraph.GraphNetwork(mlp("edge"), mlp("node"), mlp("global"))
        graph = net(graph)
        return graph.nodes, graph.edges, graph.globals
    return of_haiku(f, graph())


@public("jraph", "haiku")
def jraph_graph_attention():
    import haiku as hk, jraph

    def f(is_training, graph):
        net = jraph.GAT(lambda x: hk.Linear(8, name="q")(x), lambda s, r, e: jax.nn.leaky_relu(hk.Linear(1, name="logit")(jnp.concatenate([s, r, e], 1))), lambda x: hk.Linear(5, name="out")(x))
        return net(graph).nodes
    return of_haiku(f, graph())


@public("jraph", "haiku")
def jraph_graph_convolution():
    import haiku as hk, jraph

    def f(is_training, graph):
        net = jraph.GraphConvolution(lambda x: hk.Linear(8)(x), add_self_edges=True)
        return net(net(graph)).nodes
    return of_haiku(f, graph())


@public("e3nn_jax", "haiku")
def e3nn_transformer():
    import e3nn_jax as e3nn, haiku as hk
    from e3nn_jax.experimental.transformer import Transformer

    def f(is_training, positions, nodes, senders, receivers):
        x = e3nn.IrrepsArray("4x0e+2x1o", nodes)
        edges = e3nn.IrrepsArray("1o", positions[receivers] - positions[senders])
        length = e3nn.norm(edges).array[:, 0]
        sh = e3nn.spherical_harmonics("0e+1o", edges, True)
        out = Transformer("4x0e+2x1o", [8], jax.nn.silu, 2)(senders, receivers, e3nn.soft_one_hot_linspace(length, start=0.0, end=3.0, number=4, basis="smooth_finite", start_zero=True, end_zero=True), jnp.ones(len(senders)), sh, x)
        return out.array
    return of_haiku(f, normal(5, 3), normal(5, 10), jnp.arange(8) % 5, (jnp.arange(8) + 1 + jnp.arange(8) // 5) % 5)


@public("e3nn_jax", "flax")
def e3nn_message_passing():
    import e3nn_jax as e3nn
    from e3nn_jax.experimental.point_convolution import MessagePassingConvolutionFlax
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, positions, nodes, senders, receivers):
            x = e3nn.IrrepsArray("4x0e+2x1o", nodes)
            edges = e3nn.IrrepsArray("1o", positions[receivers] - positions[senders])
            conv = MessagePassingConvolutionFlax("5x0e+3x1o", lambda r: e3nn.bessel(r, 4), avg_num_neighbors=2.0, sh_lmax=2, num_radial_basis=4, mlp_neurons=(7,))
            return e3nn.flax.Linear("4x0e+1o")(conv(edges, x, senders, receivers)).array
    return of_linen(Net(), normal(5, 3), normal(5, 10), jnp.arange(8) % 5, (jnp.arange(8) + 1 + jnp.arange(8) // 5) % 5)


@public("netket", "flax")
def netket_rbm():
    import netket as nk
    return of_linen(nk.models.RBM(alpha=2, param_dtype=float), normal(4, 6))


@public("netket", "flax")
def netket_group_convolutions():
    import netket as nk
    g = nk.graph.Square(3)
    return of_linen(nk.models.GCNN(symmetries=g, layers=2, features=3, complex_output=False, mode="irreps"), normal(4, 9))


@public("netket", "flax")
def netket_group_convolutions_by_fft():
    import netket as nk
    g = nk.graph.Square(3)
    return of_linen(nk.models.GCNN(symmetries=g, layers=2, features=3, complex_output=False, mode="fft"), normal(4, 9), config={"targets": "*/kernel"})


@public("netket", "flax")
def netket_autoregressive():
    import netket as nk
    hilbert = nk.hilbert.Spin(0.5, 6)
    return of_linen(nk.models.ARNNDense(hilbert=hilbert, layers=2, features=4), jnp.where(normal(4, 6) > 0, 1.0, -1.0), config={"targets": "*/kernel", "axes": {"*": "io"}}, left_out=("*/bias",), merged=("*",))


@public("jraphx")
def jraphx_gat():
    from jraphx.nn.models import GAT
    edges = jnp.stack([jnp.arange(8) % 5, jnp.arange(8) * 3 % 5])
    return of_nnx(lambda rngs: GAT(6, 8, 2, out_features=5, heads=2, rngs=rngs), normal(5, 6), edges, left_out=("*/att_*",))


@public("e3x")
def e3x_attention():
    import e3x, flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, positions, x, dst, src):
            r = positions[src] - positions[dst]
            basis = e3x.nn.basis(r, max_degree=1, num=4, radial_fn=e3x.nn.exponential_bernstein)
            x = e3x.nn.MultiHeadAttention(num_heads=2)(x, x, basis, dst_idx=dst, src_idx=src, num_segments=5)
            x = e3x.nn.FusedTensor(max_degree=1)(x, x)
            return e3x.nn.TensorDense(5, max_degree=1)(x)
    return of_linen(Net(), normal(5, 3), normal(5, 2, 4, 6), jnp.arange(8) % 5, (jnp.arange(8) + 1 + jnp.arange(8) // 5) % 5, left_out=("*/tensor/kernel", "FusedTensor_0/*"))
