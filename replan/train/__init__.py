"""Planner training: one definition of data, prompt and reward, for every engine that can run GRPO."""
