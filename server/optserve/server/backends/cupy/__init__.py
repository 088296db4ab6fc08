"""Formulas as CUDA kernels. Importing this imports neither CuPy nor a driver; `device` alone does so, when it is asked to."""
