"""A backward cut in two: the gradient of the input, which the stage before waits for, and the gradient of the weights, which can wait.

The cut is found in the backward's jaxpr, so it knows no model. The matrix products (and other dear operations) that only weights need are
left for the second part. What that part needs is kept, unless it can cheaply be made again from arrays at hand: kept are the cotangents
of the products' outputs. Nothing is computed twice but element-wise operations, and gathers whose sharded input is kept.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

PyTree = Any
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr", "closed_call": "call_jaxpr"}  # name -> its jaxpr
_HAND_THROUGH = (*_CALLS, "remat_opt", "custom_vmap_call", "custom_jvp_call", "custom_vjp_call")  # whose body's outputs are theirs
_COLLECTIVES = ("all_gather", "reduce_scatter", "psum", "psum_invariant", "ppermute", "all_to_all", "pmax", "all_gather_invariant")
_MOVES = ("all_gather", "reshape", "transpose", "convert_element_type", "broadcast_in_dim", "squeeze", "copy")


class SplitBackward:
    """`backward(known, cotangent) -> (gradient of the weights, gradient of the input)`, cut in two.

    `known` is a pytree of arrays at hand for both parts. Each trace makes its own object: the cut depends on shapes alone, so it is the same.
    """

    def __init__(self, backward: Callable[[PyTree, jax.Array], tuple[PyTree, jax.Array]], known: PyTree, cotangent: jax.Array):
        self.known = jax.tree.leaves(known)
        closed, shapes = jax.make_jaxpr(_inlined(backward, known, cotangent), return_shape=True)(*self.known, cotangent)
        self.jaxpr, self.consts, self.gradient_tree = closed.jaxpr, closed.consts, jax.tree.structure(shapes[0])
        self._cut()

    def _cut(self) -> None:
        eqns, (*gradients, dx) = self.jaxpr.eqns, self.jaxpr.outvars
        producer = {var: eqn for eqn in eqns for var in eqn.outvars}
        for_input = _ancestors([dx], producer)
        late, after = set(), set()  # equations that only weights need: the dear ones and what follows from them
        of_cotangent = {self.jaxpr.invars[-1]}
        for eqn in eqns:
            if any(var in of_cotangent for var in _variables(eqn)):
                of_cotangent.update(eqn.outvars)
            if id(eqn) not in for_input and (is_dear(eqn) or any(var in after for var in _variables(eqn))):
                late.add(id(eqn))
                after.update(eqn.outvars)

        def can_be_made_again(eqn) -> bool:
            if eqn.primitive.name in _MOVES and len(_variables(eqn)) == 1:
                return _size(_variables(eqn)[0]) <= _size(eqn.outvars[0])
            return not is_dear(eqn) and not any(var in of_cotangent for var in eqn.outvars)

        self.kept = [var for var in gradients if not isinstance(var, core.Literal) and var not in after]  # small ones, known already
        wanted, kept = [var for eqn in eqns if id(eqn) in late for var in _variables(eqn)], set(self.kept)
        while wanted:
            var = wanted.pop()
            eqn = producer.get(var)
            at_hand = eqn is None and var is not self.jaxpr.invars[-1]
            if at_hand or var in kept or eqn is not None and id(eqn) in late:
                continue
            if eqn is not None and can_be_made_again(eqn):
                late.add(id(eqn))
                wanted += _variables(eqn)
            else:
                kept.add(var)
                self.kept.append(var)
        early = _ancestors([dx, *self.kept], producer)
        self.early = [eqn for eqn in eqns if id(eqn) in early]
        self.late = [eqn for eqn in eqns if id(eqn) in late]

    @property
    def kept_shapes(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in self.kept]

    def input_part(self, cotangent: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Returns (gradient of the input, what is kept for `weight_part`)."""
        env = self._environment([*self.known, cotangent])
        _evaluate(self.jaxpr, self.early, env)
        return _read(env, self.jaxpr.outvars[-1]), [env[var] for var in self.kept]

    def weight_part(self, kept: Sequence[jax.Array]) -> PyTree:
        """Returns the gradient of the weights."""
        env = self._environment(self.known) | dict(zip(self.kept, kept, strict=True))
        _evaluate(self.jaxpr, self.late, env)
        return jax.tree.unflatten(self.gradient_tree, [_read(env, var) for var in self.jaxpr.outvars[:-1]])

    def _environment(self, arguments) -> dict:
        return dict(zip(self.jaxpr.constvars, self.consts, strict=True)) | dict(zip(self.jaxpr.invars, arguments))


