"""Pieces that several networks share. All take one example."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import is_known
from jaxdiff.conditions import LABEL, as_entries, check_labels, check_taken
from jaxdiff.networks._conv import convolution_p
from jaxdiff.networks._rules import TENSOR_RULES
from jaxdiff.parallel import at_use
from jaxdiff.taps import Tap

zeros = nnx.initializers.zeros_init()

TOKENS, TOKEN_MASK = "tokens", "token_mask"


def timestep_embedding(t: Array, size: int, max_period: float = 10_000.0) -> Array:
    """Sinusoidal embedding of a scalar: sines, then cosines, of t at geometric frequencies.

    The frequencies are max_period^(-i / (size/2 - 1)), i = 0 .. size/2 - 1: from 1 to
    1 / max_period. Computed in float32 or wider.

    Args:
        t: scalar noise label.
        size: even number of features, at least 4.
        max_period: longest period, in units of 2 pi.

    Returns:
        `(size,)`.

    Raises:
        ValueError: for an odd or smaller size, or a t that is no scalar.

    Reference: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762, section
    3.5, as used by Ho, Jain, Abbeel, arXiv 2006.11239.
    """
    t = jnp.asarray(t)
    if size < 4 or size % 2 or t.shape != ():
        raise ValueError(
            f"`size` must be even and >= 4, and `t` a scalar; got {size} and shape {t.shape}. "
            "Use jax.vmap for a batch."
        )
    dtype = jnp.promote_types(t.dtype, jnp.float32)
    half = size // 2
    exponents = jnp.arange(half, dtype=dtype) / (half - 1)
    angles = t.astype(dtype) * max_period**-exponents
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Inverted dropout; the identity without a key.

    Args:
        x: of any shape.
        rate: probability that an entry becomes 0, in [0, 1).
        key: typed PRNG key, or None.

    Returns:
        x in its shape, the entries that are left divided by 1 - rate.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def check_rate(rate: float) -> None:
    """Reject dropout rates outside [0, 1)."""
    check_number("dropout", float(rate), least=0.0, below=1.0)


def fold(key: PRNGKeyArray | None, index: Array | int) -> PRNGKeyArray | None:
    """`fold_in`, passing None on."""
    return None if key is None else jax.random.fold_in(key, index)


def remat_policy(remat: bool | str) -> Callable[..., Any] | None:
    """The `jax.checkpoint` policy of a name: what of a block is kept for the backward pass.

    Args:
        remat: True keeps nothing, and recomputes the block; a name of `jax.checkpoint_policies`
            keeps what that policy says, e.g. "dots_saveable" all matrix products.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(remat, bool):
        return None
    # Those that are policies themselves, and not makers of them.
    known = [
        "dots_saveable",
        "dots_with_no_batch_dims_saveable",
        "everything_saveable",
        "nothing_saveable",
    ]
    if remat not in known:
        raise ValueError(f"`remat` must be a bool or one of {', '.join(known)}, got {remat!r}.")
    policy = getattr(jax.checkpoint_policies, remat)
    if remat == "dots_saveable":  # which has JAX's own convolutions among the products
        return lambda prim, *args, **params: prim is convolution_p or policy(prim, *args, **params)
    return policy


ATTENTION = ("plain", "xla", "cudnn")


def attend(
    q: Array,
    k: Array,
    v: Array,
    num_heads: int,
    name: str,
    tap: Tap,
    *,
    mask: Array | None = None,
    implementation: str = "plain",
) -> Array:
    """Multi-head softmax attention over tokens, with taps on q, k, v and the weights.

    Logits and softmax are in float32 or wider. Where a tap asks for the weights, or edits them,
    they are an ordinary array, whatever the implementation.

    Args:
        q: `(n, d)`.
        k: `(m, d)`.
        v: `(m, d)`.
        num_heads: divides d.
        name: prefix of the taps `.q`, `.k`, `.v` and `.weights` (`(heads, n, m)`).
        tap: the call's tap.
        mask: booleans `(m,)`, which of the tokens count; None for all.
        implementation: "plain" differentiates in both modes; "xla" and "cudnn" are those of
            `jax.nn.dot_product_attention`, which keeps no weights with "cudnn", on a GPU in half
            precision, and has no forward derivative there.

    Returns:
        `(n, d)`.
    """
    size = q.shape[-1] // num_heads
    q, k, v = (
        tap(f"{name}.{part}", value).reshape(-1, num_heads, size)
        for part, value in (("q", q), ("k", k), ("v", v))
    )
    weights_name = f"{name}.weights"
    if implementation != "plain" and not tap.wants(weights_name):
        tap.skip(weights_name)
        allowed = None if mask is None else jnp.broadcast_to(mask, (1, 1, len(q), len(k)))
        fused: Any = jax.nn.dot_product_attention
        out = fused(q[None], k[None], v[None], mask=allowed, implementation=implementation)[0]
        return out.reshape(-1, num_heads * size)
    # Heads lead, so that both products are batches of matrices.
    q, k, v = (part.swapaxes(0, 1) for part in (q, k, v))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("hqd,hkd->hqk", q, k, preferred_element_type=wide) / size**0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    weights = tap(weights_name, jax.nn.softmax(logits).astype(v.dtype))
    out = jnp.einsum("hqk,hkd->hqd", weights, v)
    return out.swapaxes(0, 1).reshape(-1, num_heads * size)


