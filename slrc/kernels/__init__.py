"""Block-sparse kernels in C++, compiled where and when a model needs them (`slrc.kernels.build`)."""
