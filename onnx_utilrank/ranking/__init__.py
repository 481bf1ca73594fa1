"""Which rank each site gets: methods, the allocation of a budget, and the plan they end in."""
