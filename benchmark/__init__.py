"""Sample-efficiency comparisons: declared suites of runs, turned into tables and figures."""

import os

# One thread for all that is measured here. NumPy's matrix products look at this once, when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
