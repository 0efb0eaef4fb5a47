"""Ray Tune: the searcher, the trainables, callbacks and schedulers around them."""

from typing import TYPE_CHECKING

from raybilevel._lazy import lazy_names

if TYPE_CHECKING:
    from raybilevel.tune._conclude import conclude
    from raybilevel.tune._data_parallel import data_parallel_trainable
    from raybilevel.tune._descent_trainable import hypergradient_trainable
    from raybilevel.tune._fold_parallel import fold_parallel_trainable
    from raybilevel.tune._scalars import SearchScalars
    from raybilevel.tune._scheduler import PatientFIFO
    from raybilevel.tune._searcher import BilevelSearch
    from raybilevel.tune._snapshot import ResumableGenerator, prepare_resume
    from raybilevel.tune._trainable import lower_level_trainable

__all__ = [
    "BilevelSearch",
    "PatientFIFO",
    "ResumableGenerator",
    "SearchScalars",
    "conclude",
    "data_parallel_trainable",
    "fold_parallel_trainable",
    "hypergradient_trainable",
    "lower_level_trainable",
    "prepare_resume",
]

__getattr__ = lazy_names(
    __name__,
    {
        "BilevelSearch": "._searcher",
        "PatientFIFO": "._scheduler",
        "ResumableGenerator": "._snapshot",
        "SearchScalars": "._scalars",
        "conclude": "._conclude",
        "data_parallel_trainable": "._data_parallel",
        "fold_parallel_trainable": "._fold_parallel",
        "hypergradient_trainable": "._descent_trainable",
        "lower_level_trainable": "._trainable",
        "prepare_resume": "._snapshot",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
