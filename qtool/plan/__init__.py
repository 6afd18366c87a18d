"""The plan of a run: `decide` says what layers get, `check` whether artifacts can carry it; `make_plan` does both."""

from qtool.plan.layers import LayerPlan, Plan, Share
from qtool.plan.make import make_plan

__all__ = ["LayerPlan", "Plan", "Share", "make_plan"]
