"""Soak: random calls, damaged data, lost processes and killed trainings, for as long as one likes."""
