"""The public functions, a file for each command. Each reads like its task: resolve, check, plan, apply, record.

The rooms in this folder hold what several commands share (`places`, `reporting`, `resolving`, `checking`, `recording`),
and the parts of the three largest commands (`merges`, `training_runs`, `uploads`).
"""
