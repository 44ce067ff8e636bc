"""Planners: a picture and an instruction in, a Plan out. Local models and remote services behind one call."""

from replan.planner.base import Outcome, Planner, PlannerConfig, load_planner

__all__ = ["Outcome", "Planner", "PlannerConfig", "load_planner"]