class Attention(nnx.Module):
    """Attention of tokens to themselves, or to a context of other tokens, and a projection.

    Taps: name, the projected result, and name.q, .k, .v and .weights.

    Args:
        features: size of a token, divisible by `num_heads`.
        num_heads: number of heads.
        context_size: size of a context's token; None for attention to themselves.
        implementation: see `attend`.
        out_init: how the projection's weights start; zero for a block that starts as the identity.
        kinds: dtypes and initialisation keys.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        context_size: int | None = None,
        implementation: str = "plain",
        out_init: Callable[..., Array] | None = None,
        **kinds: Any,
    ):
        if implementation not in ATTENTION:
            raise ValueError(
                f"`attention` must be one of {', '.join(ATTENTION)}, got {implementation!r}."
            )
        self.num_heads, self.implementation = num_heads, implementation
        seen = features if context_size is None else context_size
        self.q = nnx.Linear(features, features, **kinds)
        self.k = nnx.Linear(seen, features, **kinds)
        self.v = nnx.Linear(seen, features, **kinds)
        start: dict[str, Any] = {} if out_init is None else {"kernel_init": out_init}
        self.out = nnx.Linear(features, features, **start, **kinds)

    def __call__(
        self,
        tap: Tap,
        name: str,
        h: Array,
        context: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """The result `(n, features)` for tokens h `(n, features)` and a context `(m, size)`."""
        seen = h if context is None else context
        mixed = attend(
            self.q(h), self.k(seen), self.v(seen), self.num_heads, name, tap, mask=mask,
            implementation=self.implementation,
        )  # fmt: skip
        return tap(name, self.out(mixed))


class Block(nnx.Module):
    """Base of the parts of a network that are run, and perhaps recomputed, one after another.

    On a mesh, training steps leave it to the network to gather their weights: `Network.at_use`.
    """

    gathers_itself = True


def with_attention(network: nnx.Module, implementation: str) -> nnx.Module:
    """The same network with another implementation of attention, see `attend`.

    To differentiate forwards, as much of `jaxdiff.geometry` does, what was trained with "cudnn".
    """
    if implementation not in ATTENTION:
        raise ValueError(
            f"`implementation` must be one of {', '.join(ATTENTION)}, got {implementation!r}."
        )
    return _changed(network, Attention, "implementation", "attention", implementation)


def with_scalars(network: "Network", *names: str) -> "Network":
    """The same network, which takes further scalar conditions and does not listen to them yet.

    Their projections begin at zero, so that it is the same function until it learns.

    Args:
        network: a `UNet`, `DiT` or `MLP`.
        names: of the entries.

    Raises:
        ValueError: for an entry that it has already.
    """
    known = network.embedding.known()  # type: ignore[attr-defined]
    if taken := sorted(set(names) & set(known)):
        raise ValueError(f"`names` must be new entries, got {taken[0]!r}: it takes {known}.")
    given = (*dict(network.arguments)["scalars"], *names)
    copy: Any = jax.tree.map(lambda leaf: leaf, network)
    copy.arguments = tuple((n, given if n == "scalars" else v) for n, v in network.arguments)
    embedding = copy.embedding
    kernel = embedding.first.kernel
    for name in names:
        embedding.scalars[name] = nnx.Linear(
            embedding.features, embedding.size, kernel_init=zeros, dtype=embedding.first.dtype,
            param_dtype=kernel.dtype, rngs=nnx.Rngs(0),
        )  # fmt: skip
    return copy


def without_remat(tree: PyTree) -> PyTree:
    """The same networks, wherever they are in a tree, that recompute nothing."""

    def one(node):
        return _changed(node, Network, "remat", "remat", False) if _is_network(node) else node

    return jax.tree.map(one, tree, is_leaf=_is_network)


def _is_network(node: Any) -> bool:
    return isinstance(node, Network)


def _changed(network: nnx.Module, kind: type, field: str, argument: str, value: Any) -> nnx.Module:
    """A copy, the field changed in all its modules of a kind, and the argument that says so."""
    copy = jax.tree.map(lambda leaf: leaf, network)
    for _, module in nnx.iter_graph(copy):
        if isinstance(module, kind):
            setattr(module, field, value)
        if isinstance(module, Network):
            module.arguments = tuple(
                (name, value if name == argument else given) for name, given in module.arguments
            )
    return copy


class ConditionEmbedding(nnx.Module):
    """Noise level and conditions, embedded and added.

    Linear(SiLU(Linear(sinusoids of t))), plus the label's row or projection, plus a projection of
    the sinusoids of every scalar, which starts at zero.

    Args:
        features: size of the sinusoidal embeddings.
        size: size of the result.
        num_classes: number of classes of an integer label, or None.
        label_size: size of a vector label, or None.
        scalars: names of further scalar conditions.
        token_size: size of a token to attend to, or None; checked here, used by the network.
        num_words: number of words whose tokens are learned, or None: tokens are then integers in
            [0, num_words], of which the last stands for none.
        kinds: dtypes and initialisation keys.
    """

    def __init__(
        self,
        features: int,
        size: int,
        *,
        num_classes: int | None = None,
        label_size: int | None = None,
        scalars: Sequence[str] = (),
        token_size: int | None = None,
        num_words: int | None = None,
        **kinds: Any,
    ):
        if num_words is not None and token_size is None:
            raise ValueError("`num_words` needs the size of their tokens. Pass `token_size`.")
        if num_classes is not None and label_size is not None:
            raise ValueError(
                "`num_classes` and `label_size` are two kinds of one label, got both. A vector of "
                f"the embedding's size, {size}, serves in place of a class without `label_size`."
            )
        self.features, self.size = features, size
        self.num_classes: Any = num_classes
        self.label_size, self.token_size = label_size, token_size
        self.first = nnx.Linear(features, size, **kinds)
        self.second = nnx.Linear(size, size, **kinds)
        self.classes: Any = (
            None if num_classes is None else nnx.Embed(num_classes + 1, size, **kinds)
        )
        self.vector: Any = None if label_size is None else nnx.Linear(label_size, size, **kinds)
        self.num_words: Any = num_words
        self.words: Any = (
            nnx.Embed(num_words + 1, token_size, **kinds) if num_words and token_size else None
        )
        self.scalars = nnx.Dict(
            {name: nnx.Linear(features, size, kernel_init=zeros, **kinds) for name in scalars}
        )

    def known(self) -> tuple[str, ...]:
        """The entries of a condition that the network takes."""
        label = (LABEL,) if self.classes is not None or self.vector is not None else ()
        tokens = () if self.token_size is None else (TOKENS, TOKEN_MASK)
        return (*label, *self.scalars, *tokens)

    def __call__(self, t: Array, cond: PyTree) -> tuple[Array, Array | None, Array | None]:
        """Embedding `(size,)` of a scalar noise label and a condition; tokens and their mask.

        Raises:
            ValueError: for an entry that is missing, of another shape, or that nobody takes.
        """
        entries = self._checked(cond)
        emb = self.second(nnx.silu(self.first(timestep_embedding(t, self.features))))
        if LABEL in entries:
            emb = emb + self._label(entries[LABEL])
        for name in self.scalars:
            emb = emb + self.scalars[name](timestep_embedding(entries[name], self.features))
        return emb, self._tokens(entries.get(TOKENS)), entries.get(TOKEN_MASK)

    def _tokens(self, tokens: Array | None) -> Array | None:
        """Vectors, looked up if they are words."""
        if tokens is None or jnp.ndim(tokens) == 2:
            return tokens
        none = self.num_words
        return self.words(jnp.where((tokens < 0) | (tokens > none), none, tokens))

    def _label(self, label: Array) -> Array:
        if self.vector is not None:
            return self.vector(label)
        if jnp.ndim(label):
            return label
        # Others are refused where they are known; a traced one must not read beyond the table.
        none = self.num_classes
        return self.classes(jnp.where((label < 0) | (label > none), none, label))

    def _checked(self, cond: PyTree) -> dict[str, Array]:
        entries = check_taken(cond, self.known(), "this network")
        if self.num_classes is not None:
            check_labels(entries.get(LABEL), self.num_classes)
        for name in self.known():
            if name == TOKEN_MASK:
                continue
            if name not in entries:
                raise ValueError(
                    f"`cond` must have {self._expected(name)}, got "
                    f"{'no condition' if not entries else sorted(entries)}."
                )
            if not self._fits(name, entries[name]):
                value = entries[name]
                raise ValueError(
                    f"`cond` must have {self._expected(name)} for one example, got shape "
                    f"{jnp.shape(value)} and dtype {jnp.result_type(value)}. Use jax.vmap for a "
                    "batch."
                )
        return entries

    def _expected(self, name: str) -> str:
        if name == TOKENS and self.words is not None:
            return f"{TOKENS!r}, integers (n,) in [0, {self.num_words}], or (n, {self.token_size})"
        if name == TOKENS:
            return f"{TOKENS!r}, (n, {self.token_size})"
        if name in self.scalars:
            return f"{name!r}, a scalar"
        if self.vector is not None:
            return f"a label, a vector ({self.label_size},)"
        return (
            f"a scalar integer class in [0, {self.num_classes}), or {self.num_classes} for none, or"
            f" a vector ({self.size},) in its place"
        )

    def _fits(self, name: str, value: Array) -> bool:
        shape = jnp.shape(value)
        if name == TOKENS and len(shape) == 1:
            integers = jnp.issubdtype(jnp.result_type(value), jnp.integer)
            return self.words is not None and integers
        if name == TOKENS:
            return len(shape) == 2 and shape[1] == self.token_size
        if name in self.scalars:
            return shape == ()
        if self.vector is not None:
            return shape == (self.label_size,)
        integer = jnp.issubdtype(jnp.result_type(value), jnp.integer)
        return shape == () if integer else shape == (self.size,)


class Network(nnx.Module):
    """Base of the networks that take one example, its noise label, and conditions.

    A network defines `shape`, `embedding` and `forward`. Its `cond` is an integer class or another
    label, or a mapping of named entries, as in `jaxdiff.conditions`:

        "label"       a class in [0, num_classes), num_classes for none, or a vector of the
                      embedding's size in its place; a vector `(label_size,)` with `label_size`
        further       scalars, by the names in `scalars`
        "tokens"      `(n, token_size)` to attend to, with "token_mask", booleans `(n,)`, which
                      of them count; all without. With `num_words` also words, integers `(n,)` in
                      [0, num_words], num_words for none, whose tokens are learned

    Attributes:
        shape: that of an example.
        embedding: of the noise label and conditions; its output is the tap "emb".
        arguments: what it was made with but for `rngs`, names and values.
    """

    shape: tuple[int, ...]
    embedding: ConditionEmbedding
    arguments: tuple[tuple[str, Any], ...]

    @abstractmethod
    def forward(
        self,
        tap: Tap,
        x: Array,
        emb: Array,
        key: PRNGKeyArray | None,
        tokens: Array | None,
        token_mask: Array | None,
    ) -> Array:
        """The output for one checked example, in any dtype."""

    def at_use(self, block: Block, prefix: str = "", layers: int = 1) -> Block:
        """A block with its weights gathered, inside what is recomputed; see `parallel.at_use`."""
        dtype = dict(self.arguments)["dtype"]
        return at_use(block, rules=TENSOR_RULES, prefix=prefix, dtype=dtype, layers=layers)

    def check_cond(self, cond: PyTree) -> None:
        """Reject labels and words, of a batch or one example, that are known to be none.

        Raises:
            ValueError: naming the first.
        """
        entries, embedding = as_entries(cond), self.embedding
        if embedding.num_classes is not None:
            check_labels(entries.get(LABEL), embedding.num_classes)
        tokens = entries.get(TOKENS)
        if embedding.num_words is None or tokens is None or not is_known(tokens):
            return
        words = np.asarray(tokens)
        if np.issubdtype(words.dtype, np.integer) and words.size:
            low, high = words.min(), words.max()
            if low < 0 or high > embedding.num_words:
                raise ValueError(
                    f"Words must lie in [0, {embedding.num_words - 1}], or be "
                    f"{embedding.num_words} for none, got {low if low < 0 else high}."
                )

    def __call__(
        self,
        x: Array,
        t: Array,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
        tap: Tap | None = None,
    ) -> Array:
        """The output for one example, in its dtype.

        Args:
            x: the example, of the network's `shape`.
            t: scalar noise label.
            cond: its condition; see the class.
            key: randomness of dropout; None turns it off.
            tap: reads and edits inner activations; see `jaxdiff.taps`.

        Raises:
            ValueError: if x has another shape, or the condition does not fit the network.
        """
        if x.shape != self.shape:
            raise ValueError(
                f"`x` must be one example of shape {self.shape}, got {x.shape}. "
                "Use jax.vmap for a batch."
            )
        tap = Tap() if tap is None else tap
        emb, tokens, token_mask = self.embedding(t, cond)
        emb = tap("emb", emb)
        return self.forward(tap, x, emb, key, tokens, token_mask).astype(x.dtype)


def arguments_of(given: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """`Network.arguments` from the `locals()` with which `__init__` begins."""
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in given.items()
        if name not in ("self", "rngs", "__class__")
    )


def image_shape(image_size: int | tuple[int, int], channels: int) -> tuple[int, int, int]:
    """(H, W, C) of a height and width, or of one number for both."""
    sizes = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"`image_size` must be a size or (height, width), got {image_size}.")
    return (*sizes, channels)
