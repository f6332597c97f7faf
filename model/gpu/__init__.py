"""What only a GPU runs: kernels in Triton, which torch's builds for CUDA bring along.

Whoever is outside this folder asks `probe` first and imports the rest where it is needed, never at the top of a
module: Triton may be missing, and a CPU must not pay for it. Each kernel has a way in torch alone beside it, which
serves where kernels cannot be launched and which the tests hold it to.
"""
