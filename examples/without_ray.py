"""The search itself is ask/tell and knows no Ray: here it runs in one process, with 16 weight decays at once."""

from raybilevel.methods import make_method
from raybilevel.problems.digits import DigitsLogistic
from raybilevel.search import BilevelOptimizer, search
from raybilevel.space import Parameter, Space

if __name__ == "__main__":
    groups = 16
    problem = DigitsLogistic(groups)
    space = Space(tuple(Parameter(("weight_decay", f"g{g}"), 1e-6, 10.0, log=True) for g in range(groups)))
    optimizer = BilevelOptimizer(space, make_method("default"), seed=0)
    search(problem, optimizer, cost=20)
    state = optimizer.state
    for cost, training in zip(state.costs(), state.told, strict=True):
        print(f"cost {cost:5.1f}  {training.proposal.origin:<6}  F {training.upper_loss:.4f}")
    print(
        f"best F {state.best.upper_loss:.4f} after {len(state.done)} trainings and {len(state.steps)} upper-level steps"
    )
