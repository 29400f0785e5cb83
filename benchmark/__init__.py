"""Sample-efficiency comparisons: declared suites of runs, turned into tables and figures."""
