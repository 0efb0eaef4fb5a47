"""The effect of a treatment that was not given at random, from weights that a network learns for the units.

Those who are treated differ from those who are not, so the difference of the means misleads. The upper level learns
weights under which a regression on some units explains the others and both arms look like everybody.
"""

from pathlib import Path

import torch
from ray import tune

from raybilevel import BilevelSearch, hypergradient_trainable
from raybilevel.hypergradient import CHECKPOINT_FILE, load_checkpoint
from raybilevel.methods import HypergradientDescent
from raybilevel.problems.treatment import TreatmentEffects

if __name__ == "__main__":
    problem = TreatmentEffects()
    method = HypergradientDescent(
        steps=200, rate=0.05, lower="tolerance", lower_tolerance=1e-3, solver_settings={"tolerance": 1e-2}
    )
    best = (
        tune.Tuner(
            tune.with_resources(hypergradient_trainable(problem, method), {"cpu": 1}),
            param_space={"start": tune.quniform(0, 65535, 1)},
            tune_config=tune.TuneConfig(
                search_alg=BilevelSearch(problem, method=method), metric="upper_loss", mode="min", num_samples=2
            ),
            run_config=tune.RunConfig(verbose=0),
        )
        .fit()
        .get_best_result()
    )
    network = problem.upper_variables().to(problem.dtype)
    network.load_state_dict(load_checkpoint(Path(best.checkpoint.path) / CHECKPOINT_FILE)["upper"])
    units = problem.everyone
    with torch.no_grad():
        weights = network(units.covariates, units.treated)

    def gap(weights):
        """The largest difference of a covariate's mean between the arms, in deviations."""
        treated, control = weights * units.treated, weights * (1 - units.treated)
        return (treated @ units.covariates / treated.sum() - control @ units.covariates / control.sum()).abs().max()

    print(f"largest gap between the arms: {gap(torch.ones_like(weights)):.2f} before, {gap(weights):.2f} weighted")
    for name, prefix in (("difference of means", "difference_"), ("inverse propensities", "ipw_"), ("learned", "")):
        print(f"error of the mean effect, {name}: {best.metrics[prefix + 'ate_error']:.2f}")
