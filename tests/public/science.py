"""Recurrent networks, graphs, flows, filters, differential equations, physics."""

import jax
import jax.numpy as jnp

from tests.public.building import of_equinox, of_haiku, of_linen, of_nnx, public
from tests.public.checks import Model, drawn, normal, tokens

# Recurrences


@public("haiku")
def haiku_deep_rnn():
    import haiku as hk

    def recurrence(is_training, xs):
        core = hk.DeepRNN([hk.VanillaRNN(5), jax.nn.relu, hk.GRU(4), hk.LSTM(3)])
        return hk.dynamic_unroll(core, xs, core.initial_state(2))[0]

    return of_haiku(recurrence, normal(6, 2, 3))


@public("equinox")
def equinox_gru():
    import equinox as eqx

    def call(cell, xs):
        return jax.lax.scan(lambda h, x: (cell(x, h),) * 2, jnp.zeros(5), xs)[1]

    return of_equinox(lambda key: eqx.nn.GRUCell(3, 5, key=key), normal(6, 3), call=call)


@public("equinox")
def equinox_weight_norm():
    import equinox as eqx

    def make(key):
        normed = eqx.nn.WeightNorm(eqx.nn.Linear(4, 5, key=key))
        return eqx.nn.Sequential([normed, eqx.nn.Linear(5, 3, key=key)])

    # The matrix itself stays low-rank; its norm needs the merged one.
    return of_equinox(
        make,
        normal(4),
        merged=("layers/0/layer/weight",),
        no_dora="the norm of the layer undoes DoRA's magnitude, which has no gradient",
    )


@public("haiku")
def haiku_spectral_norm():
    import haiku as hk

    def layer(is_training, x):
        weight = hk.get_parameter("w", (4, 5), init=jnp.zeros)
        weight = hk.SpectralNorm(n_steps=1)(weight, update_stats=is_training)
        return jnp.tanh(x @ weight)

    return of_haiku(layer, normal(3, 4))


@public("haiku")
def haiku_vector_quantizer():
    import haiku as hk

    def autoencoder(is_training, x):
        quantizer = hk.nets.VectorQuantizer(6, 7, 0.25)
        out = quantizer(hk.Linear(6)(x), is_training)
        return hk.Linear(3)(out["quantize"]), out["loss"]

    # The distances to the codes have their squares.
    return of_haiku(autoencoder, normal(8, 4), merged=("vector_quantizer/embeddings",))


SEQUENCE = {"left_out": ("Embed_0/embedding",)}


@public("long_range_models")
def state_space_s5():
    import long_range_models as models

    model = models.SequenceModel(models.S5Layer(6, 4), 11, 6)
    return of_linen(model, tokens(2, 8), **SEQUENCE, merged_in_dora=("*_comps",))


@public("long_range_models")
def linear_recurrent_unit():
    import long_range_models as models

    model = models.SequenceModel(models.LRULayer(6, 4), 11, 6)
    return of_linen(model, tokens(2, 8), **SEQUENCE, merged_in_dora=("*/[BC]_*",))


@public("dynamax")
def kalman_smoother():
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM

    model = LinearGaussianSSM(4, 3)
    params, _ = model.initialize(jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), params)

    def fn(params, y):
        out = model.smoother(params, y)
        return out.marginal_loglik, out.smoothed_means

    return Model(fn, params, (normal(5, 3),), left_out=("*/cov", "*/input_weights"))


# Graphs

SENDERS = jnp.arange(8) % 5
RECEIVERS = (SENDERS + 1 + jnp.arange(8) // 5) % 5


def graph():
    import jraph

    return jraph.GraphsTuple(
        nodes=normal(5, 6),
        edges=normal(8, 4),
        senders=SENDERS,
        receivers=RECEIVERS,
        n_node=jnp.array([3, 2]),
        n_edge=jnp.array([5, 3]),
        globals=normal(2, 3),
    )


@public("jraph")
def jraph_graph_network():
    import haiku as hk
    import jraph

    def network(is_training, graph):
        def mlp(name):
            return jraph.concatenated_args(hk.nets.MLP([7, 5], name=name))

        net = jraph.GraphNetwork(mlp("edge"), mlp("node"), mlp("global"))
        graph = net(graph)
        return graph.nodes, graph.edges, graph.globals

    return of_haiku(network, graph())


@public("jraph")
def jraph_graph_attention():
    import haiku as hk
    import jraph

    def network(is_training, graph):
        def logit(sent, received, edges):
            both = jnp.concatenate([sent, received, edges], 1)
            return jax.nn.leaky_relu(hk.Linear(2, name="logit")(both).sum(1, keepdims=True))

        query, out = hk.Linear(8, name="query"), hk.Linear(5, name="out")
        return jraph.GAT(query, logit, out)(graph).nodes

    return of_haiku(network, graph())


@public("jraphx")
def jraphx_graph_attention():
    from jraphx.nn.models import GAT

    edges = jnp.stack([SENDERS, RECEIVERS])
    return of_nnx(
        lambda rngs: GAT(6, 8, 2, out_features=5, heads=2, rngs=rngs),
        normal(5, 6),
        edges,
        left_out=("*/att_*",),
    )


@public("e3nn_jax")
def e3nn_equivariant_transformer():
    import e3nn_jax as e3nn
    from e3nn_jax.experimental.transformer import Transformer

    def network(is_training, positions, nodes):
        nodes = e3nn.IrrepsArray("4x0e+2x1o", nodes)
        edges = e3nn.IrrepsArray("1o", positions[RECEIVERS] - positions[SENDERS])
        weights = jnp.exp(-e3nn.norm(edges).array[:, 0])
        edges = e3nn.spherical_harmonics("0e+1o", edges, True)
        net = Transformer("4x0e+2x1o", [8], jax.nn.silu, 2)
        return net(SENDERS, RECEIVERS, weights, edges, nodes).array

    return of_haiku(network, normal(5, 3), normal(5, 10))


@public("e3nn_jax")
def e3nn_message_passing():
    import e3nn_jax as e3nn
    from e3nn_jax.experimental.point_convolution import MessagePassingConvolutionFlax
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, positions, nodes):
            nodes = e3nn.IrrepsArray("4x0e+2x1o", nodes)
            edges = e3nn.IrrepsArray("1o", positions[RECEIVERS] - positions[SENDERS])
            convolution = MessagePassingConvolutionFlax(
                "5x0e+3x1o",
                lambda r: e3nn.bessel(r, 4),
                avg_num_neighbors=2.0,
                sh_lmax=2,
                num_radial_basis=4,
                mlp_neurons=(7,),
            )
            nodes = convolution(edges, nodes, SENDERS, RECEIVERS)
            return e3nn.flax.Linear("4x0e+1o")(nodes).array

    return of_linen(Network(), normal(5, 3), normal(5, 10))


