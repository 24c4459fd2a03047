"""The faults in the solver of `slab`, in Python and compiled (csrc/solver.h, csrc/cpu).

Few of them change a shape or raise anything: a layer comes out, and it is worse.
"""

from __future__ import annotations

from .fault import Fault

STEPS = "tests/methods/test_compiled_steps.py"
COMPILED = (f"{STEPS}::test_sweep_and_descent_are_those_of_torch",)
BEST = (f"{STEPS}::test_a_group_at_the_best_of_all_its_states_stays_there",)
GRADIENT = ("tests/methods/test_gradient.py",)
METHODS = "tests/methods/test_methods.py"
DAMPED = (f"{METHODS}::test_kept_values_solve_the_damped_normal_equations",)
DRIFT = (f"{METHODS}::test_drift_moves_the_layer_towards_the_dense_output",)
REMEMBERED = (
    "tests/compression/test_published.py::test_one_matrix_is_factorised_once_for_all_who_read_it",
)
PIECES = (
    "tests/compression/test_head.py::test_rows_in_pieces_make_one_weight_that_is_hardly_worse",
)

SENSITIVITY = ("tests/compression/test_sensitivity.py",)

SOLVER = (
    Fault(
        "the whole of a squared change of the log-likelihood instead of half",
        "slab_kernels/compression/sensitivity.py", "total / (2 * self.tokens)",
        "total / self.tokens", SENSITIVITY,
    ),
    Fault(
        "gradients at a block's input taken for those at its output",
        "slab_kernels/compression/sensitivity.py", "enumerate(self.gradients[index])",
        "enumerate(self.gradients[index - 1])", SENSITIVITY,
    ),
    Fault(
        "a descent that leaves a group's state for a worse one",
        "csrc/cpu/descent.h", "best.loss = V::fma(pull, best.error[i] - g.free[i], best.loss);",
        "best.loss = pull * V::zero() + S::splat(3.4e38f);", BEST,
    ),
    Fault(
        "a descent whose groups to the left do not hear of it",
        "csrc/cpu/descent.h",
        "for (int64_t j = 0; j < width; ++j) {\n          F g = V::load(gradient",
        "for (int64_t j = a; j < width; ++j) {\n          F g = V::load(gradient", COMPILED,
    ),
    Fault(
        "step sizes searched with the weights of the first block",
        "csrc/cpu/sweep.h", "S::splat(s.weight[s.columns.start + j]) * miss",
        "S::splat(s.weight[j]) * miss", COMPILED,
    ),
    Fault(
        "a level above the highest of several planes",
        "csrc/cpu/states.h", "splat(0.5f * (most - 3))", "splat(0.5f * (most - 1))", COMPILED,
    ),
    Fault(
        "half of what two pruned entries cost together",
        "slab_kernels/methods/solvers/*.py", "2 * inverse[..., 0, 1]", "inverse[..., 0, 1]",
        COMPILED,
    ),
    Fault(
        "a gradient that does not hear of the blocks behind",
        "slab_kernels/methods/solvers/*.py", "if everywhere and start:", "if False:",
        COMPILED,
    ),
    Fault(
        "a gradient from before the adapter was rounded",
        "slab_kernels/methods/*.py",
        "self.adapter, self.gradient = self.adapter._replace(P=P, Q=Q), None",
        "self.adapter = self.adapter._replace(P=P, Q=Q)", GRADIENT,
    ),
    Fault(
        "a refit without its damping",
        "slab_kernels/methods/*.py", "torch.diag(damping * diagonal + REFIT_FLOOR",
        "torch.diag(0 * damping * diagonal + REFIT_FLOOR", DAMPED,
    ),
    Fault(
        "a drift that is doubled instead of undone",
        "slab_kernels/methods/*.py", "return W + share * solved.T.to(W)",
        "return W - share * solved.T.to(W)", DRIFT,
    ),
    Fault(
        "what was made of a Gram matrix before it changed",
        "slab_kernels/methods/solvers/*.py",
        "version = 0 if gram.is_inference() else gram._version", "version = 0", REMEMBERED,
    ),
    Fault(
        "a V of other rows in the wrong coordinates",
        "slab_kernels/methods/solvers/*.py", "V = given * scale[:, None]",
        "V = given / scale[:, None]", PIECES,
    ),
)  # fmt: skip
