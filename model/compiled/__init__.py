"""A few tokens through all classic blocks of a CPU's span in one call, by kernels of our own.

A token of a small model is over in milliseconds, of which asking torch for a dozen products and small operations a
block takes a third: each wakes its threads, and finds the processor's caches emptied by the weights before. Here a
team of threads walks through the blocks in step. `intrinsics` and `tiles` have the instructions that numba lacks;
`kernels` and `layers` the arithmetic; `walk` the order of it; `team` the threads; `decoder` what a span knows of all
this; `compilation` how it becomes machine code.

The kernels read the weights where oneDNN has packed them, so that prompts and training keep its products and no
weight stands twice. Where numba is missing, or oneDNN packs otherwise, or a block is no classic one, all is left to
torch.
"""