@public("e3x")
def e3x_equivariant_attention():
    import e3x
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, positions, x):
            r = positions[SENDERS] - positions[RECEIVERS]
            radial = e3x.nn.exponential_bernstein
            basis = e3x.nn.basis(r, max_degree=1, num=4, radial_fn=radial)
            attention = e3x.nn.MultiHeadAttention(num_heads=2)
            x = attention(x, x, basis, dst_idx=RECEIVERS, src_idx=SENDERS, num_segments=5)
            return e3x.nn.TensorDense(5, max_degree=1)(x)

    # The weights of tensor products multiply entry by entry.
    args = normal(5, 3), normal(5, 2, 4, 6)
    return of_linen(Network(), *args, left_out=("*/tensor/kernel",))


# Flows, whose networks of masks need the merged weights


def of_flowjax(make, size, **fields):
    from flowjax.distributions import Normal

    def make_flow(key):
        return make(key, base_dist=Normal(jnp.zeros(size)))

    def call(flow, x):
        return flow.log_prob(x)

    return of_equinox(make_flow, normal(4, size), call=call, **fields)


@public("flowjax")
def flowjax_coupling_flow():
    from flowjax import bijections, flows

    def make(key, base_dist):
        spline = bijections.RationalQuadraticSpline(knots=4, interval=4)
        options = {"flow_layers": 2, "nn_width": 7, "transformer": spline}
        return flows.coupling_flow(key, base_dist=base_dist, **options)

    return of_flowjax(make, 4, left_out=("*/bias",))


@public("flowjax")
def flowjax_masked_autoregressive_flow():
    from flowjax import flows

    def make(key, base_dist):
        options = {"flow_layers": 2, "nn_width": 7}
        return flows.masked_autoregressive_flow(key, base_dist=base_dist, **options)

    # The weights of all layers lie in one array, and are multiplied by masks.
    weights = "*/layers/*/weight/args/1"
    config = {"targets": weights, "axes": {weights: "boi"}}
    return of_flowjax(make, 3, config=config, left_out=("*/bias",), merged=(weights,))


@public("bijx")
def bijx_real_nvp():
    import bijx

    model = of_nnx(
        lambda rngs: bijx.realnvp_flow(4, n_coupling_layers=2, width=7, rngs=rngs),
        normal(5, 4),
        call=lambda flow, x: flow.forward(x, jnp.zeros(5)),
    )
    smaller = jax.tree.map(lambda leaf: leaf / 4, model.params)  # it exponentiates
    return model._replace(params=smaller)


@public("numpyro")
def numpyro_autoregressive():
    from numpyro import nn

    init, apply = nn.AutoregressiveNN(4, [8, 8])
    params = jax.eval_shape(lambda key: init(key, (4,))[1], jax.random.key(0))
    config = {"targets": "*/0", "axes": {"*": "io"}}
    return Model(apply, drawn(params), (normal(5, 4),), config=config, merged=("*",))


# Equations, physics


@public("diffrax")
def neural_differential_equation():
    import diffrax
    import equinox as eqx

    def make(key):
        return eqx.nn.MLP(3, 3, 8, 2, activation=jax.nn.softplus, key=key)

    def call(field, y):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: field(y)),
            diffrax.Tsit5(),
            0.0,
            1.0,
            0.1,
            y,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
            saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, 4)),
            adjoint=diffrax.DirectAdjoint(),
        )
        return solution.ys

    return of_equinox(make, normal(3), call=call)


@public("netket")
def netket_group_convolutions():
    import netket as nk

    model = nk.models.GCNN(
        symmetries=nk.graph.Square(2),
        layers=2,
        features=3,
        complex_output=False,
        mode="irreps",
    )
    return of_linen(model, normal(4, 4), merged_in_dora=("dense_symm/kernel",))


@public("netket")
def netket_group_convolutions_by_fourier_transforms():
    import netket as nk

    model = nk.models.GCNN(
        symmetries=nk.graph.Square(2),
        layers=2,
        features=3,
        complex_output=False,
        mode="fft",
    )
    config = {"targets": "*/kernel"}
    return of_linen(model, normal(4, 4), config=config, merged=("*/kernel",))


@public("netket")
def netket_autoregressive():
    import netket as nk

    hilbert = nk.hilbert.Spin(0.5, 6)
    model = nk.models.ARNNDense(hilbert=hilbert, layers=2, features=4)
    config = {"targets": "*/kernel", "axes": {"*": "io"}}
    spins = jnp.where(normal(4, 6) > 0, 1.0, -1.0)
    return of_linen(model, spins, config=config, left_out=("*/bias",), merged=("*",))
