"""The plan of a run: `decide` says what layers get, `check` whether artifacts can carry it; `make_plan` does both."""

from qtool.plan.layers import LayerPlan, Plan, Share
from qtool.plan.make import make_plan
from qtool.plan.planned import Planned

__all__ = ["LayerPlan", "Plan", "Planned", "Share", "make_plan"]