def _inlined(backward, known, cotangent):
    """Returns `backward` as a function of leaves whose jaxpr has no calls in it."""
    tree = jax.tree.structure(known)

    def flat(*arguments):
        return backward(jax.tree.unflatten(tree, arguments[:-1]), arguments[-1])

    def inlined(*arguments):
        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*arguments)
        results = _run(closed.jaxpr, closed.consts, arguments)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return inlined


def _run(jaxpr: core.Jaxpr, consts, arguments) -> list:
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))
    _evaluate(jaxpr, jaxpr.eqns, env)
    return [_read(env, var) for var in jaxpr.outvars]


def _evaluate(jaxpr: core.Jaxpr, eqns, env: dict) -> None:
    """Runs equations of `jaxpr`, calls inlined; their results are added to `env`."""
    for eqn in eqns:
        values = [_read(env, var) for var in eqn.invars]
        if eqn.primitive.name in _CALLS:
            inner = eqn.params[_CALLS[eqn.primitive.name]]
            results = _run(inner.jaxpr, inner.consts, values) if isinstance(inner, core.ClosedJaxpr) else _run(inner, [], values)
            env.update(zip(eqn.outvars, results, strict=True))
        else:
            names = _variables(eqn)
            outputs = [var for var in eqn.outvars if not isinstance(var, core.DropVar)]
            alone = jaxpr.replace(constvars=[], invars=names, outvars=outputs, eqns=[eqn])
            results = core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*(env[name] for name in names))
            env.update(zip(outputs, results, strict=True))


def origins(jaxpr: core.Jaxpr) -> list:
    """Returns the variable that each output is: the same for outputs of a call that are one variable in it, or that the call hands through."""
    producer = {var: (eqn, index) for eqn in jaxpr.eqns for index, var in enumerate(eqn.outvars)}

    def origin(var):
        eqn, index = producer.get(var, (None, 0)) if isinstance(var, core.Var) else (None, 0)
        body = next((body for body in core.jaxprs_in_params(eqn.params)), None) if eqn and eqn.primitive.name in _HAND_THROUGH else None
        if body is None or len(body.outvars) != len(eqn.outvars) or len(body.invars) != len(eqn.invars):
            return var if isinstance(var, core.Var) else id(var)
        inner = origins(body)
        if inner[index] in body.invars:
            return origin(eqn.invars[body.invars.index(inner[index])])
        return eqn.outvars[inner.index(inner[index])]

    return [origin(var) for var in jaxpr.outvars]


def _read(env: dict, var):
    return var.val if isinstance(var, core.Literal) else env[var]


def _variables(eqn) -> list:
    return [var for var in eqn.invars if not isinstance(var, core.Literal)]


def _size(var) -> int:
    return var.aval.size * var.aval.dtype.itemsize


def _ancestors(variables, producer: dict) -> set[int]:
    """Returns the ids of the equations on which `variables` depend."""
    found, wanted = set(), [var for var in variables if not isinstance(var, core.Literal)]
    while wanted:
        eqn = producer.get(wanted.pop())
        if eqn is not None and id(eqn) not in found:
            found.add(id(eqn))
            wanted += _variables(eqn)
    return found


def is_dear(eqn) -> bool:
    """Returns whether an equation is dear: a matrix product, communication, a loop, a kernel or a call to the host, or calls one that is."""
    bodies = list(core.jaxprs_in_params(eqn.params))
    if eqn.primitive.name in _HAND_THROUGH:
        return any(is_dear(inner) for body in bodies for inner in body.eqns)
    return eqn.primitive.name in ("dot_general", "pallas_call", "ffi_call", "pure_callback", *_COLLECTIVES) or bool(bodies)
